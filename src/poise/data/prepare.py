"""From text to prepared data: read, clean, judge, encode, write, seal.

The sources are read once, block by block (``record``); every block is cleaned and scored on its own (``pipeline``), all
documents are judged together (``judge``), what is kept is encoded block by block and put together in the order of the
sources. What is done is kept in a work folder (``work``) until the result is in its place. Two calls with the same
input write the same bytes, however many processes they use and however often they were interrupted; a call for an
unchanged input into the same folder does nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import tokenizers

from poise.core.errors import UserError
from poise.data import record, sources, staging, store, work
from poise.data.assemble import assemble, write_dropped
from poise.data.dedup import exact, minhash
from poise.data.dedup.ids import Ids
from poise.data.gather import codes, mapped_signatures, sample
from poise.data.judge import KEPT, Judgement, judge
from poise.data.look.health import coverage
from poise.data.look.odd import quantiles
from poise.data.naming import fingerprint, place_for
from poise.data.pipeline import SIGNATURE, Block, Clean, Encode, clean_path, read_batch, stages_of
from poise.data.readers import Place, Tally
from poise.data.settings import Settings
from poise.data.sources import Source
from poise.data.tokens.tokenizer import SAMPLE_BYTES, Tokenizer, load, train

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total): bytes of the sources' files or of text, or steps; total is None if unknown."""

Report = Callable[["Kept"], None]

_CHECKED_BYTES: Final = 10**6  # text on which a fast encoder has to agree
_WORTH_PROCESSES: Final = 256 * 2**20  # bytes of text from which more processes repay their start


