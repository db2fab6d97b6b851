"""Rules by topic: file -> its ``RULES``. The files are imported when ``poise.preflight.check`` is."""

FILES = (
    "values",
    "init",
    "architecture",
    "optimizer",
    "schedule",
    "precision",
    "data",
    "reliability",
    "shape",
    "methods",
)
"""In the order in which findings of equal severity are listed."""
