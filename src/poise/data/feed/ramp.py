"""Schedules of length and batch size in tokens seen: pure functions, so that a step still leads to its samples.

*Length warm-up.* A sample stays what it is, a row of ``full`` positions; while the length is L < ``full`` the row is
cut into ``full / L`` rows of L positions. So a step has the same samples and the same number of tokens at every length,
and sample numbers mean the same with and without the ramp. That is why lengths come from the ladder full, full/2,
full/4, ... The paper's example goes up by 8 positions at a time; a schedule that stays at one length for too long can
diverge at the switch, so prefer a short ramp to a low start.

*Batch warm-up.* The number of samples in a step grows with the tokens seen, in multiples of its start (so that what
divided the first batch among devices divides them all) or in stages that are given. Only whole steps change size.

``at`` takes the tokens of the samples shown so far. ``first_sample`` and ``step_of`` hold while nothing is dropped:
each step shows the samples that follow those of the step before. Steps begin at 1, samples at 0.

Sources: C. Li, M. Zhang, Y. He, "The Stability-Efficiency Dilemma", NeurIPS 2022, arXiv 2108.06084 (length; there
linear in steps and cut off, here linear in tokens and cut up; do not combine it with a batch ramp); W. Merrill et al.,
"Critical Batch Size Revisited", 2025, arXiv 2505.23971 (batch doubled in stages, rate times sqrt(2) each time).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Final, Literal, get_args

from poise.core.errors import Conflict, UserError, nearest

LrRule = Literal["sqrt", "linear", "none"]

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


@dataclass(frozen=True)
class LengthRamp:
    """Sequence length as a function of the tokens seen.

    Attributes:
        start: length at the beginning, in tokens.
        full: length of a sample; ``start`` times a power of two.
        tokens: tokens after which the length is ``full``; 0 is no ramp.

    Raises:
        UserError: a value is out of range, or ``full`` is not ``start`` times a power of two.

    >>> ramp = LengthRamp(16, 128, tokens=1000)
    >>> [ramp.at(seen) for seen in (0, 142, 143, 428, 429, 999, 1000)]
    [16, 16, 32, 32, 64, 64, 128]
    """

    start: int
    full: int
    tokens: int

    def __post_init__(self) -> None:
        if self.start < 1:
            raise UserError(f"the length ramp starts at {self.start}; give a positive length, e.g. 64")
        if self.tokens < 0:
            raise UserError(f"the length ramp takes {self.tokens} tokens; give 0 or more")
        ratio = self.full // self.start
        if self.full != self.start * ratio or ratio < 1 or ratio & (ratio - 1):
            ladder = ", ".join(map(str, _ladder(self.full)[:6]))
            mend = f"start at one of {ladder}" if self.full >= 1 else "give a positive length"
            raise UserError(f"a length ramp from {self.start} to {self.full} cannot double its way there; {mend}")

    def at(self, tokens_seen: int) -> int:
        """Return the length of a step that begins after ``tokens_seen`` tokens.

        It is the largest length of the ladder that is not above the line from ``start`` to ``full``.
        """
        assert tokens_seen >= 0, tokens_seen
        return max(length for seen, length in self.changes if seen <= tokens_seen)

    @cached_property
    def changes(self) -> tuple[tuple[int, int], ...]:
        """Return (tokens seen, length from there on) of every length, the first at 0."""
        ladder = [self.full >> k for k in range((self.full // self.start).bit_length())][::-1]
        rise = self.full - self.start
        # The line reaches a length after tokens * (length - start) / rise tokens: rounded up, in whole numbers.
        return tuple((-(-self.tokens * (length - self.start) // rise) if rise else 0, length) for length in ladder)


@dataclass(frozen=True)
class BatchRamp:
    """Batch size as a function of the tokens seen, and which samples a step shows.

    Attributes:
        start: samples in the first steps.
        full: samples in a step at the end; a multiple of ``start`` unless ``stages`` are given.
        tokens: tokens after which a step has ``full`` samples; 0 is no ramp.
        lr: how the learning rate follows the batch (``lr_factor``).
        seq_len: positions in a sample, which turns samples into tokens.
        stages: (tokens seen, samples in a step) from 0 on instead of the line; see ``parse``.

    Raises:
        UserError: a value is out of range.

    >>> ramp = BatchRamp(8, 32, tokens=1600, seq_len=10)
    >>> [ramp.at(seen) for seen in (0, 533, 534, 1600)]
    [8, 8, 16, 32]
    >>> ramp.first_sample(1), ramp.first_sample(8), ramp.step_of(56), ramp.step_of(55)
    (0, 56, 8, 7)
    """

    start: int
    full: int
    tokens: int
    lr: LrRule = "sqrt"
    seq_len: int = field(kw_only=True)
    stages: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.lr not in get_args(LrRule):
            rules = ", ".join(get_args(LrRule))
            raise UserError(f"no learning-rate rule '{self.lr}'{nearest(str(self.lr), get_args(LrRule))}; use {rules}")
        if self.seq_len < 1:
            raise UserError(f"the sequence length is {self.seq_len}; give a positive number, e.g. 256")
        if self.stages:
            _check_stages(self.stages)
            facts = (self.stages[0][1], self.stages[-1][1], self.stages[-1][0])
            if facts != (self.start, self.full, self.tokens):
                given = f"start {self.start}, full {self.full}, tokens {self.tokens}"
                raise UserError(f"the batch stages and {given} disagree; build such a ramp with BatchRamp.parse")
            return
        if self.start < 1:
            raise UserError(f"the batch ramp starts at {self.start} samples; give a positive number")
        if self.tokens < 0:
            raise UserError(f"the batch ramp takes {self.tokens} tokens; give 0 or more")
        if self.full < self.start or self.full % self.start:
            near = max(1, round(self.full / self.start)) * self.start
            raise UserError(
                f"a batch ramp from {self.start} to {self.full} samples: the full batch must be a multiple of the "
                f"first, so that all can be divided alike; use e.g. {near}"
            )

    @classmethod
    def parse(cls, text: str, *, seq_len: int, lr: LrRule = "sqrt") -> BatchRamp:
        """Return the ramp of explicit stages ``TOKENS:SAMPLES ...``, e.g. ``"0:256 1B:512 2.5B:1024"``.

        Tokens may end in k, M, B or T (thousand to 10**12).

        Raises:
            UserError: not that form, the first stage does not begin at 0, or tokens or batches do not grow.
        """
        stages = []
        for item in text.replace(",", " ").split():
            tokens, colon, samples = item.partition(":")
            if not colon or not samples.isdecimal():
                raise UserError(f"'{item}' is no batch stage; write TOKENS:SAMPLES, e.g. '0:256 1B:512'")
            stages.append((parse_tokens(tokens), int(samples)))
        _check_stages(tuple(stages))
        return cls(stages[0][1], stages[-1][1], stages[-1][0], lr, seq_len=seq_len, stages=tuple(stages))

    def at(self, tokens_seen: int) -> int:
        """Return the number of samples of a step that begins after ``tokens_seen`` tokens."""
        assert tokens_seen >= 0, tokens_seen
        if self.stages:
            return self.stages[bisect_right(self.stages, tokens_seen, key=lambda stage: stage[0]) - 1][1]
        if tokens_seen >= self.tokens:
            return self.full
        return self.start * (1 + (self.full // self.start - 1) * tokens_seen // self.tokens)

    def lr_factor(self, tokens_seen: int) -> float:
        """Return what the learning rate is multiplied with, 1 at the full batch.

        ``sqrt``: sqrt(B / full), the rule for Adam that Merrill 2025 and others use; ``linear``: B / full, the rule
        for SGD; ``none``: always 1.
        """
        share = self.at(tokens_seen) / self.full
        return {"sqrt": math.sqrt(share), "linear": share, "none": 1.0}[self.lr]

    def size(self, step: int) -> int:
        """Return the number of samples of a step; steps begin at 1."""
        return self._pieces[self._piece_of_step(step)].samples

    def first_sample(self, step: int) -> int:
        """Return the first sample that a step shows; steps begin at 1."""
        piece = self._pieces[self._piece_of_step(step)]
        return piece.first_sample + (step - piece.first_step) * piece.samples

    def step_of(self, sample: int) -> int:
        """Return the step that shows a sample; the inverse of ``first_sample``."""
        assert sample >= 0, sample
        piece = self._pieces[bisect_right(self._pieces, sample, key=lambda p: p.first_sample) - 1]
        return piece.first_step + (sample - piece.first_sample) // piece.samples

    @cached_property
    def changes(self) -> tuple[tuple[int, int], ...]:
        """Return (tokens seen, samples in a step from there on), the first at 0; planned, not rounded to steps."""
        if self.stages:
            return self.stages
        if self.tokens == 0 or self.start == self.full:
            return ((0, self.full),)
        rises = self.full // self.start - 1
        return tuple((-(-self.tokens * k // rises), self.start * (k + 1)) for k in range(rises + 1))

    @cached_property
    def _pieces(self) -> tuple[_Piece, ...]:
        """Return the stretches of steps of equal size; one of no step begins where the next does, which is found."""
        pieces = []
        step, sample = 1, 0
        ends = [tokens for tokens, _ in self.changes[1:]]
        for (_, samples), end in zip(self.changes, [*ends, None], strict=True):
            if end is None:
                pieces.append(_Piece(step, sample, samples))
                break
            steps = max(0, -(-(end - sample * self.seq_len) // (samples * self.seq_len)))
            pieces.append(_Piece(step, sample, samples))
            step, sample = step + steps, sample + steps * samples
        return tuple(pieces)

    def _piece_of_step(self, step: int) -> int:
        assert step >= 1, step
        return bisect_right(self._pieces, step, key=lambda p: p.first_step) - 1


@dataclass(frozen=True)
class _Piece:
    """Steps of equal size: the first step, the first sample, samples in each."""

    first_step: int
    first_sample: int
    samples: int


def check(length: LengthRamp | None, batch: BatchRamp | None, both: bool = False) -> None:
    """Refuse a length ramp beside a batch ramp unless ``both`` asks for it.

    Raises:
        Conflict: both are on and ``both`` is false (arXiv 2108.06084 advises against it: either cures the same thing,
            and together early steps have few sequences and short ones).
        UserError: the two count tokens with different sequence lengths.
    """
    ramps = length is not None and length.start < length.full and length.tokens > 0
    grows = batch is not None and batch.start < batch.full and batch.tokens > 0
    if ramps and grows and not both:
        raise Conflict("a length ramp and a batch ramp together are advised against; take one, or ask for both")
    if length is not None and batch is not None and length.full != batch.seq_len:
        raise UserError(
            f"the length ramp ends at {length.full} and the batch ramp counts sequences of {batch.seq_len}; "
            "give both the same sequence length"
        )


def parse_tokens(text: str) -> int:
    """Return a number of tokens written as ``1000``, ``500k``, ``2.5M``, ``1B`` or ``1e9``.

    Raises:
        UserError: not such a number, or not a whole number of tokens.

    >>> parse_tokens("2.5B"), parse_tokens("1e3"), parse_tokens("0")
    (2500000000, 1000, 0)
    """
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?(?:e(\d{1,2}))?([kmbt]?)", text.strip().lower().replace("_", ""))
    if match is None:
        raise UserError(f"'{text}' is no number of tokens; write e.g. 500M or 1.5B")
    whole, decimals, exponent, unit = match[1], match[2] or "", match[3] or "0", match[4]
    parts = int("1" + "0" * len(decimals))
    tokens, rest = divmod(int(whole + decimals + "0" * int(exponent)) * _UNITS[unit], parts)
    if rest:
        raise UserError(f"'{text}' is not a whole number of tokens; write e.g. 500M or 1.5B")
    return tokens


def _check_stages(stages: tuple[tuple[int, int], ...]) -> None:
    if not stages or stages[0][0] != 0:
        raise UserError("the first batch stage must begin at 0 tokens; write e.g. '0:256 1B:512'")
    for tokens, samples in stages:
        if samples < 1:
            raise UserError(f"the batch stage '{tokens}:{samples}' has no samples; give a positive number")
    for (tokens, samples), (later, more) in pairwise(stages):
        if later <= tokens or more <= samples:
            raise UserError(
                f"the batch stage '{later}:{more}' follows '{tokens}:{samples}'; tokens and samples must grow"
            )


def _ladder(full: int) -> list[int]:
    """Return full, full/2, ... as long as they are whole."""
    out = [full]
    while out[-1] > 1 and out[-1] % 2 == 0:
        out.append(out[-1] // 2)
    return out