@dataclass(frozen=True, slots=True)
class Kept:
    """What the filters and the search for duplicates leave: known before anything is removed.

    Attributes:
        documents, bytes: read, before any was left out.
        dropped: reason -> (documents, bytes).
        skipped: files, rows and lines that could not be read, by reason.
        damaged: files of which only a part could be read.
    """

    documents: int
    bytes: int
    dropped: Mapping[str, tuple[int, int]]
    skipped: Mapping[str, int]
    damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Prepared data.

    Attributes:
        dir: the folder.
        manifest: contents of its ``manifest.json``; empty after a dry run.
        reused: true if it was there already and nothing was done.
    """

    dir: Path
    manifest: Mapping[str, Any]
    reused: bool


def prepare(
    source: str | Sequence[str],
    out: Path | None = None,
    settings: Settings | None = None,
    *,
    processes: int = 1,
    progress: Progress | None = None,
    report: Report | None = None,
    dry_run: bool = False,
) -> Prepared:
    """Turn text into prepared data at ``out``.

    Without ``out`` the place is ``default_dir``, so that the same text with the same settings is prepared once. A
    source that is itself a folder of prepared data is opened and ``out`` is not used. The held-out part has at
    least one document if there are two different ones; a source with a single text has no held-out part. Equal texts,
    and texts that were found to be near-duplicates, are always on the same side.

    Args:
        source: a source (``sources.resolve``), or several, each ``PATH`` or ``NAME=PATH``.
        settings: what decides the contents.
        processes: how many work at once; 0 uses every core where the text is long enough to repay their start. With
            more than one the calling program needs the usual ``if __name__ == "__main__"``.
        progress: told how far each stage is.
        report: told what is going to be left out, and why, before it is.
        dry_run: stop after the report; a later call goes on from there.

    Raises:
        UserError: no such source, no text in it, nothing left of it, too little text for the vocabulary, a bad
            tokenizer, a damaged file where ``strict``, another process at work there, what is there already has
            changed since it was written, or a place that cannot be written to or is full.
    """
    given_sources = [source] if isinstance(source, str) else list(source)
    settings = settings or Settings()
    if (opened := _already_prepared(given_sources)) is not None:
        return _checked(opened)
    found = sources.resolve_all(given_sources)
    given = load(settings.tokenizer) if settings.tokenizer is not None else None
    key = fingerprint(found, settings, given)
    out = place_for(found, key) if out is None else Path(os.path.realpath(Path(out).expanduser()))
    if (present := _reusable(out, key)) is not None and not dry_run:
        work.clear(out, key)
        return _checked(present)
    staging.refuse_foreign(out)
    if not processes:
        size = sum(one.size or 0 for one in found)
        processes = (os.cpu_count() or 1) if size >= _WORTH_PROCESSES else 1
    preparation = _Preparation(found, settings, processes, progress or (lambda *_: None), report or (lambda _: None))
    with work.opened(out, key, keep=dry_run and present is None) as folder:
        # Another process may have finished it between the look above and the claim on the folder.
        if not dry_run and (present := _reusable(out, key)) is not None:
            return present
        judgement = preparation.judged(folder)
        if dry_run:
            return Prepared(out, {}, False)
        manifest = preparation.written(folder, judgement, given, key)
        staging.publish(folder / "final", out)
    return Prepared(out, manifest, False)


def default_dir(source: str | Sequence[str], settings: Settings) -> Path:
    """Return where prepared data goes when no folder is given.

    ``$POISE_CACHE/data/<name>-<hash>``, or ``~/.cache/poise/data/...``; the hash is of the sources' listing and the
    settings. Prepared data as a source is its own place.

    Raises:
        UserError: there is no such source or tokenizer, or no home folder.
    """
    given_sources = [source] if isinstance(source, str) else list(source)
    if (opened := _already_prepared(given_sources)) is not None:
        return opened.dir
    found = sources.resolve_all(given_sources)
    given = load(settings.tokenizer) if settings.tokenizer is not None else None
    return place_for(found, fingerprint(found, settings, given))


class _Preparation:
    """The passes from text to a sealed folder."""

    def __init__(
        self, found: Sequence[Source], settings: Settings, processes: int, progress: Progress, report: Report
    ) -> None:
        self._sources, self._settings, self._processes = found, settings, processes
        self._progress, self._report = progress, report
        self._tally = Tally()
        self._metas: list[work.Meta] = []
        self._dropped: Mapping[str, tuple[int, int]] = {}
        self._duplicate_ids = 0

    # -- reading and cleaning ----------------------------------------------------------------------------------

    def judged(self, folder: Path) -> Judgement:
        """Read, clean and judge everything; report what will be left out."""
        for meta in _committed(folder):
            self._took(meta)
        done = folder / "read.json"
        finished = work.committed(done)
        if finished is None or finished["blocks"] != len(self._metas):
            settings = self._settings
            shutil.rmtree(folder / "tokens", ignore_errors=True)  # of blocks that have been lost since
            clean = Clean(folder, stages_of(settings), settings.dedup == "near", settings.minhash)
            try:
                for meta in work.spread(clean, self._blocks(), self._processes):
                    self._took(meta)
            except UserError as error:
                if self._metas:
                    raise work.UnfinishedError(f"{error}{staging.goes_on(folder)}") from None
                raise
            facts = {"blocks": len(self._metas), "tally": self._tally.state()}
            work.commit(done, facts, lambda path: path.write_text("all blocks are there", encoding="utf-8"))
        else:
            self._tally = Tally.of(finished["tally"])
        if not any(meta["rows"] for meta in self._metas):
            raise self._no_text()
        return self._judge(folder)

    def _took(self, meta: work.Meta) -> None:
        """Note a cleaned block; only the last one's tally is needed, and it may be long."""
        if self._metas:
            self._metas[-1].pop("tally", None)
        self._metas.append(meta)

    def _blocks(self) -> Iterator[Block]:
        """Read the sources from where the blocks that are there end."""
        number, begin, place, settings = len(self._metas), 0, None, self._settings
        if self._metas:
            last = self._metas[-1]
            begin, place = last["source"], Place(*last["place"])
            self._tally = Tally.of(last["tally"])
        before = sum(one.size or 0 for one in self._sources[:begin])
        total = None if any(one.size is None for one in self._sources) else sum(one.size or 0 for one in self._sources)
        for index in range(begin, len(self._sources)):
            one = self._sources[index]
            start = place if index == begin else None
            self._tally.on_read = _shifted(self._progress, before, total)
            documents = sources.documents(
                one, settings.text_field, self._tally, start=start, strict=settings.strict, repair=settings.repair
            )
            for group in record.groups(documents):
                meta = {"source": index, "place": list(group[-1].place or ()), "tally": self._tally.state()}
                yield Block(number, record.of(group), meta)
                number += 1
            before += one.size or 0

    # -- judging -----------------------------------------------------------------------------------------------

    def _judge(self, folder: Path) -> Judgement:
        """Gather the columns that are judged together, judge them, and report."""
        blocks, done, total = len(self._metas), 0, sum(meta["bytes"] for meta in self._metas)
        names: dict[str, int] = {"": KEPT}
        reasons, hashes = [], []
        near, ids = self._settings.dedup == "near", Ids()
        (folder / "judge").mkdir(exist_ok=True)
        signatures_path = folder / "judge" / "signatures"
        with signatures_path.open("wb") as signatures:
            for number in range(blocks):
                batch = read_batch(clean_path(folder, number))
                reasons.append(codes(batch.column(record.REASON), names))
                hashes.append(exact.from_binary(batch.column("content_hash")))
                if near:
                    rows = batch.column(SIGNATURE).filter(pa.array(reasons[-1] == KEPT))
                    signatures.write(b"".join(rows.to_pylist()))
                for source, name in _named(batch):
                    ids.add(source, name)
                done += self._metas[number]["bytes"]
                self._progress("looking for duplicates", done, total)
        self._duplicate_ids = ids.duplicates()
        judgement = judge(
            folder,
            self._settings,
            [meta["rows"] for meta in self._metas],
            np.concatenate(reasons),
            list(names),
            np.concatenate(hashes),
            mapped_signatures(signatures_path) if near else None,
        )
        signatures_path.unlink()
        kept = self._kept(folder, judgement)
        self._dropped = kept.dropped
        self._report(kept)
        if sum(documents for documents, _ in kept.dropped.values()) == kept.documents:
            took = ", ".join(f"{reason} took {count:,}" for reason, (count, _) in kept.dropped.items())
            raise UserError(f"nothing is left of {kept.documents:,} documents: {took}; use other filters")
        return judgement

    def _kept(self, folder: Path, judgement: Judgement) -> Kept:
        documents, size = Counter[int](), Counter[int]()
        for number in range(len(self._metas)):
            reason = judgement.block(number).reason
            sizes = np.asarray(read_batch(clean_path(folder, number)).column("bytes"))
            for code in np.unique(reason).tolist():
                documents[code] += int((reason == code).sum())
                size[code] += int(sizes[reason == code].sum())
        dropped = {judgement.reasons[code]: (documents[code], size[code]) for code in sorted(documents) if code != KEPT}
        most_first = sorted(dropped.items(), key=lambda item: (-item[1][0], item[0]))
        damaged = tuple(self._tally.damaged)
        return Kept(sum(documents.values()), sum(size.values()), dict(most_first), self._skipped(), damaged)

    # -- tokens ------------------------------------------------------------------------------------------------

    def written(self, folder: Path, judgement: Judgement, given: Tokenizer | None, key: str) -> dict[str, Any]:
        """Encode what is kept and put it together in ``final``; return the manifest."""
        tokenizer = self._tokenizer(folder, judgement, given)
        threads = 1 if self._processes > 1 else None
        encode = Encode(folder, tokenizer.hash(), tokenizer.is_fast, self._settings, threads)
        done, total = 0, sum(meta["bytes"] for meta in self._metas)
        self._progress("encoding", 0, total)
        for number, _ in enumerate(work.spread(encode, range(len(self._metas)), self._processes)):
            done += self._metas[number]["bytes"]
            self._progress("encoding", done, total)
        final = folder / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        shutil.copyfile(folder / store.TOKENIZER, final / store.TOKENIZER)
        dtype = store.token_dtype(tokenizer.vocab_size)
        counts = assemble(folder, final, self._metas, self._sources, dtype, self._progress)
        write_dropped(folder, final, len(self._metas), judgement)
        counts["dropped"] = {
            reason: {"documents": documents, "bytes": size}
            for reason, (documents, size) in sorted(self._dropped.items())
        }
        counts["quantiles"] = quantiles(store.documents_table(final, "train"))
        self._progress("sealing", 0, 1)
        manifest = self._manifest(tokenizer, given, key) | counts
        manifest["vocabulary"] = coverage(store.Tokens(final, manifest))
        manifest = store.seal(final, manifest)
        self._progress("sealing", 1, 1)
        return manifest

    def _tokenizer(self, folder: Path, judgement: Judgement, given: Tokenizer | None) -> Tokenizer:
        """Return the tokenizer, trained on the kept texts with the smallest hashes where none is given."""
        path = folder / store.TOKENIZER
        if work.committed(path) is None:
            tokenizer = given
            if tokenizer is None:
                self._progress("training tokenizer", 0, 1)
                texts = sample(folder, judgement, len(self._metas), SAMPLE_BYTES)
                tokenizer = train(texts, self._settings.vocab_size, self._settings.all_special_tokens)
                self._progress("training tokenizer", 1, 1)
            text = tokenizer.to_json()
            work.commit(path, {}, lambda aside: aside.write_text(text, encoding="utf-8", newline="\n"))
        tokenizer = load(path)
        tokenizer.accelerate(sample(folder, judgement, len(self._metas), _CHECKED_BYTES))
        return tokenizer

    def _manifest(self, tokenizer: Tokenizer, given: Tokenizer | None, key: str) -> dict[str, Any]:
        settings = asdict(self._settings) | {"tokenizer": "given" if given else "trained"}
        if given:
            settings["vocab_size"] = None
        return {
            "source": {
                "name": "+".join(each.name for each in self._sources),
                "description": "; ".join(e.description.encode("utf-8", "replace").decode() for e in self._sources),
                "files": sum(len(each.files) for each in self._sources),
                "fingerprint": key,
            },
            "settings": settings,
            "tokenizer": {
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "hash": tokenizer.hash(),
                "notes": list((given or tokenizer).notes),
            },
            "dtype": store.token_dtype(tokenizer.vocab_size).name,
            "read": {
                "documents": sum(meta["rows"] for meta in self._metas),
                "bytes": sum(meta["read"] for meta in self._metas),
                "bytes_after_cleaning": sum(meta["bytes"] for meta in self._metas),
            },
            "replaced_bytes": self._tally.replaced_bytes,
            "skipped": self._skipped(),
            "damaged": list(self._tally.damaged),
            "converted": dict(sorted(self._tally.converted.items())),
            "removed": dict(sorted(self._tally.removed.items())),
            "repaired": self._tally.repaired,
            "duplicate_ids": self._duplicate_ids,
            "libraries": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                "tokenizers": tokenizers.__version__,
                "encoder": tokenizer.encoder,
                "minhash": minhash.backend_of(self._settings.minhash) if self._settings.dedup == "near" else None,
            },
        }

    def _skipped(self) -> dict[str, int]:
        listed = sum((Counter(one.skipped) for one in self._sources), Counter[str]())
        return dict(sorted((self._tally.skipped + listed).items()))

    def _no_text(self) -> UserError:
        skipped = self._skipped()
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        what = ", ".join(one.description for one in self._sources)
        if any(reason.startswith("no text field") for reason in skipped):
            fields = ", ".join(map(str, self._tally.fields)) or "none"
            return UserError(f"no text in '{what}' ({why}; its fields: {fields}); use --data.text_field NAME")
        return UserError(f"no text in '{what}' ({why or 'it is empty'}); give a file or folder with text in it")


