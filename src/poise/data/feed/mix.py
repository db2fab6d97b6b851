"""Mixing sources: which source, and which sequence of it, a sample shows; a pure function of the sample number.

Samples come in blocks of 4096. A block holds a fixed number of each source in an order of its own, a Feistel
permutation keyed by (seed, block); so any stretch of training has the mixture that was asked for, without drawing lots.
Shares that are no whole number in a block are settled over 64 blocks: each source has its floor in every block and the
rest in as many of the 64 as bring its share to the nearest 1 / 262,144, spread evenly. A source with a weight has at
least one sample there, however small the weight.

A source may have a cap on its epochs. At its last sequence its share goes to the others in proportion to their weights,
from the block in which it ends. The stretches between such ends are ``phases``; inside one, all is arithmetic.

A source's samples are numbered through all its epochs: ``local // size`` is the epoch, and the loader permutes inside
it. Nothing here depends on how many processes read, and there is nothing to save but the sample number.

Sources: temperature, N. Arivazhagan et al. 2019, arXiv 1907.05019 (weight ~ size ** (1 / T)); a cap per source instead
of a temperature, H. W. Chung et al., UniMax, ICLR 2023, arXiv 2304.09151 (the cap as such; how UniMax divides the
budget is not built here); what repetition is worth, N. Muennighoff et al., NeurIPS 2023, arXiv 2305.16264.

Shape letters: N samples asked for, S sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from poise.core.errors import UserError, nearest
from poise.core.rng import derive
from poise.data.bits import mix
from poise.data.feed.phases import BLOCK, Ints, Phase, phases_of

R_STAR: Final = 15.4
"""Passes over which the worth of repetition falls by e (Muennighoff 2023)."""

_BITS: Final = 12  # BLOCK == 2 ** _BITS
_HALF: Final = np.uint64(_BITS // 2)
_LOW: Final = np.uint64(2 ** (_BITS // 2) - 1)
_ROUNDS: Final = 8
_MANY_PASSES: Final = 4  # up to here a pass is worth about as much as new text
_USELESS_PASSES: Final = 40


@dataclass(frozen=True)
class Mix:
    """Several sources as one stream of samples.

    Attributes:
        names: the sources, S of them; places in the other fields and source indices follow this order.
        sizes: sequences of each.
        weights: share of each while none is used up, adding up to 1; 0 leaves a source out.
        caps: samples that may be taken from each, None for no limit.
        seed: of the order.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    caps: tuple[int | None, ...]
    seed: int

    @classmethod
    def of(
        cls,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        *,
        temperature: float | None = None,
        epochs: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Mix:
        """Return the mixture of sources.

        Args:
            sizes: sequences of every source.
            weights: weight of every source (any scale; 0 leaves one out); None is in proportion to size.
            temperature: T > 0 instead of weights: in proportion to size ** (1 / T). 1 is by size, more evens out.
            epochs: at most so many passes over a source, e.g. 4 or 0.5; a source not named has no limit.
            seed: of the order of samples.

        Raises:
            UserError: an unknown source, a source without weight, weights that are negative or all 0, a source with a
                weight and no sequence, a temperature or cap that is not positive, or weights beside a temperature.
        """
        names = tuple(sizes)
        epochs = epochs or {}
        if not names:
            raise UserError("a mixture needs at least one source")
        for given in (weights or {}, epochs):
            for name in given:
                if name not in sizes:
                    raise UserError(f"no source '{name}'{nearest(name, names)}; there are {', '.join(names)}")
        if weights is not None and temperature is not None:
            raise UserError("a mixture has weights or a temperature, not both; leave one out")
        raw = _by_size(sizes, temperature) if weights is None else _given(sizes, weights)
        total = math.fsum(raw)
        if not total > 0:
            raise UserError("all sources of the mixture have weight 0 or no sequence; give one a positive weight")
        for name, limit in epochs.items():
            if not limit > 0 or (sizes[name] and limit * sizes[name] + 1e-9 < 1):
                raise UserError(
                    f"source '{name}' is limited to {limit:g} epochs of {sizes[name]:,} sequences, less than one "
                    f"sequence; give a larger limit, or the weight 0 to leave it out"
                )
        caps = tuple(
            int(epochs[name] * size + 1e-9) if epochs.get(name, math.inf) < math.inf else None
            for name, size in sizes.items()
        )
        return cls(names, tuple(map(int, sizes.values())), tuple(w / total for w in raw), caps, seed)

    @property
    def total(self) -> int | None:
        """Number of samples there are, None if endless: a source without a cap never ends."""
        return self._phases[-1].end

    def place(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return (source, local): which source every sample comes from, and which of its samples it is, (N,) each.

        ``local // size`` is the epoch of the source, ``local % size`` the place in that epoch's order.

        Raises:
            UserError: a sample lies after the end of the last source.
        """
        samples = np.asarray(samples, np.int64)
        source, local = np.empty_like(samples), np.empty_like(samples)
        if not samples.size:
            return source, local
        assert samples.min() >= 0, samples.min()
        if self.total is not None and samples.max() >= self.total:
            raise UserError(
                f"sample {samples.max():,} lies after the end of the mixture: with these epoch limits it has "
                f"{self.total:,} samples; raise a limit or train for less"
            )
        block, within = np.divmod(samples, BLOCK)
        number = np.searchsorted(self._first_blocks, block, "right") - 1
        for i in np.unique(number).tolist():
            phase = self._phases[i]
            here = slice(None) if (number == i).all() else number == i
            spot = _order(within[here], block[here], self._key, phase.block)
            source[here], local[here] = phase.place(block[here] - phase.first_block, spot)
        return source, local

    def sample_of(self, source: int, local: Ints) -> Ints:
        """Return the samples at which a source's samples ``local`` come; the inverse of ``place``."""
        local = np.asarray(local, np.int64)
        assert local.size == 0 or local.min() >= 0, local.min()
        reach = self._reach(source)
        if self.weights[source] == 0 or (local.size and reach is not None and local.max() >= reach):
            name, last = self.names[source], local.max(initial=0)
            raise UserError(f"source '{name}' gives {reach or 0:,} samples to the mixture; it has no number {last:,}")
        number = np.searchsorted(np.array([phase.base[source] for phase in self._phases]), local, "right") - 1
        samples = np.empty_like(local)
        for i in np.unique(number).tolist():
            phase, here = self._phases[i], number == i
            block, spot = phase.find(source, local[here])
            block = block + phase.first_block
            samples[here] = block * BLOCK + _order(spot, block, self._key, phase.block, back=True)
        return samples

    def counts(self, samples: int) -> Ints:
        """Return how many of the first ``samples`` samples come from every source, (S,)."""
        assert samples >= 0, samples
        whole, rest = divmod(samples, BLOCK)
        phase = self._phases[int(np.searchsorted(self._first_blocks, whole, "right")) - 1]
        if self.total is not None and samples >= self.total:
            return np.array([cap if w else 0 for cap, w in zip(self.caps, self.weights, strict=True)], np.int64)
        taken = phase.taken(whole - phase.first_block)
        if rest:
            source, _ = self.place(np.arange(whole * BLOCK, samples))
            taken = taken + np.bincount(source, minlength=len(self.names))
        return taken

    def report(self, samples: int, seq_len: int = 1) -> list[dict[str, Any]]:
        """Return what a run of ``samples`` samples shows of every source, and what repetition leaves of it.

        Each is a dict: ``source``; ``weight`` as asked and ``share`` as it comes; ``sequences`` there are; ``samples``
        and ``tokens`` shown; ``epochs``, the passes; ``effective_tokens``, D' = U + U R* (1 - exp(-R / R*)) with
        U the tokens shown at least once, R the passes after the first and R* = 15.4: tokens of new text that would be
        worth as much, by the fit of Muennighoff 2023 (models up to 9 B, one mixture); ``warning``, a line or None.
        """
        assert samples > 0 and seq_len > 0, (samples, seq_len)
        samples = samples if self.total is None else min(samples, self.total)
        lines = []
        for i, count in enumerate(self.counts(samples).tolist()):
            passes = count / self.sizes[i] if count else 0.0
            lines.append(
                {
                    "source": self.names[i],
                    "weight": self.weights[i],
                    "share": count / samples,
                    "sequences": self.sizes[i],
                    "samples": count,
                    "tokens": count * seq_len,
                    "epochs": passes,
                    "effective_tokens": effective(count, self.sizes[i]) * seq_len,
                    "warning": _warning(self.names[i], passes),
                }
            )
        return lines

    @cached_property
    def _phases(self) -> list[Phase]:
        return phases_of(self.weights, self.caps)

    @cached_property
    def _first_blocks(self) -> Ints:
        return np.array([phase.first_block for phase in self._phases], np.int64)

    @cached_property
    def _key(self) -> np.uint64:
        return np.uint64(derive(self.seed, "mix"))

    def _reach(self, source: int) -> int | None:
        return self.caps[source] if self.weights[source] else 0


def parse(items: Iterable[str], known: Sequence[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Return (weights, epochs) from ``NAME=WEIGHT[@EPOCHS]`` each; ``known`` names are checked when given.

    Raises:
        UserError: not that form, a name twice, or an unknown name.

    >>> parse(("web=0.7", "books=0.3@4"))
    ({'web': 0.7, 'books': 0.3}, {'books': 4.0})
    """
    weights: dict[str, float] = {}
    epochs: dict[str, float] = {}
    for item in items:
        name, equals, rest = item.rpartition("=")
        weight, at, limit = rest.partition("@")
        if not equals or not name:
            raise UserError(f"'{item}' is no share of a mixture; write NAME=WEIGHT or NAME=WEIGHT@EPOCHS")
        if known is not None and name not in known:
            raise UserError(f"no source '{name}'{nearest(name, known)}; there are {', '.join(known)}")
        if name in weights:
            raise UserError(f"source '{name}' is in the mixture twice; give it once")
        weights[name] = _number(item, "weight", weight)
        if at:
            epochs[name] = _number(item, "number of epochs", limit)
    return weights, epochs


def effective(samples: int, size: int) -> float:
    """Return the number of fresh samples worth as much as ``samples`` from a source of ``size`` (Muennighoff 2023).

    >>> effective(50, 100), round(effective(400, 100), 1)
    (50.0, 372.6)
    """
    unique = min(samples, size)
    repeats = samples / size - 1 if samples > size else 0.0
    return unique + unique * R_STAR * -math.expm1(-repeats / R_STAR)


def _order(spot: Ints, block: Ints, key: np.uint64, size: int, back: bool = False) -> Ints:
    """Return the image of places ``spot`` in range(size) under the permutation of their ``block``, or its inverse.

    As ``data/feed/permute.py``, with a key for every element, so that samples of many blocks go together.
    """
    start = mix(block.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)
    image = _network(spot.astype(np.uint64), start, back)
    while (outside := image >= size).any():
        image[outside] = _network(image[outside], start[outside], back)
    return image.astype(np.int64)


def _network(x: NDArray[np.uint64], start: NDArray[np.uint64], back: bool) -> NDArray[np.uint64]:
    """Permute range(2 ** _BITS): eight rounds, or the same eight undone."""
    left, right = x >> _HALF, x & _LOW
    for i in range(_ROUNDS):
        if back:
            left, right = right ^ (mix(start + np.uint64(_ROUNDS - 1 - i) + (left << np.uint64(32))) & _LOW), left
        else:
            left, right = right, left ^ (mix(start + np.uint64(i) + (right << np.uint64(32))) & _LOW)
    return (left << _HALF) | right


def _by_size(sizes: Mapping[str, int], temperature: float | None) -> list[float]:
    if temperature is None:
        return [float(size) for size in sizes.values()]
    if not 0 < temperature < math.inf:
        raise UserError(f"the temperature of the mixture is {temperature:g}; give a positive number, e.g. 1 or 3.3")
    largest = max(max(sizes.values()), 1)
    return [(size / largest) ** (1 / temperature) if size else 0.0 for size in sizes.values()]


def _given(sizes: Mapping[str, int], weights: Mapping[str, float]) -> list[float]:
    for name, size in sizes.items():
        if name not in weights:
            raise UserError(f"source '{name}' has no weight; give it one, or {name}=0 to leave it out")
        if not 0 <= weights[name] < math.inf:
            raise UserError(f"source '{name}' has the weight {weights[name]:g}; give 0 or a positive number")
        if weights[name] > 0 and size < 1:
            raise UserError(f"source '{name}' has no sequence of this length; use shorter ones, or {name}=0")
    return [float(weights[name]) for name in sizes]


def _number(item: str, what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"'{item}': '{text}' is no {what}; write NAME=WEIGHT or NAME=WEIGHT@EPOCHS, e.g. books=0.3@4")
    return value


def _warning(name: str, passes: float) -> str | None:
    if passes >= _USELESS_PASSES:
        return (
            f"source '{name}' is seen {passes:.1f} times: at {_USELESS_PASSES} passes another one is worth 8 % of new "
            "text, and runs of 44 passes diverged (Muennighoff 2023); cap its epochs"
        )
    if passes > _MANY_PASSES:
        return (
            f"source '{name}' is seen {passes:.1f} times: after {_MANY_PASSES} passes repeated text is worth less and "
            "less (Muennighoff 2023); lower its weight or cap its epochs"
        )
    return None
