"""Data with everything odd in it, and runs that use every way to show it."""

from __future__ import annotations

import importlib
import inspect
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from poise.core.journal import read, timeline
from poise.core.types import Batch, Decision, DropData, Signals, Skip
from poise.data.prepare import prepare
from poise.data.settings import Settings
from poise.train.observers import Observer, StepReport
from poise.train.recipe import load
from poise.train.run import train
from poise.train.state import Run

SMALL: dict[str, Any] = {
    "model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "methods": ["qk_norm"]},
    "optim": {"lr": 5e-3, "schedule": {"warmup_steps": 5}},
    "train": {
        "steps": 40,
        "batch_size": 4,
        "seq_len": 32,
        "eval_every": 0,
        "save_every": 10,
        "keep_last": 9,
        "compile": "off",
        "dtype": "fp32",
        "threads": 1,
    },
}

ALL_AT_ONCE: dict[str, Any] = {
    "data": {"mix": ["web=0.7", "books=0.3@30"], "pack": "best_fit", "document_mask": True},
    "train": {
        "length_start": 8,
        "length_tokens": 1800,
        "batch_start": 2,
        "batch_tokens": 1500,
        "both_ramps": True,
        "row_losses": True,
        "micro_batch": 2,
    },
}
"""Every option of the data that changes what a step shows."""


@dataclass
class Seen:
    """A run, and the batches that it trained on: (step, micro-batches) in the order of its tries."""

    run: Run
    tries: list[tuple[int, list[Batch]]] = field(default_factory=list)

    def records(self) -> list[dict[str, Any]]:
        assert self.run.journal is not None
        return read(self.run.journal.path)

    def steps(self) -> dict[int, dict[str, Any]]:
        return {r["step"]: r for r in timeline(self.records()) if r["type"] == "step"}

    def batches(self) -> dict[int, list[Batch]]:
        """The batches of the tries that count."""
        return dict(self.tries)


class Hooked(Observer):
    """Calls a function after a step."""

    def __init__(self, hook: Callable[[int], None]) -> None:
        self.hook = hook

    def on_step(self, report: StepReport) -> None:
        self.hook(report.signals.step)


def stop_at(step: int) -> Observer:
    """Ask the run to stop after a step, as a scheduler would."""
    return Hooked(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == step else None)


def watch(run: Run) -> Seen:
    """Write down every micro-batch that a run trains on."""
    seen, inner = Seen(run), run.backward

    def backward(batch: Batch) -> None:
        if not run._rows:  # the first of a step
            seen.tries.append((run.position.step, []))
        seen.tries[-1][1].append(batch)
        inner(batch)

    run.backward = backward  # type: ignore[method-assign]
    return seen


def decide_by(run: Run, decide: Callable[[Run, Signals], Decision | None]) -> None:
    """Let a function decide before the guard does."""
    real = run.guard.decide
    run.guard.decide = lambda *args, **named: decide(run, args[0]) or real(*args, **named)  # type: ignore[method-assign]


@contextmanager
def without_pages() -> Iterator[None]:
    """Nobody reads the pages of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise.train.run.write_report", lambda folder: None)
        yield


@pytest.fixture(scope="session")
def odd_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources; in the first a text that repeats itself, and one that was there three times."""
    root = tmp_path_factory.mktemp("odd")
    for name, modules in (("web", ("json", "pathlib", "typing")), ("books", ("shutil", "logging"))):
        (root / name).mkdir()
        for module in modules:
            text = inspect.getsource(importlib.import_module(module))
            for number, start in enumerate(range(0, min(len(text), 24_000), 1500)):
                (root / name / f"{module}{number:02}.md").write_text(text[start : start + 1500], encoding="utf-8")
    (root / "web" / "noise.md").write_text("It begins. " + "spam and eggs " * 60 + "It ends.", encoding="utf-8")
    for copy in ("a", "b", "c"):
        (root / "web" / f"copy-{copy}.md").write_text("A text that came three times. " * 4, encoding="utf-8")
    settings = Settings(vocab_size=400, val_fraction=0.1, dedup="exact")
    return prepare([f"{name}={root / name}" for name in ("web", "books")], root / "tokens", settings).dir


def small_on(tokens: Path, **over: Any) -> dict[str, Any]:
    """Overrides that turn the nano recipe into a run of a tiny model on some data, and any others on top."""
    data = {"source": str(tokens), "vocab_size": 400, "val_fraction": 0.1}
    return {
        **SMALL,
        "guard": over.get("guard", {}),
        "data": data | over.get("data", {}),
        "train": {**SMALL["train"], **over.get("train", {})},
    }


@pytest.fixture
def small(odd_tokens: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """``small_on`` the odd data; the runs of the test write no pages."""
    with without_pages():
        yield partial(small_on, odd_tokens)


def storm(run: Run, signals: Signals) -> Decision | None:
    """A batch is taken again, samples and documents are dropped; later the run goes back behind it (``go_back``)."""
    tried = run.position.next_sample
    match signals.step:
        case 8 if not hasattr(run, "was_at_8"):
            run.was_at_8 = True  # type: ignore[attr-defined]
            return Skip(again=True, reason="odd batch")
        case 15:
            return DropData(first=tried + 3, last=tried + 5, documents=tuple(range(9)))
    return None


@pytest.fixture(scope="session")
def stormy(odd_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """40 steps with all at once: ramps, mixture, packing, masks, a batch taken again, drops, a rollback. Read only."""
    found: list[Seen] = []

    def before(run: Run) -> None:
        decide_by(run, storm)
        found.append(watch(run))

    def go_back(step: int) -> None:
        run = found[0].run
        if step == 27 and not any(r["type"] == "rollback" for r in found[0].records()):
            run.host.drop_documents(range(30, 36))  # type: ignore[attr-defined]
            run.host.rollback(20, True)

    folder = tmp_path_factory.mktemp("stormy") / "run"
    values = small_on(odd_tokens, **ALL_AT_ONCE, guard={"enabled": True})
    with without_pages():
        assert train(load("nano", values), folder, observers=[Hooked(go_back)], before=before).reason == "finished"
    del found[0].run.backward  # replays are not among its tries
    return found[0]
