"""Reports on prepared data as a whole: what repeats in it, how its vocabulary fits, how it packs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.feed import pack
from poise.data.store import SPLITS, Split, Tokens, check_ids, damaged, open_tokens, token_dtype
from poise.data.tokens import periodic, vocabulary
from poise.data.tokens.tokenizer import Tokenizer, load

_CHUNK: Final = 2**20  # tokens looked at together: more would not stay in a core's cache
_ROWS: Final = 2**16  # repeats looked at together
ENOUGH: Final = 2**26
"""Tokens that tell how a vocabulary fits: of more, evenly spread chunks are looked at."""


def repeats(folder: str | Path, *, seq_len: int | None = None) -> dict[str, Any]:
    """Return what repeats in the training part: ``periodic.report``.

    Raises:
        UserError: the folder holds no prepared data, or it is damaged.
    """
    tokens = open_tokens(folder)
    split = tokens.split("train")
    ends = np.cumsum(np.asarray(split.index.lengths), dtype=np.int64)
    _check_repeats(tokens, split)
    return periodic.report(split.repeats, tokenizer_of(tokens), split.tokens, ends, seq_len=seq_len)


def vocabulary_of(folder: str | Path, most: int | None = None) -> dict[str, Any]:
    """Return how the vocabulary fits: ``vocabulary.health`` of both parts.

    Args:
        folder: prepared data.
        most: tokens that are looked at, in evenly spread chunks; None reads every token once.

    Raises:
        UserError: the folder holds no prepared data, or it is damaged.
    """
    tokens = open_tokens(folder)
    seen = counts(tokens, most)
    facts = tokens.manifest["splits"].values()
    share = int(seen.sum()) / max(1, sum(each["tokens"] for each in facts))
    size = round(share * sum(each["bytes"] for each in facts))
    return vocabulary.health(seen, tokenizer_of(tokens), size)


def packing(folder: str | Path, seq_len: int) -> dict[str, Any]:
    """Return what each way of packing does to the documents of the training part in sequences of ``seq_len``.

    ``truncated`` is the share of the documents that would fit into a sequence and are cut all the same, ``fill`` the
    share of the sequences' tokens that is not padding.

    Raises:
        UserError: the folder holds no prepared data, or ``seq_len`` is not positive.
    """
    if seq_len < 1:
        raise UserError(f"the sequence length is {seq_len}; give a positive number, e.g. 2048")
    lengths = np.asarray(open_tokens(folder).split("train").index.lengths)
    best = pack.best_fit(lengths, seq_len)
    tokens = int(lengths.sum(dtype=np.int64))
    return {
        "seq_len": seq_len,
        "documents": len(lengths),
        "concat": {
            "sequences": max(0, (tokens - 1) // seq_len),
            "truncated": round(pack.concat_truncation(lengths, seq_len), 6),
            "fill": 1.0,
        },
        "best_fit": {"sequences": best.rows, "truncated": round(best.truncated, 6), "fill": round(best.fill, 6)},
    }


def warnings(folder: str | Path) -> list[str]:
    """Return in words what a user should know about repeats and vocabulary before training on this."""
    notes = open_tokens(folder).manifest["tokenizer"].get("notes", [])
    return [*notes, *repeats(folder)["warnings"], *vocabulary_of(folder, ENOUGH)["warnings"]]


def counts(tokens: Tokens, most: int | None = None) -> NDArray[np.int64]:
    """Return how often each id occurs in both parts, (vocab_size,); of more than ``most`` tokens in so many of them.

    Raises:
        UserError: an id is outside the vocabulary: the file has changed.
    """
    found = np.zeros(tokens.vocab_size, np.int64)
    dtype = token_dtype(tokens.vocab_size)
    total = sum(facts["tokens"] for facts in tokens.manifest["splits"].values())
    stride = 1 if most is None else max(1, total // most)
    for name in SPLITS:
        with (tokens.dir / f"{name}.bin").open("rb") as file:  # read, not mapped: mapped pages would stay in memory
            while len(some := np.fromfile(file, dtype, _CHUNK)):
                check_ids(tokens, name, some)
                found += np.bincount(some, minlength=tokens.vocab_size)
                file.seek((stride - 1) * _CHUNK * dtype.itemsize, os.SEEK_CUR)
    return found


def coverage(tokens: Tokens, most: int | None = ENOUGH) -> dict[str, int]:
    """Return how many ids are hardly seen, as the manifest holds it under ``vocabulary``; ``most`` as in ``counts``."""
    seen = counts(tokens, most)
    return {
        "tokens_counted": int(seen.sum()),
        "never": int((seen == 0).sum()),
        "under_10": int((seen < 10).sum()),
    }


def tokenizer_of(tokens: Tokens) -> Tokenizer:
    """Load the tokenizer of prepared data.

    Raises:
        UserError: it is no tokenizer, or has another number of ids than the manifest says.
    """
    tokenizer = load(tokens.tokenizer_path)
    if tokenizer.vocab_size != tokens.vocab_size:
        said = f"{tokenizer.vocab_size:,} ids, the manifest says {tokens.vocab_size:,}"
        raise damaged(tokens.dir, f"{tokens.tokenizer_path.name} has {said}")
    return tokenizer


def _check_repeats(tokens: Tokens, split: Split) -> None:
    """Raise a ``UserError`` where repeats, or the tokens of their n-grams, cannot be."""
    for at in range(0, len(split.repeats), _ROWS):
        some = split.repeats[at : at + _ROWS]
        start, length, period = (some[name].astype(np.int64) for name in ("start", "length", "period"))
        inside = (start >= 0) & (length >= period) & (start + length <= len(split.tokens))
        if not (inside & (period >= 1) & (period <= periodic.MAX_PERIOD)).all():
            raise damaged(tokens.dir, f"{split.name}.repeats.bin has a span that cannot be")
        offset = np.minimum(np.arange(periodic.MAX_PERIOD), period[:, None] - 1)
        check_ids(tokens, split.name, split.tokens[(start[:, None] + offset).ravel()])
