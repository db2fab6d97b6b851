"""Reports on prepared data as a whole: what repeats in it, how its vocabulary fits, how it packs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.feed import pack
from poise.data.store import SPLITS, Tokens, open_tokens, token_dtype
from poise.data.tokens import periodic, vocabulary
from poise.data.tokens.tokenizer import load

_CHUNK: Final = 2**20  # tokens looked at together: more would not stay in a core's cache
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
    return periodic.report(split.repeats, load(tokens.tokenizer_path), split.tokens, ends, seq_len=seq_len)


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
    return vocabulary.health(seen, load(tokens.tokenizer_path), size)


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
    """Return how often each id occurs in both parts, (vocab_size,); of more than ``most`` tokens in so many of them."""
    found = np.zeros(tokens.vocab_size, np.int64)
    dtype = token_dtype(tokens.vocab_size)
    total = sum(facts["tokens"] for facts in tokens.manifest["splits"].values())
    stride = 1 if most is None else max(1, total // most)
    for name in SPLITS:
        with (tokens.dir / f"{name}.bin").open("rb") as file:  # read, not mapped: mapped pages would stay in memory
            while len(some := np.fromfile(file, dtype, _CHUNK)):
                found += np.bincount(some, minlength=tokens.vocab_size)
                file.seek((stride - 1) * _CHUNK * dtype.itemsize, os.SEEK_CUR)
    return found
