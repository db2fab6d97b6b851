"""From a source of text to prepared data: train or load a tokenizer, split, encode, write, seal.

The source is read twice when a vocabulary is trained (once for a sample), else once. Two runs over the same
input write the same bytes; a second run over an unchanged input into the same folder does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import tokenizers

from poise.core.errors import UserError
from poise.core.rng import derive
from poise.data import sources, store
from poise.data.readers import Document, Tally
from poise.data.sources import Source
from poise.data.tokenizer import MIN_VOCAB, SAMPLE_BYTES, Sample, Tokenizer, load, train
from poise.data.writer import SplitWriter, content_hash, row_of

Progress = Callable[[str, int, int | None], None]
"""Called with (stage, done, total): bytes of the source's files, or steps; total is None if unknown."""

_SAMPLED_FROM: Final = 2**30  # bytes of the source the tokenizer's sample is taken from
_BATCH_CHARS: Final = 2**20  # text encoded at once: enough for all cores, little enough for memory
_BATCH_DOCUMENTS: Final = 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the contents of prepared data, besides the source.

    Attributes:
        vocab_size: ids of the trained vocabulary, the end of text included; unused with ``tokenizer``.
        tokenizer: path of a ``tokenizer.json`` to use instead of training one.
        val_fraction: share of the documents held out, 0 to 0.5; they are chosen by their content.
        seed: chooses which documents are held out.
        text_field: the field or column of JSON lines and Parquet that holds the text.
    """

    vocab_size: int = 8192
    tokenizer: str | None = None
    val_fraction: float = 0.01
    seed: int = 0
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB:
            raise UserError(f"vocab_size is {self.vocab_size}; a byte-level vocabulary needs at least {MIN_VOCAB} ids")
        if self.vocab_size > 2**31 - 1:
            raise UserError(f"vocab_size is {self.vocab_size}; at most 2**31 - 1 ids have a place in the files")
        if not 0.0 <= self.val_fraction <= 0.5:
            raise UserError(f"val_fraction is {self.val_fraction}; give a share from 0 to 0.5, e.g. 0.01")
        if not self.text_field:
            raise UserError("text_field is empty; give the name of the field that holds the text, e.g. text")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Prepared data.

    Attributes:
        dir: the folder.
        manifest: contents of its ``manifest.json``.
        reused: true if it was there already and nothing was done.
    """

    dir: Path
    manifest: Mapping[str, Any]
    reused: bool


def prepare(
    source: str,
    out: Path | None = None,
    *,
    vocab_size: int = 8192,
    tokenizer: str | None = None,
    val_fraction: float = 0.01,
    seed: int = 0,
    text_field: str = "text",
    progress: Progress | None = None,
) -> Prepared:
    """Turn ``source`` into prepared data at ``out``; other arguments as in ``Settings``.

    Without ``out`` the place is ``default_dir``, so that the same text with the same settings is prepared
    once. A source that is itself a folder of prepared data is opened and ``out`` is not used. The held-out
    part has at least one document if there are two different ones; a source with a single text has no
    held-out part. Equal texts are always on the same side.

    Raises:
        UserError: no such source, no text in it, too little text for the vocabulary, a bad tokenizer, a
            damaged file, or a place that cannot be written to or is full.
    """
    settings = Settings(vocab_size, tokenizer, val_fraction, seed, text_field)
    if source != sources.STDLIB and store.is_prepared(Path(source).expanduser()):
        opened = store.open_tokens(source)
        return Prepared(opened.dir, opened.manifest, True)
    out = default_dir(source, settings) if out is None else Path(out).expanduser().absolute()
    found = sources.resolve(source)
    given = load(tokenizer) if tokenizer is not None else None
    key = _fingerprint(found, settings, given)
    if (present := _reusable(out, key)) is not None:
        return present
    store.refuse_foreign(out)
    with store.staged(out) as folder:
        manifest = _Preparation(found, settings, folder, progress or (lambda *_: None)).run(given, key)
    return Prepared(out, manifest, False)


