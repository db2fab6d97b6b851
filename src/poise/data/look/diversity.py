"""How varied the text of each source is. Reported; no study ties these figures to loss spikes, and none is claimed.

All figures are of a sample: the documents with the smallest content hashes, at most ``SAMPLE_BYTES`` of text a source.
The same documents are taken whatever their order, and samples of equal size can be compared, which figures such as the
share of distinct n-grams need: it falls with the amount of text, so ``words`` is always given beside it.

- ``compression``: bytes over bytes after gzip; higher is more repetitive. C. Shaib et al., "Standardizing the
  measurement of text diversity", 2024 (arXiv 2403.00553), find that it tracks the slow n-gram and self-BLEU scores.
- ``distinct_n``: distinct n-grams over all n-grams of words, as in J. Li et al., "A diversity-promoting objective
  function", NAACL 2016; ``entropy_n``: entropy of the n-grams in bits.
- ``type_token``: mean over windows of 1000 words of the share of different words (mean segmental type-token ratio,
  which, unlike distinct_1, does not depend on the amount of text); null under 1000 words.
- ``duplicate_documents``, ``duplicate_share``: documents (all, not of the sample) whose text occurred before in the
  same source; ``near_duplicate_share``: documents with ``cluster_size`` over 1, null where that is not known.

A word is a run of letters, digits and bytes beyond ASCII, capitals made small (ASCII).
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.clean.flat import Prefix, mixed
from poise.data.look.browse import Texts
from poise.data.store import SPLITS, Split, open_tokens
from poise.data.tokens.tokenizer import Sample
from poise.data.writer import content_hash

SAMPLE_BYTES: Final = 4_000_000
"""Text of one source that is measured, at most."""

NOTE: Final = "reported as facts about the text; no effect on stability is claimed"

_ORDERS: Final = (1, 2, 3, 4)
_WINDOW: Final = 1000
_PRIME: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)
class _Source:
    """What is gathered of one source."""

    sample: Sample
    documents: int = 0
    bytes: int = 0
    clustered: int | None = None
    hashes: list[NDArray[np.void]] = field(default_factory=list)


def report(data: str | Path | Iterable[pa.RecordBatch], *, sample_bytes: int = SAMPLE_BYTES) -> dict[str, Any]:
    """Return the figures of every source, ready for JSON: ``{"note", "sample_bytes", "sources": {name: figures}}``.

    Args:
        data: a folder of prepared data (both splits), or record batches with at least ``text`` and ``source``; rows
            with a ``reason`` are left out.
        sample_bytes: text measured of each source, at most. Memory is some 40 times this, plus 16 bytes a document.

    Raises:
        UserError: no prepared data, or no documents.
    """
    assert sample_bytes > 0, sample_bytes
    named = isinstance(data, (str, Path))
    found = _of_folder(data, sample_bytes) if isinstance(data, (str, Path)) else _of_batches(data, sample_bytes)
    if not found:
        raise UserError(
            f"no documents in '{data}'; there is nothing to report" if named else "no documents to report on"
        )
    sources = {}
    for name, source in found.items():
        hashes = np.concatenate(source.hashes)
        again = len(hashes) - len(np.unique(hashes))
        sources[name] = {
            "documents": source.documents,
            "bytes": source.bytes,
            "duplicate_documents": again,
            "duplicate_share": round(again / source.documents, 6),
            "near_duplicate_share": None if source.clustered is None else round(source.clustered / source.documents, 6),
            **measure(source.sample.texts()),
        }
    return {"note": NOTE, "sample_bytes": sample_bytes, "sources": sources}


def measure(texts: list[str]) -> dict[str, Any]:
    """Return the figures that depend on text alone; n-grams do not cross from one text to the next."""
    data = "\n".join(texts).encode("utf-8", "replace")
    words, of_text = _words([text.encode("utf-8", "replace") for text in texts])
    figures: dict[str, Any] = {
        "sampled_documents": len(texts),
        "sampled_bytes": len(data),
        "words": len(words),
        "compression": round(len(data) / len(gzip.compress(data, 6, mtime=0)), 4) if data else None,
        "type_token": _segmental(words),
    }
    grams = words
    for order in _ORDERS:
        if order > 1:
            # The hash of n words from that of n - 1 and one more; wraps round modulo 2**64.
            grams = mixed(grams[:-1] * _PRIME + words[order - 1 :])
        inside = (
            of_text[order - 1 :] == of_text[: len(of_text) - order + 1] if len(words) >= order else np.zeros(0, bool)
        )
        counts = np.unique(grams[inside], return_counts=True)[1]
        total = int(counts.sum())
        shares = counts / max(1, total)
        figures[f"distinct_{order}"] = round(len(counts) / total, 4) if total else None
        figures[f"entropy_{order}"] = round(float(-(shares * np.log2(shares)).sum()) + 0.0, 4) if total else None
    return figures


def lines(facts: dict[str, Any]) -> list[str]:
    """Return a report as lines of text, one source a line under a head."""
    shown = ("documents", "words", "compression", "type_token", "distinct_2", "entropy_2", "duplicate_share")
    rows = [("source", *shown)]
    for name, figures in facts["sources"].items():
        values = (figures[key] for key in shown)
        rows.append((name, *("-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for v in values)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return [*table, facts["note"]]


def _of_folder(folder: str | Path, sample_bytes: int) -> dict[str, _Source]:
    """Gather from prepared data; only documents that end up in a sample are decoded."""
    tokens = open_tokens(folder)
    splits = [tokens.split(name) for name in SPLITS]
    texts = Texts(tokens)
    rows: dict[str, list[tuple[bytes, int, int]]] = {}
    found: dict[str, _Source] = {}
    for side, split in enumerate(splits):
        for name, first, last in _spans(split):
            source = found.setdefault(name, _Source(Sample(sample_bytes)))
            part = split.table.slice(first, last - first)
            sizes = part["bytes"].to_numpy()
            source.documents += last - first
            source.bytes += int(sizes.sum())
            if "cluster_size" in part.schema.names and part["cluster_size"].null_count < last - first:
                alone = np.asarray(part["cluster_size"].fill_null(1).to_numpy()) <= 1
                source.clustered = (source.clustered or 0) + int((~alone).sum())
            hashes = np.frombuffer(b"".join(part["content_hash"].to_pylist()), "V16")
            source.hashes.append(hashes)
            order = np.argsort(hashes, kind="stable")
            enough = int(np.searchsorted(np.cumsum(np.minimum(sizes[order], sample_bytes // 4)), sample_bytes)) + 1
            rows.setdefault(name, []).extend((hashes[i].tobytes(), side, first + int(i)) for i in order[:enough])
    for name, candidates in rows.items():
        for digest, side, number in sorted(candidates):
            found[name].sample.offer(int.from_bytes(digest, "big"), texts.of(splits[side], number))
    return found


def _spans(split: Split) -> Iterator[tuple[str, int, int]]:
    """Yield (source, first document, last + 1) of the spans in which ``source`` does not change."""
    if split.table.num_rows == 0:
        return
    column = split.table["source"].combine_chunks().dictionary_encode()
    codes = np.asarray(column.indices)
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    for first, last in itertools.pairwise(edges):
        yield column.dictionary[int(codes[first])].as_py(), first, last


def _of_batches(batches: Iterable[pa.RecordBatch], sample_bytes: int) -> dict[str, _Source]:
    found: dict[str, _Source] = {}
    for batch in batches:
        names = batch.schema.names
        reasons = batch.column("reason").to_pylist() if "reason" in names else [None] * batch.num_rows
        sizes = batch.column("cluster_size").to_pylist() if "cluster_size" in names else [None] * batch.num_rows
        columns = (batch.column("text").to_pylist(), batch.column("source").to_pylist(), reasons, sizes)
        for text, name, reason, cluster in zip(*columns, strict=True):
            if reason is not None:
                continue
            source = found.setdefault(name, _Source(Sample(sample_bytes)))
            digest = content_hash(text)
            source.sample.offer(int.from_bytes(digest, "big"), text)
            source.documents += 1
            source.bytes += len(text.encode())
            source.hashes.append(np.frombuffer(digest, "V16"))
            if cluster is not None:
                source.clustered = (source.clustered or 0) + int(cluster > 1)
    return found


def _words(texts: list[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return a 64-bit hash of every word, (W,), and the text it is in, (W,)."""
    flat = np.frombuffer(b"\n".join(texts) + b"\n", np.uint8)
    ends_of_text = np.cumsum([len(text) + 1 for text in texts]) if texts else np.zeros(0, np.int64)
    lower = _LOWER[flat]
    inside = np.concatenate([[False], lower != 0, [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    return Prefix(lower).hashes(starts, ends), np.searchsorted(ends_of_text, starts, side="right")


def _segmental(words: NDArray[np.uint64]) -> float | None:
    """Return the mean share of different words in windows of 1000."""
    windows = len(words) // _WINDOW
    if windows == 0:
        return None
    ordered = np.sort(words[: windows * _WINDOW].reshape(windows, _WINDOW), axis=1)
    different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return round(float(different.mean()) / _WINDOW, 4)


def _lower_table() -> NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    table[128:] = np.arange(128, 256)
    table[48:58] = np.arange(48, 58)
    table[65:91] = table[97:123] = np.arange(97, 123)
    return table


_LOWER: Final = _lower_table()
