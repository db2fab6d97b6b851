"""Tokens to measure with: real text from Python's standard library, or synthetic ones that follow Zipf's law.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from poise.core.errors import UserError
from poise.core.rng import derive

BYTES: Final = 1_000_000
"""Text that is tokenised; more would take longer than it teaches so small a model."""

LEAST_SECONDS: Final = 30.0
"""Budget below which no time is spent on real text."""


@dataclass(frozen=True, slots=True)
class Text:
    """A stream of tokens.

    Attributes:
        ids: one after another.
        vocab_size: of the models that read them.
        what: where they come from, in words.
    """

    ids: NDArray[np.int64]
    vocab_size: int
    what: str

    def batch(self, seed: int, number: int, sequences: int, length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) of a step: places drawn from (seed, number)."""
        generator = np.random.default_rng(derive(seed, "preflight", str(number)))
        starts = generator.integers(0, len(self.ids) - length, sequences)
        rows = np.stack([self.ids[start : start + length + 1] for start in starts.tolist()])
        block = torch.from_numpy(rows)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def real(vocab_size: int) -> Text:
    """Return text of the standard library with a byte-pair vocabulary trained on it.

    Raises:
        UserError: this Python has no sources of its library.
        ModuleNotFoundError: a package of ``poise[train]`` is not there.
    """
    from poise.data import sources
    from poise.data.readers import Tally
    from poise.data.tokens.tokenizer import train

    texts: list[str] = []
    size = 0
    for document in sources.documents(sources.resolve(sources.STDLIB), "text", Tally()):
        texts.append(document.text[: BYTES // 20])  # of many files, not all of a few
        size += len(texts[-1])
        if size >= BYTES:
            break
    tokenizer = train(texts, vocab_size)
    parts = tokenizer.encode(texts)
    end = np.array([tokenizer.end_of_text], np.int64)
    ids = np.concatenate([piece for part in parts for piece in (part.astype(np.int64), end)])
    what = f"{size / 1e6:.1f} MB of Python's standard library, {vocab_size} byte-pair tokens"
    return Text(ids, vocab_size, what)


def zipf(vocab_size: int, length: int = 200_000, seed: int = 0) -> Text:
    """Return synthetic tokens: of Zipf's frequencies, half of them a fixed function of the token before.

    The repetition gives a model something to learn, as text does; its entropy is known to nobody.
    """
    generator = np.random.default_rng(derive(seed, "preflight", "zipf"))
    weight = 1.0 / np.arange(1, vocab_size + 1)
    drawn = generator.choice(vocab_size, size=length, p=weight / weight.sum())
    follows = generator.permutation(vocab_size)
    ids = drawn.copy()
    for i in np.flatnonzero(generator.random(length - 1) < 0.5).tolist():
        ids[i + 1] = follows[ids[i]]
    return Text(ids.astype(np.int64), vocab_size, f"{vocab_size} synthetic tokens of Zipf's law, no real text")


def tokens(vocab_size: int, seconds: float) -> tuple[Text, float]:
    """Return real text where the budget allows, else synthetic tokens; and the seconds that it took."""
    began = time.perf_counter()
    if seconds >= LEAST_SECONDS:
        try:
            found = real(vocab_size)
            return found, time.perf_counter() - began
        except (UserError, ModuleNotFoundError, OSError):
            pass  # no sources or no tokenizer here: synthetic tokens do
    found = zipf(vocab_size)
    return found, time.perf_counter() - began
