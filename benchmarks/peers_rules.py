"""Loss-spike rules of other tools, restated in a few lines each, for the trace scoreboard.

Every rule takes one step's loss and says whether it would have raised its hand. They are restated from what the
tools do by default, not copied; where a tool also looks at the gradient norm or at single ranks, only its rule for
the mean loss is here, because the mean loss is what published logs have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean, median, pstdev, stdev

Rule = Callable[[float], bool]


class OlmoCore:
    """OLMo-core ``SkipStepOptimizer``: more than 6 standard deviations above the mean of the last 128 losses.

    Judges from 64 losses on. Whatever it skips stays in the window.
    """

    def __init__(self, window: int = 128, sigma: float = 6.0) -> None:
        self._sigma, self._least = sigma, window // 2
        self._losses: deque[float] = deque(maxlen=window)

    def __call__(self, loss: float) -> bool:
        past = list(self._losses)
        self._losses.append(loss)
        if len(past) < self._least:
            return False
        return not loss - fmean(past) <= self._sigma * _std(past)  # a NaN anywhere is a skip


class Megatron:
    """Megatron-LM's rerun state machine: non-finite, or 10 times the largest of the first 100 losses."""

    def __init__(self, factor: float = 10.0, samples: int = 100) -> None:
        self._factor, self._samples, self._seen, self._largest = factor, samples, 0, 0.0

    def __call__(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if self._seen < self._samples:
            self._seen += 1
            self._largest = max(self._largest, loss)
            return False
        return loss >= self._factor * self._largest


class Lightning:
    """Lightning Fabric ``SpikeDetection``: non-finite, or 3 times the mean of the last 10 and above the last loss."""

    def __init__(self, window: int = 10, rtol: float = 2.0) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._rtol, self._last = rtol, math.nan

    def __call__(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        mean = fmean(self._losses) if self._losses else math.nan
        spike = loss - mean >= self._rtol * abs(mean) and loss > self._last
        self._last = loss
        if not spike:
            self._losses.append(loss)
        return spike


class LlmFoundry:
    """llm-foundry ``KillLossSpike``: five in a row at twice the window's mean, or half the window above a cap.

    The window is 5 % of the run and at least 100; the cap is the mean of the first full window, at most 10.
    """

    def __init__(self, run_length: int, factor: float = 2.0, patience: int = 4, cap: float = 10.0) -> None:
        self._losses: deque[float] = deque(maxlen=max(100, run_length // 20))
        self._factor, self._patience, self._cap = factor, patience, cap
        self._seen = self._outliers = 0

    def __call__(self, loss: float) -> bool:
        size = self._losses.maxlen or 0
        full = len(self._losses) == size
        mean = fmean(self._losses) if full else math.nan
        if full and self._seen < 2 * size:
            self._cap = min(self._cap, mean)
        self._outliers = self._outliers + 1 if loss >= self._factor * mean else 0
        self._losses.append(loss)
        self._seen += 1
        high = sum(value > self._cap for value in self._losses) >= size / 2
        return full and (self._outliers > self._patience or (self._seen >= 2 * size and high))


class LlmC:
    """llm.c's outlier detector at z > 3 over 128 losses; the judged loss is in the window."""

    def __init__(self, window: int = 128, z: float = 3.0) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._z = z

    def __call__(self, loss: float) -> bool:
        full = len(self._losses) == self._losses.maxlen
        self._losses.append(loss)
        values = list(self._losses)
        spread = pstdev(values) if all(map(math.isfinite, values)) else math.nan
        return full and spread > 0.0 and (loss - fmean(values)) / spread > self._z


class ZClip:
    """ZClip's z > 2.5 against exponential means (0.97, 25 steps of warm-up), applied to the loss.

    ZClip applies it to the gradient norm, which most published logs lack. The clipped value is what it learns.
    """

    def __init__(self, alpha: float = 0.97, z: float = 2.5, warmup: int = 25) -> None:
        self._alpha, self._z, self._warmup = alpha, z, warmup
        self._first: list[float] = []
        self._mean = self._var = 0.0

    def __call__(self, loss: float) -> bool:
        if len(self._first) < self._warmup:
            self._first.append(loss)
            if len(self._first) == self._warmup:
                self._mean, self._var = fmean(self._first), _std(self._first) ** 2
            return False
        std = math.sqrt(self._var) + 1e-6
        z = (loss - self._mean) / std
        spike = z > self._z
        learned = self._mean + self._z**2 / z * std if spike else loss
        self._var = self._alpha * self._var + (1 - self._alpha) * (learned - self._mean) ** 2
        self._mean = self._alpha * self._mean + (1 - self._alpha) * learned
        return spike


class RobustMad:
    """A plain robust rule: ln loss over its 32-point median by 6 robust deviations of differences and by 5 %.

    Deviations over the last 128 points; what it flags stays in its windows; non-finite is flagged.
    """

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=129)

    def __call__(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        x, past = math.log(loss), list(self._logs)[-128:]
        self._logs.append(x)
        if len(past) < 20:
            return False
        changes = [abs(b - a) for a, b in pairwise(past)]
        sigma = 1.4826 * median(changes) / math.sqrt(2) + 1e-4
        return x - median(past[-32:]) > max(6 * sigma, math.log(1.05))


def _std(values: list[float]) -> float:
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def peers(run_length: int) -> dict[str, Rule]:
    """Return a fresh copy of every rule, by name. ``run_length`` is in logged points."""
    return {
        "robust MAD": RobustMad(),
        "OLMo-core": OlmoCore(),
        "llm.c z>3": LlmC(),
        "ZClip's z": ZClip(),
        "Lightning": Lightning(),
        "llm-foundry": LlmFoundry(run_length),
        "Megatron": Megatron(),
    }
