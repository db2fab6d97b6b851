"""What is tried for damage that stays, by cause, and what a person is told when nothing is left to try."""

from __future__ import annotations

ORDER: dict[str, tuple[str, ...]] = {
    "unknown": ("rollback", "reset_moments", "lower_lr"),
    "data": ("rollback",),
    "hardware": ("rollback",),
    "software": ("rollback",),
    "precision": ("rollback", "lower_lr"),
    "schedule": ("rollback", "lower_lr"),
    "optimizer": ("reset_moments", "rollback", "lower_lr"),
    "architecture": ("rollback", "lower_lr"),
}
"""What is tried for damage that stays, by cause, the likeliest to help first."""


def advice(fatal: bool, came_back: bool) -> str:
    """Return how to mend a run that was halted.

    Args:
        fatal: whether the readings were not finite.
        came_back: whether the trouble came back after a rollback.
    """
    lower = "lower the learning rate (half of it is a good first try) or lengthen the warm-up"
    if not fatal:
        return f"{lower}, then start again from a checkpoint well before the trouble"
    if came_back:
        return f"{lower}; if it stays, look for a fault in the data, the precision (fp16?) or the device"
    return f"look at the data and the precision (fp16?) of these steps; if they are sound, {lower}"
