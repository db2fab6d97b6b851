"""The optimizer room's methods, one file each."""

METHODS = (
    "poise.optim.rules.adamw",
    "poise.optim.shape.clip_global_norm",
)
