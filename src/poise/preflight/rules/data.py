"""Rules on data against model: lengths, vocabulary, repetition. No torch."""

from __future__ import annotations

from typing import Final

from poise.preflight.rules.base import Rule, Verdict, put, rule, says, short
from poise.preflight.settings import Settings


def _positions(s: Settings) -> Verdict | None:
    assert s.seq_len is not None and s.max_positions is not None
    if s.seq_len <= s.max_positions or s.positions in ("alibi", "none"):
        return None
    return Verdict(
        "critical" if s.positions == "learned" else "warning",
        says(s, "seq_len", "max_positions", "positions"),
        f"{put(s, 'seq_len', s.max_positions)}, or {put(s, 'max_positions', s.seq_len)}",
        "There is no vector for the positions above: the look-up fails, or reads beyond the table."
        if s.positions == "learned"
        else "",
        also=("positions",),
    )


def _vocab(s: Settings) -> Verdict | None:
    assert s.vocab_size is not None and s.tokenizer_vocab is not None
    what = says(s, "vocab_size", "tokenizer_vocab")
    if s.vocab_size < s.tokenizer_vocab:
        return Verdict(
            "critical",
            f"{what}: the tokenizer gives ids that the model does not have",
            put(s, "vocab_size", -(-s.tokenizer_vocab // 128) * 128),
        )
    if s.vocab_size > 1.25 * s.tokenizer_vocab + 1024:
        return Verdict(
            "note",
            f"{what}: {s.vocab_size - s.tokenizer_vocab} rows are never a target",
            put(s, "vocab_size", -(-s.tokenizer_vocab // 128) * 128),
            "Rows that never are a target are only pushed down; it may be another tokenizer's size.",
        )
    return None


def epochs(s: Settings) -> float | None:
    """Return how often the data is seen."""
    if not s.batch_tokens or not s.total_steps or not s.dataset_tokens:
        return None
    return s.batch_tokens * s.total_steps / s.dataset_tokens


def _epochs(s: Settings) -> Verdict | None:
    seen = epochs(s)
    if seen is None or s.dataset_tokens is None or s.epochs is not None or seen <= 4.5:
        return None
    return Verdict(
        "warning" if seen > 16 else "note",
        f"{short(seen * s.dataset_tokens)} tokens from {short(s.dataset_tokens)} unique ones: {seen:.3g} epochs",
        f"at most 4 epochs: {short(4 * s.dataset_tokens)} tokens, or more data",
    )


def _epochs_said(s: Settings) -> Verdict | None:
    assert s.epochs is not None
    if s.epochs <= 4.5:
        return None
    return Verdict("warning" if s.epochs > 16 else "note", says(s, "epochs"), "at most 4 epochs, or more data")


_REPEATED: Final = (
    "Up to 4 epochs cost next to nothing compared with new data; beyond, the value of more steps falls to zero."
)
_MUENNIGHOFF: Final = "Muennighoff et al. 2023, arXiv 2305.16264"

RULES: Final[tuple[Rule, ...]] = (
    rule(
        "seq-positions",
        "sequences longer than the model's positions",
        "critical",
        ("seq_len", "max_positions"),
        _positions,
        source="arithmetic; Press et al. 2022, arXiv 2108.12409, on positions never trained",
        why="Positions beyond the range that the model states have never been set up for it.",
    ),
    rule(
        "vocab-tokenizer",
        "vocabulary smaller than the tokenizer's",
        "critical",
        ("vocab_size", "tokenizer_vocab"),
        _vocab,
        source="arithmetic",
        why="An id outside the table fails, on a GPU asynchronously, or reads foreign memory.",
    ),
    rule(
        "epochs",
        "data repeated often",
        "warning",
        ("batch_sequences", "seq_len", "total_steps", "dataset_tokens"),
        _epochs,
        source=_MUENNIGHOFF,
        why=_REPEATED,
    ),
    rule(
        "epochs-said",
        "data repeated often, by the stated epochs",
        "warning",
        ("epochs",),
        _epochs_said,
        source=_MUENNIGHOFF,
        why=_REPEATED,
    ),
)
"""In the order of the file."""
