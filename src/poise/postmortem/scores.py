"""Spike scores: the share of steps that stand out, by the two definitions in use.

    olmo2       OLMo 2 (arXiv 2501.00656), section 3.2: per cent of values at least 7 deviations away from the rolling
                average of the last 1000 values
    olmo_core   OLMo-core's stability monitor: per cent of values above mean + 6 deviations of the last 128 values

Both windows count logged values and hold the ones before the value that is judged, spikes included; a run is judged
from the 65th (OLMo-core's half window) or the 129th value on. A value that is not finite stands out, and stays out
of the windows. Differs from the sources in that.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from poise.postmortem.log import Log
from poise.postmortem.readers.names import GRAD_NORM, LOSS
from poise.postmortem.trend import Bools, Floats

DEFINITIONS: Final = {"olmo2": (1000, 128, 7.0, True), "olmo_core": (128, 64, 6.0, False)}
"""Name -> (window, values needed, deviations, also downwards)."""


def spike_scores(log: Log) -> dict[str, dict[str, float]]:
    """Return series -> definition -> per cent of its judged values, for the loss and the gradient norm.

    A series that is too short to be judged is left out.
    """
    out: dict[str, dict[str, float]] = {}
    for name in (LOSS, GRAD_NORM):
        if name not in log.series:
            continue
        scores = {kind: spike_score(log.series[name][1], *rule) for kind, rule in DEFINITIONS.items()}
        known = {kind: score for kind, score in scores.items() if score == score}
        if known:
            out[name] = known
    return out


def spike_score(values: Floats, window: int, needed: int, deviations: float, both_ways: bool) -> float:
    """Return the per cent of values that stand out; NaN where none can be judged.

    Args:
        values: (N,).
        window: values before the judged one that make its mean and deviation.
        needed: values that have to be there before judging starts.
        deviations: distance from the mean at which a value stands out.
        both_ways: downwards, too.
    """
    finite = np.isfinite(values)
    bad = int((~finite).sum())
    kept = values[finite]
    if len(kept) <= needed:
        return float("nan")
    with np.errstate(all="ignore"):  # a value of 1e308 has no square
        out = _stand_out(kept, window, needed, deviations, both_ways)
    return 100.0 * float(out.sum() + bad) / (len(kept) - needed + bad)


def _stand_out(x: Floats, window: int, needed: int, deviations: float, both_ways: bool) -> Bools:
    at = np.arange(needed, len(x))
    first = np.maximum(at - window, 0)
    centred = x - np.median(x)
    sums, squares = (np.concatenate([[0.0], np.cumsum(y)]) for y in (centred, centred**2))
    count = at - first
    mean = (sums[at] - sums[first]) / count
    variance = np.maximum((squares[at] - squares[first]) / count - mean**2, 0.0)
    away = centred[at] - mean
    sigma = np.sqrt(variance) + 1e-12
    out: Bools = (np.abs(away) if both_ways else away) > deviations * sigma
    return out
