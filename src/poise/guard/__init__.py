"""The guard room's detectors, one file each."""

_DETECTORS = (
    *("nonfinite", "fast_spike", "level_shift", "slow_divergence", "chaotic", "collapse", "plateau", "data_outlier"),
    *(
        "grad_spike",
        "grad_runup",
        "large_updates",
        "update_jump",
        "moment_lag",
        "stale_moment",
        "logit_growth",
        "entropy_collapse",
    ),
    *("weight_jump", "underflow", "repeated_data", "lr_jump", "loss_spread"),
)

METHODS = tuple(f"poise.guard.detectors.{name}" for name in _DETECTORS)
