"""Prepared data out of foreign token documents: the part of an import that all formats share.

The ids stay as they are. What the files of others do not hold is made up for: a document that does not end with the
end of text gets one (counted), the hash and the size of its text come from decoding, repeated n-grams are looked for,
and part of the documents is held out by content. Where provenance lies beside the tokens, it is taken over.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import tokenizers
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data import judge, record, staging, store
from poise.data.exchange.incoming import REQUIRED, Import, Incoming, Reading, split
from poise.data.exchange.meaning import Vocabulary, vocabulary_of
from poise.data.exchange.outgoing import PROVENANCE, Progress
from poise.data.look.health import coverage
from poise.data.tokens import periodic
from poise.data.writer import SplitWriter, content_hash

_BLOCK_TOKENS: Final = 2**21
_BLOCK_DOCUMENTS: Final = 4096
_OWN: Final = ("token_start", "token_length", "repeat_count", "repeat_tokens")


def build(
    kind: str,
    source: str | Path,
    readings: Sequence[Reading],
    out: Path,
    how: Import,
    progress: Progress | None = None,
    skipped: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Write prepared data at ``out`` from what ``readings`` yield; return the manifest.

    Raises:
        UserError: a file is damaged, no or a wrong vocabulary, ids outside it, no documents, or a full disk.
    """
    out = out.expanduser().absolute()
    staging.refuse_foreign(out)
    vocabulary = vocabulary_of(Path(source).expanduser(), readings, how)
    name = how.name or Path(source).expanduser().absolute().name.partition(".")[0] or "tokens"
    with staging.staged(out) as folder:
        (folder / store.TOKENIZER).write_text(vocabulary.inner.to_json(), encoding="utf-8", newline="\n")
        building = _Building(vocabulary, how, name, folder, progress)
        building.skipped.update(skipped or {})
        building.run(readings)
        manifest = building.manifest(kind, str(source), len(readings))
        manifest["vocabulary"] = coverage(store.Tokens(folder, manifest))
        return store.seal(folder, manifest)


