"""Readers of configurations, one file a format."""

READERS = (
    "poise.preflight.readers.hf",
    "poise.preflight.readers.torchtitan",
    "poise.preflight.readers.recipe",
    "poise.preflight.readers.megatron",
)
"""Those that read files; ``model`` reads objects."""
