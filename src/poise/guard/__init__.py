"""The guard room's detectors, one file each."""

METHODS = (
    "poise.guard.detectors.nonfinite",
    "poise.guard.detectors.fast_spike",
    "poise.guard.detectors.grad_spike",
)