@dataclass
class _Building:
    """An import under way."""

    vocabulary: Vocabulary
    how: Import
    name: str
    folder: Path
    progress: Progress | None
    skipped: Counter[str] = field(default_factory=Counter)
    read: int = 0
    ends_added: int = 0
    ends_inside: int = 0

    def __post_init__(self) -> None:
        self._dtype = store.token_dtype(self.vocabulary.inner.vocab_size)
        self.writers = {name: SplitWriter(self.folder, name, self._dtype) for name in store.SPLITS}
        # For each side [source, documents, tokens, bytes] in the order of the files.
        self._spans: dict[str, list[list[Any]]] = {name: [] for name in store.SPLITS}

    def run(self, readings: Sequence[Reading]) -> None:
        """Write all documents."""
        own = any(reading.side() == "val" for reading in readings)
        first = True
        try:
            for reading in readings:
                for block, rows in self._blocks(reading):
                    side = reading.side() or "train"
                    self._write(block, rows, side if own else None, first)
                    first = False
                    if self.progress is not None:
                        self.progress("importing", sum(w.tokens for w in self.writers.values()), None)
            for writer in self.writers.values():
                writer.close()
        except BaseException:
            for writer in self.writers.values():
                writer.abandon()
            raise
        if not any(writer.documents for writer in self.writers.values()):
            raise UserError(f"no documents in '{readings[0].path}'; the files hold no tokens")

    def _blocks(self, reading: Reading) -> Iterator[tuple[list[Incoming], Any]]:
        """Yield documents some at a time, with the rows of their provenance if there are any."""
        end = self.vocabulary.inner.end_of_text
        known, at = reading.known(), 0
        documents: Iterable[Incoming] = reading.documents(end)
        if self.how.split and known is None:
            documents = (part for document in documents for part in split(document, end))
        for block in record.grouped(documents, lambda one: len(one.ids), _BLOCK_TOKENS, _BLOCK_DOCUMENTS):
            self.read += len(block)
            if known is None:
                whole = [d for d in block if len(d.ids) and (len(d.ids) > 1 or int(d.ids[0]) != end)]
                if len(whole) < len(block):
                    self.skipped["empty document"] += len(block) - len(whole)
                if whole:
                    yield whole, None
                continue
            rows, lengths = known.rows(at, len(block)), [len(d.ids) for d in block]
            at += len(block)
            said = rows["token_length"].to_pylist() if "token_length" in rows.column_names else lengths
            if rows.num_rows != len(block) or said != lengths:
                raise _other(reading)
            yield block, rows
        if known is not None and at != known.total:
            raise _other(reading)

    def _write(self, block: list[Incoming], known: Any, side: str | None, first: bool) -> None:
        """Write a block to its side, or to both by content."""
        end = np.array([self.vocabulary.inner.end_of_text], self._dtype)
        ids = [self._checked(d) for d in block]
        open_ended = [i for i, document in enumerate(ids) if document[-1] != end[0]]
        for i in open_ended:
            ids[i] = np.concatenate([ids[i], end])
        self.ends_added += len(open_ended)
        rows = self._facts(block, ids) if known is None else _provenance(known)
        hashes = np.frombuffer(b"".join(rows.column("content_hash").to_pylist()), "<u8").reshape(-1, 2)
        held_out = np.full(len(block), side == "val") if side else self._held_out(hashes, first, len(block))
        for name, chosen in (("train", np.flatnonzero(~held_out)), ("val", np.flatnonzero(held_out))):
            if len(chosen):
                some = rows if len(chosen) == len(block) else rows.take(pa.array(chosen))
                self._add(name, [ids[i] for i in chosen.tolist()], some)

    def _checked(self, document: Incoming) -> NDArray[np.unsignedinteger]:
        """Return a document's ids in the type of the files."""
        ids, size = document.ids, self.vocabulary.inner.vocab_size
        if int(ids.max()) >= size or int(ids.min()) < 0:
            wrong = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
            raise UserError(f"'{document.origin}' has id {wrong}, the vocabulary {size} ids; give its own tokenizer")
        return ids.astype(self._dtype)

    def _facts(self, block: list[Incoming], ids: list[NDArray[np.unsignedinteger]]) -> pa.RecordBatch:
        """Return what can be known of documents that came without provenance."""
        hashes: list[bytes] = []
        sizes: list[int] = []
        for document in ids:
            if self.vocabulary.stand_in:
                hashes.append(hashlib.blake2b(document[:-1].astype("<u4").data, digest_size=16).digest())
                sizes.append(0)
            else:
                text = self.vocabulary.inner.decode(document[:-1].tolist())
                hashes.append(content_hash(text))
                sizes.append(len(text.encode()))
        count = len(block)
        columns = {
            "content_hash": pa.array(hashes, pa.binary(16)),
            "source": pa.array([self.name] * count, pa.string()),
            "origin": pa.array([d.origin.encode("utf-8", "replace").decode() for d in block], pa.string()),
            "offset": pa.array([d.offset for d in block], pa.int64()),
            "bytes": pa.array(sizes, pa.int64()),
            "replaced_bytes": pa.array([0] * count, pa.int64()),
            "id": pa.array([d.id for d in block], pa.string()),
            "cluster_size": pa.array([1] * count, pa.int32()),
        }
        return pa.RecordBatch.from_pydict(columns)

    def _held_out(self, hashes: NDArray[np.uint64], first: bool, count: int) -> NDArray[np.bool_]:
        """Return which documents are held out: a pure function of content and seed, as where text is prepared.

        Only the first block may differ: where it has all documents of a small import, one text moves to an empty side.
        """
        fraction = self.how.val_fraction
        key, chosen = judge.held_out(hashes, fraction, self.how.seed)
        if first and chosen.all():
            chosen &= key != key.max()
        elif first and fraction > 0 and not chosen.any() and count < _BLOCK_DOCUMENTS and key.min() != key.max():
            chosen |= key == key.min()
        return np.asarray(chosen)

    def _add(self, name: str, ids: list[NDArray[np.unsignedinteger]], rows: pa.RecordBatch) -> None:
        lengths = np.array([len(document) for document in ids])
        flat, ends = np.concatenate(ids), np.cumsum(lengths)
        self.ends_inside += int((flat == self.vocabulary.inner.end_of_text).sum()) - len(ids)
        repeats = periodic.find(flat, ends, blank_ids=None if self.vocabulary.stand_in else self._blank())
        count, inside = periodic.per_document(repeats, ends, ~repeats["blank"])
        for column, values in (
            ("token_length", lengths.astype(np.int32)),
            ("repeat_count", count),
            ("repeat_tokens", inside),
        ):
            rows = rows.append_column(column, pa.array(values))
        self._note(name, rows, lengths)
        self.writers[name].add_block(flat, rows, repeats)

    def _blank(self) -> NDArray[np.integer]:
        blank: NDArray[np.integer] = self.vocabulary.inner.blank_ids
        return blank

    def _note(self, name: str, rows: pa.RecordBatch, lengths: NDArray[np.int64]) -> None:
        """Extend the list of what stands where by the sources of some rows."""
        spans, at, sizes = self._spans[name], 0, np.asarray(rows.column("bytes"))
        runs = pa.compute.run_end_encode(rows.column("source"))
        for source, stop in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
            if not spans or spans[-1][0] != source:
                spans.append([source, 0, 0, 0])
            spans[-1][1] += stop - at
            spans[-1][2] += int(lengths[at:stop].sum())
            spans[-1][3] += int(sizes[at:stop].sum())
            at = stop

    def _sources(self, description: str, files: int) -> list[dict[str, Any]]:
        """Return the manifest's list of sources; one for all where a name would stand in two places."""
        names = list(dict.fromkeys(span[0] for name in store.SPLITS for span in self._spans[name]))
        order = [[names.index(span[0]) for span in self._spans[name]] for name in store.SPLITS]
        if any(places != sorted(set(places)) for places in order):
            names = [self.name]
            self._spans = {name: [[self.name, w.documents, w.tokens, w.bytes]] for name, w in self.writers.items()}
        found = []
        for source in names:
            splits = {}
            for name, spans in self._spans.items():
                counts = next((span[1:] for span in spans if span[0] == source), [0, 0, 0])
                splits[name] = dict(zip(("documents", "tokens", "bytes"), counts, strict=True))
            found.append({"name": source, "description": description, "files": files, "splits": splits})
        return found

    def manifest(self, kind: str, source: str, files: int) -> dict[str, Any]:
        """Return what the manifest says, the hashes of the files aside."""
        inner, stand_in = self.vocabulary.inner, self.vocabulary.stand_in
        description = f"{kind}:{source}".encode("utf-8", "replace").decode()
        splits = {name: dict(writer.counts()) for name, writer in self.writers.items()}
        key = hashlib.blake2b(f"{description}\0{self.how}".encode("utf-8", "replace"), digest_size=16).hexdigest()
        return {
            "source": {"name": self.name, "description": description, "files": files, "fingerprint": key},
            "settings": {"import": kind, **asdict(self.how), "tokenizer": "numbers" if stand_in else "given"},
            "tokenizer": {"vocab_size": inner.vocab_size, "end_of_text": inner.end_of_text, "hash": inner.hash()},
            "dtype": self._dtype.name,
            "read": {"documents": self.read, "bytes": sum(w.bytes for w in self.writers.values())},
            "splits": splits,
            "sources": self._sources(description, files),
            "ends_added": self.ends_added,
            "ends_inside": self.ends_inside,
            "dropped": {},
            "replaced_bytes": sum(w.replaced_bytes for w in self.writers.values()),
            "skipped": dict(sorted(self.skipped.items())),
            "damaged": [],
            "libraries": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "pyarrow": pa.__version__,
                "tokenizers": tokenizers.__version__,
            },
        }


def _other(reading: Reading) -> UserError:
    what = f"the provenance beside it (*{PROVENANCE}) is of other tokens"
    return UserError(f"'{reading.path}': {what}; remove the provenance to import without it")


def _provenance(known: Any) -> pa.RecordBatch:
    """Return the rows of a document table without what is counted anew and without columns of another version."""
    missing = [name for name in REQUIRED if name not in known.schema.names]
    if missing:
        raise UserError(f"the provenance beside the tokens has no {', '.join(missing)}; remove it to import without")
    columns = {}
    for want in store.DOCUMENT_SCHEMA:
        if want.name in known.schema.names and want.name not in _OWN:
            try:
                columns[want.name] = known[want.name].cast(want.type).combine_chunks()
            except pa.ArrowException:  # e.g. scores of another version; they are of no use here
                if not want.nullable:
                    raise UserError(f"the provenance column {want.name} has another type; remove the file") from None
    flat = {k: v.chunk(0) if isinstance(v, pa.ChunkedArray) else v for k, v in columns.items()}
    return pa.RecordBatch.from_pydict(flat)
