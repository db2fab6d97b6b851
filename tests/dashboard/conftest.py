"""Journals made up for tests: what the trainer writes, without training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Record = dict[str, Any]
START = 1_700_000_000.0


def decay(step: int, rng: random.Random) -> float:
    """A loss that looks like training: 9 falling to about 3.4, with noise."""
    return 3.3 + 5.7 * math.exp(-step / 70) + rng.gauss(0, 0.06)


class Maker:
    """Writes records as the journal encodes them, with a clock of its own."""

    def __init__(self, total: int = 400, seed: int = 0) -> None:
        self.records: list[Record] = []
        self.total = total
        self.time = START
        self.rng = random.Random(seed)

    def add(self, type_: str, /, **fields: Any) -> None:
        self.records.append({"type": type_, "time": round(self.time, 3), **fields})

    def run(self, **fields: Any) -> None:
        self.add(
            "run",
            format=1,
            recipe={"name": "tiny", "optim": {"lr": 0.003}},
            command="poise train tiny --optim.lr 0.003",
            environment={"python": "3.11.9", "torch": "2.13.0", "cpu": {"model": "a CPU", "cores": 2}},
            **({"parameters": 10_600_000, "tokens_per_step": 4096, "total_steps": self.total} | fields),
        )
        self.time += 1.5

    def step(self, step: int, loss: float | None = None, **fields: Any) -> None:
        value = decay(step, self.rng) if loss is None else loss
        seconds = 0.31 + self.rng.random() * 0.02
        self.time += seconds
        self.add(
            "step",
            **{
                "step": step,
                "loss": value,
                "grad_norm": 0.8 + 2 * math.exp(-step / 40) + abs(self.rng.gauss(0, 0.1)),
                "lr": 0.003 * min(step / 40, 0.1 + 0.9 * (1 + math.cos(math.pi * step / self.total)) / 2),
                "tokens": step * 4096,
                "sample": step * 8,
                "action": "proceed",
                "seconds": seconds,
                "tokens_per_s": 4096 / seconds,
            }
            | fields,
        )

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.step(step)
            if step % 100 == 0:
                self.add("eval", step=step, loss=decay(step, self.rng) + 0.05)
                self.add("save", step=step, path=f"checkpoints/{step}", seconds=0.2, bytes=42_000_000)

    def alarm(self, step: int, action: str, kind: str = "fast_spike", value: float = 30.0, **fields: Any) -> None:
        self.add(
            "event",
            step=step,
            kind=kind,
            severity="critical",
            signal="loss",
            value=value,
            expected=3.6,
            detector="robust",
            message=f"the loss is {value:g}, a healthy run would show about 3.6",
            **fields,
        )
        reason = "the gradient of a batch like this one would undo many steps"
        if action != "proceed":
            self.add("decision", step=step, action=action, reason=reason, alarms=[kind])

    def end(self, step: int, reason: str = "finished", message: str = "") -> None:
        self.add("end", step=step, reason=reason, message=message)

    def text(self) -> str:
        return "".join(json.dumps(_encode(r), allow_nan=False) + "\n" for r in self.records)

    def write(self, run_dir: Path, recipe: bool = True) -> Path:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "journal.jsonl").write_text(self.text(), encoding="utf-8")
        if recipe:
            (run_dir / "recipe.toml").write_text('name = "tiny"\n\n[optim]\nlr = 0.003\n', encoding="utf-8")
        return run_dir


def _encode(record: Record) -> Record:
    names = {math.inf: "inf", -math.inf: "-inf"}
    return {k: v if not isinstance(v, float) or math.isfinite(v) else names.get(v, "nan") for k, v in record.items()}


def healthy(total: int = 400) -> Maker:
    maker = Maker(total)
    maker.run()
    maker.steps(1, total)
    maker.end(total)
    return maker


def spiked() -> Maker:
    """Two injected garbage batches, both skipped."""
    maker = Maker()
    maker.run()
    for first, last in ((1, 149), (151, 262), (264, 400)):
        maker.steps(first, last)
        if last < 400:
            step = last + 1
            maker.add(
                "event",
                step=step,
                kind="garbage_batch",
                severity="note",
                signal="",
                value=0.0,
                expected=0.0,
                detector="injector",
                message="injected",
                injected="garbage_batch",
                length=1,
            )
            maker.step(step, loss=10.4, grad_norm=31.0, action="skip")
            maker.alarm(step, "skip", value=10.4)
    maker.end(400)
    return maker


def with_nan(guarded: bool = True) -> Maker:
    """A NaN at step 200: skipped under a guard, the end of the model without one."""
    maker = Maker()
    maker.run()
    maker.steps(1, 199)
    maker.step(200, loss=math.nan, grad_norm=math.nan, action="skip" if guarded else "proceed")
    if guarded:
        maker.alarm(200, "skip", kind="nonfinite", value=math.nan)
        maker.steps(201, 400)
    else:
        for step in range(201, 401):
            maker.step(step, loss=math.nan, grad_norm=math.nan)
    maker.end(400)
    return maker


def rolled_back() -> Maker:
    """A divergence from step 230 on; at step 250 back to the checkpoint of step 200."""
    maker = Maker()
    maker.run()
    maker.steps(1, 229)
    for step in range(230, 250):
        maker.step(step, loss=3.6 + 0.02 * (step - 229) ** 1.7)
    maker.step(250, loss=8.1, action="rollback")
    maker.alarm(250, "rollback", kind="slow_divergence", value=8.1)
    maker.add("rollback", step=250, to=200, dropped_first=1600, dropped_last=2007)
    maker.steps(201, 400)
    maker.end(400)
    return maker


def crashed() -> Maker:
    maker = Maker()
    maker.run()
    maker.steps(1, 217)
    return maker


@pytest.fixture
def made() -> Callable[..., Maker]:
    """Return a maker of journals by name, e.g. ``made("spiked")``."""
    kinds: dict[str, Callable[..., Maker]] = {f.__name__: f for f in (healthy, spiked, with_nan, rolled_back, crashed)}

    def make(name: str, **options: Any) -> Maker:
        return kinds[name](**options)

    return make
