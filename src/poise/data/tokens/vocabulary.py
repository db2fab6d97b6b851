"""How well a vocabulary fits a corpus: ids that are hardly ever seen, and bytes a token carries.

An id that is seen a few times keeps an embedding near where it began, and the gradients of the others push it along.
Sources: S. Land, M. Bartolo, "Fishing for Magikarp: automatically detecting under-trained tokens in large language
models", 2024 (arXiv 2405.05417); S. Yu et al., "Rare tokens degenerate all tokens", 2022 (arXiv 2109.03127).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poise.data.tokens.tokenizer import Tokenizer

RARE: Final = 10
"""An id seen fewer times than this is called rare."""

_TOP: Final = 20  # tokens listed
_RARE_SHARE: Final = 0.25  # share of rare ids from which to warn
_TOP_SHARE: Final = 0.1  # share of all tokens one id may have
_FEW_BYTES: Final = 2.5  # bytes a token below which the vocabulary does not fit the text


def count(ids: NDArray[np.unsignedinteger], vocab_size: int) -> NDArray[np.int64]:
    """Return how often each id occurs, (vocab_size,); counts of blocks add up to those of a corpus."""
    return np.bincount(ids, minlength=vocab_size).astype(np.int64)


def health(counts: NDArray[np.int64], tokenizer: Tokenizer, n_bytes: int, rare: int = RARE) -> dict[str, Any]:
    """Return how well a vocabulary fits a corpus.

    Args:
        counts: (vocab_size,) how often each id occurs in the tokens trained on.
        tokenizer: whose vocabulary it is.
        n_bytes: UTF-8 bytes of the corpus.
        rare: an id seen fewer times is rare.

    Returns:
        ``ids``: numbers that stand for some text; ``never``, ``rare``: how many of them are seen never, and fewer than
        ``rare`` times (the former included); ``no_token``: numbers that stand for no text (gaps, special tokens);
        ``tokens``; ``bytes_per_token``; ``used_for_half``: the fewest ids that make half of all tokens;
        ``top``: the most frequent ids with their text, count, share of tokens and share of the text's bytes;
        ``warnings``: in words, for a user.
    """
    assert counts.shape == (tokenizer.vocab_size,), (counts.shape, tokenizer.vocab_size)
    sizes = np.array([len(piece) for piece in tokenizer.pieces], np.int64)
    stands = sizes > 0
    seen = counts[stands]
    tokens = int(counts.sum())
    text_tokens = int(seen.sum())
    order = np.argsort(-np.where(stands, counts, 0), kind="stable")
    reached = np.cumsum(np.where(stands, counts, 0)[order])
    top = [
        {
            "id": int(i),
            "text": tokenizer.pieces[i].decode("utf-8", "replace"),
            "count": int(counts[i]),
            "token_share": _share(counts[i], text_tokens),
            "byte_share": _share(counts[i] * sizes[i], n_bytes),
        }
        for i in order[:_TOP]
        if counts[i] and stands[i]
    ]
    result: dict[str, Any] = {
        "ids": int(stands.sum()),
        "no_token": int((~stands).sum()),
        "never": int((seen == 0).sum()),
        "rare": int((seen < rare).sum()),
        "rare_below": rare,
        "tokens": tokens,
        "bytes_per_token": round(n_bytes / text_tokens, 4) if text_tokens else 0.0,
        "used_for_half": int(np.searchsorted(reached, text_tokens / 2)) + 1 if text_tokens else 0,
        "top": top,
    }
    return result | {"warnings": _warnings(result)}


def _warnings(health: dict[str, Any]) -> list[str]:
    """Return what a user should know, in words."""
    if not health["tokens"]:
        return []
    lines = []
    share = health["rare"] / max(1, health["ids"])
    if share > _RARE_SHARE:
        lines.append(
            f"{health['rare']:,} of {health['ids']:,} ids ({share:.0%}) are seen fewer than {health['rare_below']} "
            f"times ({health['never']:,} never): their embeddings stay untrained; use a smaller vocabulary or more text"
        )
    if 0 < health["bytes_per_token"] < _FEW_BYTES:
        lines.append(
            f"a token carries {health['bytes_per_token']:.2f} bytes of text, less than {_FEW_BYTES}: the vocabulary "
            "does not fit this text; train one on it"
        )
    lines += [
        f"id {top['id']} ({top['text']!r}) is {top['token_share']:.0%} of all tokens and {top['byte_share']:.0%} of "
        "the bytes: the vocabulary has no longer tokens for what it repeats"
        for top in health["top"]
        if top["token_share"] > _TOP_SHARE and top["byte_share"] < top["token_share"] / 2
    ]
    return lines


def _share(part: int, whole: int) -> float:
    return round(float(part) / whole, 6) if whole else 0.0
