"""What a person sees while a run goes on: the observer behind ``poise train``, ``resume`` and ``demo``."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poise.core.journal import read, to_json
from poise.dashboard.live import Bar, Display
from poise.dashboard.summary import render_text, summarise
from poise.hardware.throughput import Meter
from poise.train.observers import Observer, StepReport


class Terminal(Observer):
    """Shows a live line on a terminal, plain lines when piped. Writes to standard error."""

    def __init__(self, title: str = "", progress: PrepareProgress | None = None) -> None:
        self._title = title
        self.progress = progress or PrepareProgress()
        self._display: Display | None = None
        self._meter: Meter | None = None
        self._total: int | None = None

    def on_start(self, run_record: Mapping[str, Any]) -> None:
        self.progress.close()
        parameters = run_record.get("parameters", 0) / 1e6
        recipe = run_record["recipe"]
        about = (
            f"{self._title or recipe['name']}: {parameters:.1f}M parameters, "
            f"{run_record['total_steps']} steps of {_size(run_record)} tokens, "
            f"{recipe['train']['dtype']}, compile {recipe['train']['compile']}"
        )
        self._total = run_record.get("total_tokens")
        notes = [about, *_about_text(run_record.get("data", {}))]
        if recipe["train"]["compile"] == "on":
            notes.append("compiling: the first step and the first evaluation take about half a minute")
        print("\n".join(notes), file=sys.stderr, flush=True)

    def on_step(self, report: StepReport) -> None:
        signals = report.signals
        tokens = round(report.tokens_per_s * report.seconds)
        if self._display is None or self._meter is None:
            self._display = Display(report.total_steps, sys.stderr)
            total = self._total or tokens * report.total_steps
            self._meter = Meter(total_tokens=total, done_tokens=signals.tokens - tokens)
        self._meter.update(tokens)
        eta = self._meter.eta_seconds
        self._display.update(
            step=signals.step,
            loss=signals.loss,
            smooth=report.smooth,
            grad_norm=signals.grad_norm,
            lr=signals.lr,
            tokens_per_s=self._meter.tokens_per_second or report.tokens_per_s,
            eta_s=math.nan if eta is None else eta,
            guard_state=report.guard_state,
        )

    def on_note(self, text: str) -> None:
        if self._display is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._display.note(text)

    def on_end(self, record: Mapping[str, Any]) -> None:
        if self._display is not None:
            self._display.close()


def _size(run_record: Mapping[str, Any]) -> str:
    """Return the tokens of a step, from the first to the full batch where it grows."""
    config, full = run_record["recipe"]["train"], run_record["tokens_per_step"]
    first = config.get("batch_start", 0) * config["seq_len"]
    return f"{first} to {full}" if 0 < first < full else str(full)


def _about_text(data: Mapping[str, Any]) -> list[str]:
    """Return a line for each thing about the text that a person should know."""
    lines = []
    if data.get("replaced_bytes"):
        lines.append(f"text: {data['replaced_bytes']:,} bytes were not valid UTF-8 and were replaced")
    skipped = [f"{count} x {reason}" for reason, count in data.get("skipped", {}).items() if reason != "empty file"]
    if skipped:
        lines.append(f"text: left out: {', '.join(skipped)}")
    if data.get("validation") is False:
        lines.append("text: no held-out part long enough for one sequence, so there is no validation loss")
    return lines


class PrepareProgress:
    """The ``progress`` callback of text preparation, as a bar per stage."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != self._stage:
            self.close()
            counted = None if total == 1 else total  # a stage of one piece has no rate
            self._bar, self._stage = Bar(stage, counted, sys.stderr), stage
        if self._bar is not None and total != 1:
            self._bar.update(done, total)

    def close(self) -> None:
        """End the line of the last stage."""
        if self._bar is not None:
            self._bar.close()
            self._bar, self._stage = None, ""


def show_summary(folder: Path, next_commands: list[str]) -> None:
    """Print what the run did, from its journal, and what to try next."""
    print(render_text(summarise(read(folder / "journal.jsonl")), folder, next_commands))


def summary_json(folder: Path, outcome: str) -> str:
    """Return the same figures for a program, as one line of JSON."""
    figures = dataclasses.asdict(summarise(read(folder / "journal.jsonl")))
    return to_json({"run": str(folder), "outcome": outcome, **figures})
