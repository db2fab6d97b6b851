"""The detectors of an ordinary run, in the order in which their alarms are listed."""

from __future__ import annotations

from poise.guard.detectors.base import Detector
from poise.guard.detectors.chaotic import Chaotic
from poise.guard.detectors.collapse import Collapse
from poise.guard.detectors.data_outlier import DataOutlier
from poise.guard.detectors.entropy_collapse import EntropyCollapse
from poise.guard.detectors.fast_spike import FastSpike
from poise.guard.detectors.grad_runup import GradRunup
from poise.guard.detectors.grad_spike import GradSpike
from poise.guard.detectors.large_updates import LargeUpdates
from poise.guard.detectors.level_shift import LevelShift
from poise.guard.detectors.logit_growth import LogitGrowth
from poise.guard.detectors.loss_spread import LossSpread
from poise.guard.detectors.lr_jump import LrJump
from poise.guard.detectors.moment_lag import MomentLag
from poise.guard.detectors.nonfinite import NonFinite
from poise.guard.detectors.plateau import Plateau
from poise.guard.detectors.repeated_data import RepeatedData
from poise.guard.detectors.slow_divergence import SlowDivergence
from poise.guard.detectors.stale_moment import StaleMoment
from poise.guard.detectors.underflow import Underflow
from poise.guard.detectors.update_jump import UpdateJump
from poise.guard.detectors.weight_jump import WeightJump

ON_EVIDENCE = frozenset({"weight_jump", "logit_growth", "entropy_collapse"})
"""Detectors that also judge what is measured on alarm, between two regular measurements."""


def standard(alarms_per_10k: float = 0.5) -> tuple[Detector, ...]:
    """Return new detectors with their defaults.

    Args:
        alarms_per_10k: false alarms allowed in 10 000 steps of a healthy run, for each that is calibrated by it.
    """
    rate = alarms_per_10k
    return (
        NonFinite(),
        FastSpike(alarms_per_10k=rate),
        LevelShift(alarms_per_10k=rate),
        SlowDivergence(),
        Chaotic(),
        Collapse(),
        Plateau(),
        DataOutlier(),
        GradSpike(),
        GradRunup(alarms_per_10k=rate),
        LargeUpdates(),
        UpdateJump(alarms_per_10k=rate),
        MomentLag(alarms_per_10k=rate),
        StaleMoment(),
        LogitGrowth(),
        EntropyCollapse(),
        WeightJump(),
        Underflow(),
        RepeatedData(),
        LrJump(),
        LossSpread(alarms_per_10k=rate),
    )