def _committed(folder: Path) -> Iterator[work.Meta]:
    """Yield the descriptions of the cleaned blocks that are whole, up to the first that is not."""
    number = 0
    while (meta := work.committed(clean_path(folder, number))) is not None:
        yield meta
        number += 1


def _named(batch: pa.RecordBatch) -> Iterator[tuple[str, str]]:
    """Yield (source, id) of the documents that have an id."""
    if batch.column("id").null_count < batch.num_rows:
        source = batch.column("source")[0].as_py()
        yield from ((source, name) for name in batch.column("id").drop_null().to_pylist())


def _shifted(progress: Progress, before: int, total: int | None) -> Callable[[int], None]:
    return lambda done: progress("reading and cleaning", before + done, total)


def _already_prepared(given: Sequence[str]) -> Prepared | None:
    """Return the only source where it is a folder of prepared data."""
    prepared = [one for one in given if one != sources.STDLIB and store.is_prepared(Path(one).expanduser())]
    if not prepared:
        return None
    if len(given) > 1:
        raise UserError(f"'{prepared[0]}' is prepared already and cannot go together with others; give its text")
    opened = store.open_tokens(prepared[0])
    return Prepared(opened.dir, opened.manifest, True)


def _reusable(out: Path, fingerprint: str) -> Prepared | None:
    """Return what is at ``out`` if it is whole and made from the same input with the same settings."""
    try:
        opened = store.open_tokens(out)
    except UserError:
        return None
    same = opened.manifest["source"]["fingerprint"] == fingerprint
    return Prepared(opened.dir, opened.manifest, True) if same else None


def _checked(present: Prepared) -> Prepared:
    """Return what is there already if it is as it was written; to replace changed data is for the user to say."""
    store.check(store.Tokens(present.dir, present.manifest), dropped=True)
    return present
