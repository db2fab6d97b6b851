"""Published orderings of methods as data, each with citation and grade of evidence, and their comparison with a study.

Numbers that could not be verified, or on which sources conflict, are left out; what is left out is said in ``note``.
Grades: ``paper`` read from the paper's own text or tables; ``secondary`` from notes on or reviews of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final, Literal

from poise.studies.stats import paired_difference

Grade = Literal["paper", "secondary"]
Quantity = Literal["first_diverging_half", "sensitivity", "best_loss", "spikes_grad"]

QUANTITIES: Final[Mapping[Quantity, str]] = {
    "first_diverging_half": "first diverging rate (half of the gain lost, majority of seeds)",
    "sensitivity": "learning-rate sensitivity",
    "best_loss": "best validation loss",
    "spikes_grad": "spike score of the gradient norm (7 sigma, mean over the grid)",
}
"""What is measured here to stand beside the published quantity; larger is larger in both."""


@dataclass(frozen=True)
class Ordering:
    """A published table as numbers that order methods.

    Attributes:
        name: short name.
        citation: where it is published.
        grade: how it was read.
        what: what the numbers are.
        quantity: what is measured here in its place.
        values: methods joined by "+" -> number; "" is the baseline. Equal numbers, or numbers nearer than
            ``tolerance``, are a published tie.
        note: conditions and what is left out.
    """

    name: str
    citation: str
    grade: Grade
    what: str
    quantity: Quantity
    values: Mapping[str, float]
    note: str
    tolerance: float = 0.0


_RYBAKOV: Final = "Rybakov et al. (2024), Methods of improving LLM training stability, arXiv 2410.16682"
_TAKASE: Final = "Takase et al. (2023), Spike No More, arXiv 2312.16903"
_GATED: Final = "Qiu et al. (2025), Gated attention, arXiv 2505.06708, table 2"

ORDERINGS: Final[tuple[Ordering, ...]] = (
    Ordering(
        "largest stable rate",
        _RYBAKOV,
        "secondary",
        "largest learning rate of the grid that trains, 830M parameters",
        "first_diverging_half",
        {
            "": 6e-3,
            "soft_temp": 8e-3,
            "soft_clip": 8e-3,
            "sigma_reparam": 20e-3,
            "layer_scale": 20e-3,
            "soft_cap": 40e-3,
            "qk_norm": 40e-3,
            "qk_fc_norm": 40e-3,
            "qkv_norm": 60e-3,
            "qk_norm+soft_cap": 60e-3,
        },
        "One seed, divergence judged by eye. The sources conflict at 80e-3, so that column is left out: the two "
        "highest are at least 60e-3 and count as tied.",
    ),
    Ordering(
        "perplexity at rate 3e-4",
        _RYBAKOV + ", table 4",
        "secondary",
        "perplexity after 0.2T tokens, 830M parameters, 95 % interval +-0.1",
        "best_loss",
        {
            "": 11.19,
            "soft_cap": 11.24,
            "qkv_norm": 10.85,
            "qk_norm+soft_cap": 11.00,
            "qk_norm": 10.84,
            "qk_fc_norm": 10.87,
        },
        "One rate there, the best rate of each arm here. Differences within sqrt(2) of the interval count as ties.",
        tolerance=0.1 * math.sqrt(2),
    ),
    Ordering(
        "sensitivity falls",
        "Wortsman et al. (2023), Small-scale proxies for large-scale Transformer training instabilities, "
        "arXiv 2309.14322",
        "secondary",
        "direction of the change of learning-rate sensitivity: 1 without the method, 0 with it",
        "sensitivity",
        {"": 1.0, "qk_norm": 0.0, "z_loss": 0.0},
        "A claim about directions, not a table; the paper's own default has both methods on.",
    ),
    Ordering(
        "who spikes",
        _TAKASE,
        "paper",
        "1: loss spikes and jumps of the gradient norm in the curves of the 350M and 1.7B models, 0: none",
        "spikes_grad",
        {"": 1.0, "embed_detach": 1.0, "embed_scale": 0.0, "embed_norm": 0.0},
        "Read from curves, without a numeric definition of a spike; at a low rate the paper sees no difference.",
    ),
    Ordering(
        "who diverges",
        _TAKASE + ", table 1 (13B, rate 3e-4)",
        "paper",
        "0: diverged, 1: trained",
        "first_diverging_half",
        {"": 0.0, "embed_scale": 1.0},
        "13B parameters; the paper finds that the gap grows with size.",
    ),
    Ordering(
        "perplexity, 350M",
        _TAKASE + ", table 1 (WikiText)",
        "paper",
        "perplexity at rate 5e-4",
        "best_loss",
        {"": 30.03, "embed_detach": 30.69, "embed_norm": 29.85, "embed_scale": 29.86},
        "No interval published; differences below 0.1 count as ties here, which is our choice.",
        tolerance=0.1,
    ),
    Ordering(
        "perplexity, 130M",
        "Sun et al. (2025), The curse of depth (LayerNorm scaling), arXiv 2502.05795, tables 1 and 4",
        "paper",
        "perplexity at rate 1e-3, 2.2B tokens",
        "best_loss",
        {
            "": 26.73,
            "post_ln": 26.95,
            "mix_ln": 26.07,
            "layer_norm_scaling": 25.76,
            "layer_scale": 27.93,
            "skip_init": 27.41,
        },
        "DeepNorm is left out: the public code's initialisation is not the prescribed one. The cells of Post-LN and "
        "Mix-LN equal those of the Mix-LN paper, whose code starts embeddings at another scale. No interval published.",
    ),
    Ordering(
        "perplexity, 130M",
        "Li et al. (2024), Mix-LN, arXiv 2412.13795",
        "secondary",
        "perplexity, 2.2B tokens",
        "best_loss",
        {"": 26.78, "post_ln": 26.95, "mix_ln": 26.07},
        "DeepNorm is left out for the reason above. No interval published.",
    ),
    Ordering(
        "perplexity, 1.7B of 48 layers",
        _GATED,
        "paper",
        "perplexity at rate 4e-3, 400B tokens",
        "best_loss",
        {"": 7.421, "gated_attention": 7.288, "gated_attention_headwise": 7.370},
        "No interval published.",
    ),
    Ordering(
        "who diverges, 1.7B of 48 layers",
        _GATED,
        "paper",
        "rate 8e-3, 1T tokens. 0: diverged, 1: trained",
        "first_diverging_half",
        {"": 0.0, "gated_attention": 1.0},
        "The baseline there has QK-norm.",
    ),
    Ordering(
        "who diverges in 5 seeds",
        "Kim et al. (2025), Peri-LN, arXiv 2502.02732",
        "secondary",
        "0: some of 5 seeds diverged, 1: none did",
        "first_diverging_half",
        {"": 0.0, "peri_ln": 1.0},
        "The paper's best rates are the same for both.",
    ),
)


@dataclass(frozen=True)
class Reading:
    """What a study measured of one arm: methods beyond those of the baseline, and values by quantity and seed.

    A value that belongs to all seeds together (a first diverging rate) has the seed ``-1``; a rate above the largest
    tried is infinite. ``None`` for ``methods``: the arm differs in more than methods and stands for no published one.
    """

    label: str
    methods: frozenset[str] | None
    values: Mapping[Quantity, Mapping[int, float]]


@dataclass(frozen=True)
class Pair:
    """Two arms that the publication orders, and what was found: ``agrees``, ``reversed`` or ``not separated``."""

    lower: str
    higher: str
    found: Literal["agrees", "reversed", "not separated"]
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """An ordering beside a study: Kendall's tau-b over the arms that were run and pairs.

    ``tau`` is ``None`` where it is undefined or no pair is separated: it would be an order of noise.
    """

    ordering: Ordering
    arms: tuple[str, ...]
    tau: float | None
    pairs: tuple[Pair, ...]

    @property
    def measured(self) -> str:
        """What stands beside the published quantity."""
        return QUANTITIES[self.ordering.quantity]

    def count(self, found: str) -> int:
        return sum(pair.found == found for pair in self.pairs)

    def headline(self) -> str:
        """Return the result in one sentence."""
        tau = "" if self.tau is None else f"; Kendall's tau-b {self.tau:+.2f}"
        ordered = f"{len(self.pairs)} pair" + ("" if len(self.pairs) == 1 else "s")
        return (
            f"{ordered} ordered by the publication among the {len(self.arms)} arms run here: reproduced "
            f"{self.count('agrees')}, reversed {self.count('reversed')}, not separated {self.count('not separated')}"
            f"{tau}."
        )

    def disagreements(self) -> list[str]:
        """Return plain sentences: one for every reversed pair, and one that lists the pairs that were not separated."""
        out = [pair.sentence for pair in self.pairs if pair.found == "reversed"]
        ties = [f"{pair.lower} < {pair.higher}" for pair in self.pairs if pair.found == "not separated"]
        if ties:
            out.append(f"Not separated here, so neither confirmed nor refuted. Published: {'; '.join(ties)}.")
        return out


def canonical(methods: Sequence[str]) -> frozenset[str]:
    """Return the methods' names without their settings, but where a setting makes it another published method.

    >>> sorted(canonical(["qk_norm", "soft_cap:cap=30"])), sorted(canonical(["baseline"]))
    (['qk_norm', 'soft_cap'], [])
    >>> sorted(canonical(["gated_attention:score=headwise"])), sorted(canonical(["gated_attention:position=g2"]))
    (['gated_attention_headwise'], ['gated_attention:position=g2'])
    """
    names = set()
    for text in methods:
        name, _, settings = text.partition(":")
        if name == "gated_attention" and settings:
            alone = settings.count("=") == 1 and settings.endswith("=headwise")
            name = "gated_attention_headwise" if alone else text
        names.add(name)
    return frozenset(names - {"", "baseline"})


def compare(readings: Sequence[Reading]) -> tuple[Comparison, ...]:
    """Return the orderings of which at least two arms were run, beside what was measured."""
    out = []
    for ordering in ORDERINGS:
        by_methods = {canonical(key.split("+")): value for key, value in ordering.values.items()}
        known: list[tuple[Reading, float]] = []
        for reading in readings:
            if reading.methods is None or not reading.values.get(ordering.quantity):
                continue
            if reading.methods in by_methods:
                known.append((reading, by_methods[reading.methods]))
        if len({value for _, value in known}) < 2:
            continue
        pairs = tuple(
            _pair(ordering, *(one if one[1] < two[1] else two), *(two if one[1] < two[1] else one))
            for one, two in combinations(known, 2)
            if abs(one[1] - two[1]) > ordering.tolerance
        )
        measured = [_mean(reading.values[ordering.quantity]) for reading, _ in known]
        separated = any(pair.found != "not separated" for pair in pairs)
        tau = kendall_tau([value for _, value in known], measured, ordering.tolerance) if separated else None
        out.append(Comparison(ordering, tuple(reading.label for reading, _ in known), tau, pairs))
    return tuple(out)


def kendall_tau(xs: Sequence[float], ys: Sequence[float], tolerance: float = 0.0) -> float | None:
    """Return Kendall's tau-b, ties taken out of the denominator; ``None`` where one side is all ties.

    Args:
        xs: published values; nearer than ``tolerance`` is a tie.
        ys: measured values; equal (two infinities included) is a tie.
        tolerance: for ``xs``.

    >>> kendall_tau([1, 2, 3], [10, 20, 30]), kendall_tau([1, 2, 3], [3, 2, 1]), kendall_tau([1, 2], [5, 5])
    (1.0, -1.0, None)
    """
    total = x_pairs = y_pairs = 0
    for (x1, y1), (x2, y2) in combinations(zip(xs, ys, strict=True), 2):
        x = 0 if abs(x1 - x2) <= tolerance else 1 if x1 < x2 else -1
        y = 0 if y1 == y2 else 1 if y1 < y2 else -1
        total += x * y
        x_pairs += x != 0
        y_pairs += y != 0
    return total / math.sqrt(x_pairs * y_pairs) if x_pairs and y_pairs else None


def _pair(ordering: Ordering, low: Reading, low_value: float, high: Reading, high_value: float) -> Pair:
    ours_low, ours_high = low.values[ordering.quantity], high.values[ordering.quantity]
    a, b = _mean(ours_low), _mean(ours_high)
    found: Literal["agrees", "reversed", "not separated"]
    found = "not separated" if a == b or not _separated(ours_low, ours_high) else "agrees" if a < b else "reversed"
    published = f"{low.label} below {high.label} ({low_value:g} and {high_value:g})"
    verb = {
        "agrees": "Reproduced",
        "reversed": "Does not reproduce, the other way round here",
        "not separated": "Not separated here",
    }[found]
    sentence = f"{verb}. Published: {published}; measured here: {_text(a)} and {_text(b)}."
    return Pair(low.label, high.label, found, sentence)


def _separated(ours: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Return whether two values differ beyond the noise of the seeds, where there is such an interval at all."""
    if -1 in ours or -1 in other:
        return True  # a grid rate: no interval
    gap = paired_difference(ours, other)
    return gap is not None and gap.low is not None and gap.high is not None and not gap.low <= 0 <= gap.high


def _mean(values: Mapping[int, float]) -> float:
    return math.fsum(values.values()) / len(values)


def _text(value: float) -> str:
    return "above the largest rate" if math.isinf(value) else f"{value:.4g}"
