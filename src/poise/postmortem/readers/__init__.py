"""The log formats, one file each. A new format is a file here and a line in the table."""

READERS = (
    "poise.postmortem.readers.journal",
    "poise.postmortem.readers.tensorboard",
    "poise.postmortem.readers.wandb_file",
    "poise.postmortem.readers.mllog",
    "poise.postmortem.readers.hf",
    "poise.postmortem.readers.golden_values",
    "poise.postmortem.readers.megatron",
    "poise.postmortem.readers.nanotron",
    "poise.postmortem.readers.deepspeed",
    "poise.postmortem.readers.torchtitan",
    "poise.postmortem.readers.olmo",
    "poise.postmortem.readers.llmc",
    "poise.postmortem.readers.nanogpt",
    "poise.postmortem.readers.json_file",
    "poise.postmortem.readers.jsonl",
    "poise.postmortem.readers.table",
    "poise.postmortem.readers.stdout",
)
"""Modules with ``FORMAT``, ``LOOKS_FOR``, ``sniff`` and ``read``; the highest score reads, ties go to the first."""
