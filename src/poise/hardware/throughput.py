"""How fast training goes, how fast it could go, and how much memory it took.

Shape letters: N the side of a square matrix.
"""

from __future__ import annotations

import functools
import math
import sys
import time

import torch

from poise.core.errors import UserError


@functools.cache
def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 2048, tries: int = 4) -> float:
    """Return the rate of square matrix products in FLOP/s: a measured ceiling for a training step.

    The best of several tries, after one to warm up, measured once a process for each set of arguments
    (about a second on two CPU cores at the default size).
    """
    device = torch.device(device)
    a_NN = torch.randn(size, size, device=device).to(dtype)
    out_NN = torch.empty_like(a_NN)
    best = math.inf
    for attempt in range(tries + 1):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a_NN, a_NN, out=out_NN)
        _wait(device)
        if attempt:
            best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Tokens per second, smoothed, and the time that is left.

    Smoothing is exponential in time: a step counts half after ``half_life_s`` seconds, whether steps are
    short or long, and the first reading is already unbiased.

    Args:
        total_tokens: tokens of the whole run; None if unknown.
        done_tokens: tokens of the run before this process (after a resume).
        half_life_s: seconds.

    Raises:
        UserError: ``half_life_s`` is not positive.
    """

    def __init__(self, total_tokens: int | None = None, done_tokens: int = 0, half_life_s: float = 20.0) -> None:
        if not half_life_s > 0:
            raise UserError(f"half_life_s is {half_life_s}, but must be above 0")
        self.total_tokens = total_tokens
        self.done_tokens = done_tokens
        self._half_life_s = half_life_s
        self._last: float | None = None
        self._tokens = 0.0
        self._seconds = 0.0

    def start(self, now: float | None = None) -> None:
        """Start the clock, or start it again after a pause that should not count (a save, an evaluation)."""
        self._last = time.perf_counter() if now is None else now

    def update(self, tokens: int, now: float | None = None) -> None:
        """Count tokens processed since the last call; ``now`` in seconds on any steady clock."""
        now = time.perf_counter() if now is None else now
        if self._last is not None:
            seconds = max(now - self._last, 0.0)
            decay = 0.5 ** (seconds / self._half_life_s)
            self._tokens = self._tokens * decay + tokens
            self._seconds = self._seconds * decay + seconds
        self._last = now
        self.done_tokens += tokens

    @property
    def tokens_per_second(self) -> float:
        """Smoothed rate; 0 before anything was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at the present rate; None while the rate or the total is unknown."""
        rate = self.tokens_per_second
        if self.total_tokens is None or rate == 0.0:
            return None
        return max(self.total_tokens - self.done_tokens, 0) / rate


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Return the most memory in use so far: tensors on a GPU, the whole process on a CPU; 0 if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