def default_dir(source: str, settings: Settings) -> Path:
    """Return where a source's prepared data goes when no folder is given.

    ``$POISE_CACHE/data/<name>-<hash>``, or ``~/.cache/poise/data/...``; the hash is of the source's listing
    and the settings. Prepared data as a source is its own place.

    Raises:
        UserError: there is no such source or tokenizer, or no home folder.
    """
    if source != sources.STDLIB and store.is_prepared(Path(source).expanduser()):
        return Path(source).expanduser().absolute()
    found = sources.resolve(source)
    given = load(settings.tokenizer) if settings.tokenizer is not None else None
    place = f"{found.description}\n{_fingerprint(found, settings, given)}".encode("utf-8", "replace")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", found.name).strip("-.")[:40] or "data"
    return _cache() / "data" / f"{name}-{hashlib.blake2b(place, digest_size=6).hexdigest()}"


class _Preparation:
    """One pass from text to a sealed folder."""

    def __init__(self, source: Source, settings: Settings, folder: Path, progress: Progress) -> None:
        self._source, self._settings, self._folder, self._progress = source, settings, folder, progress
        # For each side the texts with the smallest and the largest key: candidates for moving.
        self._ends: dict[str, tuple[tuple[int, bytes], tuple[int, bytes]]] = {}

    def run(self, given: Tokenizer | None, fingerprint: str) -> dict[str, Any]:
        tokenizer = given or self._train()
        (self._folder / store.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8", newline="\n")
        tally = Tally(on_read=lambda done: self._progress("encoding", done, self._source.size))
        splits = self._encode(tokenizer, tally)
        settings = asdict(self._settings) | {"tokenizer": "given" if given else "trained"}
        if given:
            settings["vocab_size"] = None
        self._progress("sealing", 0, 1)
        manifest = store.seal(
            self._folder,
            {
                "source": {
                    "name": self._source.name,
                    "description": self._source.description.encode("utf-8", "replace").decode(),
                    "files": len(self._source.files),
                    "fingerprint": fingerprint,
                },
                "settings": settings,
                "tokenizer": {
                    "vocab_size": tokenizer.vocab_size,
                    "end_of_text": tokenizer.end_of_text,
                    "hash": tokenizer.hash(),
                },
                "dtype": store.token_dtype(tokenizer.vocab_size).name,
                "splits": {
                    name: {"documents": w.documents, "tokens": w.tokens, "bytes": w.bytes} for name, w in splits.items()
                },
                "replaced_bytes": sum(w.replaced_bytes for w in splits.values()),
                "skipped": self._skipped(tally),
                "libraries": {
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "pyarrow": pa.__version__,
                    "tokenizers": tokenizers.__version__,
                },
            },
        )
        self._progress("sealing", 1, 1)
        return manifest

    def _train(self) -> Tokenizer:
        """Train a vocabulary on a sample of the first gigabyte of text."""
        total = self._source.size
        limit = None if total is None else min(total, _SAMPLED_FROM)
        tally = Tally(on_read=lambda done: self._progress("sampling", min(done, limit or done), limit))
        sample, read = Sample(SAMPLE_BYTES), 0
        for document in sources.documents(self._source, self._settings.text_field, tally):
            sample.offer(int.from_bytes(content_hash(document.text), "big"), document.text)
            read += len(document.text)
            if read >= _SAMPLED_FROM:
                break
        if not read:
            raise self._no_text(tally)
        self._progress("training tokenizer", 0, 1)
        tokenizer = train(sample.texts(), self._settings.vocab_size)
        self._progress("training tokenizer", 1, 1)
        return tokenizer

    def _encode(self, tokenizer: Tokenizer, tally: Tally) -> dict[str, SplitWriter]:
        """Write every document to its side."""
        dtype = store.token_dtype(tokenizer.vocab_size)
        writers = {name: SplitWriter(self._folder, name, dtype) for name in store.SPLITS}
        end = np.array([tokenizer.end_of_text], np.uint32)
        try:
            for batch in _batches(sources.documents(self._source, self._settings.text_field, tally)):
                for document, ids in zip(batch, tokenizer.encode([d.text for d in batch]), strict=True):
                    digest = content_hash(document.text)
                    side = writers[self._side(digest)]
                    side.add(np.concatenate([ids, end]), row_of(document, digest))
            for writer in writers.values():
                writer.close()
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        if not any(writer.documents for writer in writers.values()):
            raise self._no_text(tally)
        moved = self._to_move({name: writer.documents for name, writer in writers.items()})
        return writers if moved is None else self._move(*moved, dtype)

    def _side(self, digest: bytes) -> str:
        """Return the side of a text: a pure function of the text and the seed."""
        key = derive(self._settings.seed, "held-out", digest.hex())
        side = "val" if key < self._settings.val_fraction * 2**63 else "train"
        mark = (key, digest)
        low, high = self._ends.get(side, (mark, mark))
        self._ends[side] = (min(low, mark), max(high, mark))
        return side

    def _to_move(self, counts: Mapping[str, int]) -> tuple[str, bytes] | None:
        """Return (side it leaves, content hash) of the text that must move because a side has none."""
        if not counts["train"]:
            return "val", self._ends["val"][1][1]
        if not counts["val"] and self._settings.val_fraction > 0:
            low, high = self._ends["train"]
            return ("train", low[1]) if low != high else None
        return None

    def _move(self, side: str, digest: bytes, dtype: np.dtype[np.unsignedinteger]) -> dict[str, SplitWriter]:
        """Write both sides anew with one text on the other side; only ever done when that side is empty."""
        again = self._folder / "again"
        again.mkdir()
        other = "train" if side == "val" else "val"
        writers = {name: SplitWriter(again, name, dtype) for name in store.SPLITS}
        ids = np.memmap(self._folder / f"{side}.bin", dtype, "r")
        with pa.memory_map(str(self._folder / f"{side}.docs.arrow")) as file:
            for batch in pa.ipc.open_file(file).read_all().to_batches():
                for row in batch.to_pylist():
                    span = ids[row["token_start"] : row["token_start"] + row["token_length"]]
                    writers[other if row["content_hash"] == digest else side].add(span, row)
        for writer in writers.values():
            writer.close()
        del ids
        for path in sorted(again.iterdir()):
            path.replace(self._folder / path.name)
        again.rmdir()
        return writers

    def _skipped(self, tally: Tally) -> dict[str, int]:
        return dict(sorted((tally.skipped + type(tally.skipped)(self._source.skipped)).items()))

    def _no_text(self, tally: Tally) -> UserError:
        skipped = self._skipped(tally)
        why = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        what = self._source.description
        if any(reason.startswith("no text field") for reason in skipped):
            fields = ", ".join(map(str, tally.fields)) or "none"
            return UserError(f"no text in '{what}' ({why}; its fields: {fields}); use --data.text_field NAME")
        return UserError(f"no text in '{what}' ({why or 'it is empty'}); give a file or folder with text in it")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _fingerprint(source: Source, settings: Settings, given: Tokenizer | None) -> str:
    """Return a hash of everything the result depends on."""
    facts = asdict(settings) | {"source": source.fingerprint(), "version": store.VERSION}
    if given is not None:
        facts |= {"tokenizer": given.hash(), "vocab_size": None}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _reusable(out: Path, fingerprint: str) -> Prepared | None:
    """Return what is at ``out`` if it is whole and made from the same input with the same settings."""
    try:
        opened = store.open_tokens(out)
    except UserError:
        return None
    same = opened.manifest["source"]["fingerprint"] == fingerprint
    return Prepared(opened.dir, opened.manifest, True) if same else None


def _cache() -> Path:
    if place := os.environ.get("POISE_CACHE"):
        return Path(place).expanduser().absolute()
    try:
        return Path.home() / ".cache" / "poise"
    except RuntimeError:
        raise UserError("there is no home folder for the cache; give --data.dir PATH or set POISE_CACHE") from None
