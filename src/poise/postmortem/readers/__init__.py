"""The log formats, one file each. A new format is a file here and a line in the table."""

READERS = (
    "poise.postmortem.readers.journal",
    "poise.postmortem.readers.jsonl",
    "poise.postmortem.readers.table",
)
"""Modules with ``FORMAT``, ``LOOKS_FOR``, ``sniff`` and ``read``; the highest score reads, ties go to the first."""
