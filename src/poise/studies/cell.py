"""A cell: one training run of a study, from a resolved recipe to a record of plain numbers.

The loop is the trainer's without its guard, journal and checkpoints, because a study is thousands of tiny runs; a test
holds it to the losses of ``poise train``, bit for bit. A cell that was stopped or killed goes on from the state that it
saves about once a minute, and ends as it would have.

A record is JSON. Numbers that are not finite are the strings "nan", "inf" and "-inf", as in a journal;
``read_record`` turns them back. Its fields:

    format, key, arm, lr, seed, recipe, params, params_non_embedding, threads, device, environment
    init_loss, final_loss, best_val   validation loss before the first step, after the last (nan unless the run
                                      finished), and the least after any step
    ended                             "finished", or "nonfinite": the loss or the gradient norm was no number
    steps, steps_done                 of the budget, and weight updates that were made
    loss, grad_norm                   cross-entropy and raw gradient norm of each step; the last ones of a run that
                                      ended "nonfinite" are those of the step that was not made
    val                               [[step, validation loss], ...]
    max_logit, max_logit_block0       [[step, largest attention logit], ...] over all blocks, and in the first one;
                                      null where the model has no such logit
    seconds_per_step, seconds         median of a step's wall time without its evaluations, and all of the time
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch

from poise.core import config as configs
from poise.core.errors import UserError
from poise.core.journal import to_json
from poise.data.feed.loader import Loader
from poise.data.store import Tokens
from poise.hardware import environment, precision
from poise.hardware.state import pack, unpack
from poise.model.build import build
from poise.model.counts import count
from poise.optim.schedules import lr_at
from poise.studies.attention_logits import largest_logits
from poise.train.evaluate import arguments_of, validation_loss
from poise.train.optimizer import optimizer_for
from poise.train.position import Position, batches, micro_batches, upcoming, view_at, weighed
from poise.train.recipe import Recipe

FORMAT: Final = 1
"""Of the record. A record of another format is not read, and its cell is run again."""
CODE_VERSION: Final = 2
"""Of what a cell computes; it is part of the key. Raise it when the same recipe would give other numbers."""
SAMPLES: Final = 10
"""Times that the attention logits are looked at in a run, besides the start."""
SEQUENCES: Final = 2
"""Sequences of the held-out text whose logits are looked at."""
WARM: Final = 5
"""Steps at the start whose time does not count."""

UNUSED: Final[Mapping[str, str]] = {
    "name": "a study's folder is chosen with --out",
    "guard": "cells run without a guard",
    "train.compile": "cells are too short for it",
    "train.save_every": "a cell keeps its own state",
    "train.keep_last": "a cell keeps its own state",
    "train.keep_best": "a cell keeps its own state",
    "train.linear_norms_every": "a cell keeps no journal",
    "train.row_losses": "a cell keeps no journal",
    "train.recompute": "cells are too small for it",
    "train.threads": "use --threads",
}
"""Recipe keys that a cell does not read, and why; they are not part of its key."""

_NUMBERS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TEXTS: Final = frozenset({"key", "arm", "recipe", "ended", "device", "environment"})
_SCALARS: Final = (
    *("lr", "seed", "params", "params_non_embedding", "init_loss", "final_loss", "best_val", "steps_done", "steps"),
    *("seconds_per_step", "seconds", "threads"),
)
_FIELDS: Final = {
    *("format", "key", "arm", "lr", "seed", "recipe", "params", "params_non_embedding", "init_loss", "final_loss"),
    *("best_val", "steps_done", "steps", "ended", "loss", "grad_norm", "val", "max_logit", "max_logit_block0"),
    *("seconds_per_step", "seconds", "threads", "device", "environment"),
}


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The cell was asked to stop; its state is on disk."""


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        arm: label of what is compared, e.g. ``qk_norm+soft_cap``.
        lr: peak learning rate, the recipe's.
        seed: of weights and data order, the recipe's.
        recipe: the whole run; its dtype is resolved.
        text: fingerprint of the tokens it trains on.
    """

    arm: str
    lr: float
    seed: int
    recipe: Recipe
    text: str

    def __post_init__(self) -> None:
        assert (self.lr, self.seed) == (self.recipe.optim.lr, self.recipe.seed), self
        assert self.recipe.train.dtype != "auto", "resolve the dtype first: the key depends on it"

    @cached_property
    def key(self) -> str:
        """A hash of everything that the result depends on: no folder, no label, no number of threads."""
        version = ".".join(torch.__version__.split(".")[:2])
        matters = {"recipe": _without_unused(self.recipe), "text": self.text, "code": CODE_VERSION, "torch": version}
        return hashlib.blake2b(json.dumps(matters, sort_keys=True).encode(), digest_size=10).hexdigest()


def _without_unused(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's values that decide the result; the text is known by its fingerprint."""
    values = configs.to_dict(recipe)
    validates = values.pop("data")["val_fraction"] > 0
    feed = asdict(recipe.data.feed)
    for name in UNUSED:
        section, _, key = name.rpartition(".")
        (values[section] if section else values).pop(key)
    return {**values, "validates": validates, "feed": feed}


def run_cell(
    cell: Cell,
    tokens: Tokens,
    folder: Path,
    *,
    every_seconds: float = 60.0,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train a cell, or the rest of it, and write its record to ``folder/<key>.json``, whole or not at all.

    Args:
        cell: what to train.
        tokens: the text, whose fingerprint is the cell's.
        folder: exists; also takes ``<key>.partial``, the state of a cell that is not over.
        every_seconds: of training, from one saved state to the next.
        stop: asked after each step; if true, the state is saved and ``Stopped`` raised.
        progress: told the number of steps done, after each.

    Returns:
        The record, as ``read_record`` returns it.

    Raises:
        Stopped: see ``stop``.
        UserError: the tokens are others than the cell's, or there is no held-out text.
        OSError: the record or the state cannot be written.
    """
    if tokens.fingerprint != cell.text:
        raise UserError(f"the text in '{tokens.dir}' has changed since the study was declared; start a new study")
    training = _Training(cell, tokens)
    partial = folder / f"{cell.key}.partial"
    training.load(partial)
    state, steps = training.state, cell.recipe.train.steps
    training.begin()
    saved = time.perf_counter()
    while state.step < steps and training.step():
        training.measure_if_due()
        if progress is not None:
            progress(state.step)
        if state.step == steps:
            break
        asked = stop is not None and stop()
        if asked or time.perf_counter() - saved >= every_seconds:
            training.save(partial)
            saved = time.perf_counter()
        if asked:
            raise Stopped(cell.key)
    record = training.record()
    write_whole(folder / f"{cell.key}.json", (to_json(record) + "\n").encode())
    partial.unlink(missing_ok=True)
    return record


def read_record(path: Path, key: str) -> dict[str, Any] | None:
    """Return the record of the cell ``key`` with its numbers, or ``None`` where the file is missing or damaged.

    Damaged is also one with a value of another type; its cell is run again.
    """
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or not record.keys() >= _FIELDS:
        return None
    if record["format"] != FORMAT or record["key"] != key or record["ended"] not in ("finished", "nonfinite"):
        return None
    record = {name: value if name in _TEXTS else _decode(value) for name, value in record.items()}
    return record if _sound(record) else None


def _sound(record: Mapping[str, Any]) -> bool:
    """Return whether every field of a decoded record is of its type."""

    def series(value: object) -> bool:
        return isinstance(value, list) and all(map(_is_number, value))

    def rows(value: object) -> bool:
        return isinstance(value, list) and all(isinstance(row, list) and len(row) == 2 and series(row) for row in value)

    return (
        all(isinstance(record[name], str) for name in ("arm", "device"))
        and all(isinstance(record[name], dict) for name in ("recipe", "environment"))
        and all(_is_number(record[name]) for name in _SCALARS)
        and all(isinstance(record[name], int) for name in ("seed", "steps", "steps_done", "params"))
        and series(record["loss"])
        and series(record["grad_norm"])
        and rows(record["val"])
        and all(record[name] is None or rows(record[name]) for name in ("max_logit", "max_logit_block0"))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NUMBERS.get(value, value)
    return [_decode(inner) for inner in value] if isinstance(value, list) else value


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also where two processes write the same one."""
    aside = path.with_name(f"{path.name}.new-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def device() -> torch.device:
    """Return where cells run: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- the run -------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """Where a cell is and what it has seen; plain values, saved with the weights. Times in seconds."""

    step: int = 0
    seconds: float = 0.0
    init_loss: float = math.nan
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    val: list[list[float]] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)
    """A step, then the largest logit of each block."""
    step_seconds: list[float] = field(default_factory=list)


class _Training:
    """A cell's model, optimizer, data and state."""

    def __init__(self, cell: Cell, tokens: Tokens) -> None:
        recipe = cell.recipe
        self._cell, self._recipe, config = cell, recipe, recipe.train
        self._began = time.perf_counter()
        self._device = device()
        dtype = precision.pick_dtype(config.dtype, self._device)
        spec = recipe.spec(tokens.vocab_size)
        self._model = build(spec, seed=recipe.seed, device=self._device, compute_dtype=dtype)
        self._optimizer = optimizer_for(recipe.optim, self._model)
        self._loader = Loader(tokens, config.seq_len, recipe.seed, feed=recipe.data.feed)
        self._validation = Loader(tokens, config.seq_len, recipe.seed, "val", recipe.data.feed)
        self.state = _State()
        self._ended = "finished"
        self._sampled = {round(config.steps * part / SAMPLES) for part in range(SAMPLES + 1)} | {config.steps}

    def begin(self) -> None:
        """Measure what there is before the first step."""
        if self.state.step == 0:
            self.state.init_loss = self._evaluate()
            self._look()

    def step(self) -> bool:
        """Do one step, as the trainer does; return false, with nothing changed, where loss or gradient is no number."""
        state, recipe, config = self.state, self._recipe, self._recipe.train
        began = time.perf_counter()
        number = state.step + 1
        growing = config.batch_ramp
        first = growing.first_sample(number) if growing else state.step * config.batch_size
        at = Position(state.step, first, first * config.seq_len)
        factor = lr_at(number, config.steps, recipe.optim.schedule)
        if growing is not None:  # only then: a run multiplies in the same order
            factor *= growing.lr_factor(at.tokens)
        self._optimizer.set_lr(recipe.optim.lr * factor)
        parts, losses = micro_batches(recipe, upcoming(recipe, at), 0, 1), []
        for batch, weight in batches(self._loader, parts, view_at(recipe, at), self._device):
            inputs, targets, named = arguments_of(batch, self._device)
            out = self._model(inputs, targets, **named)
            (weighed(out.loss, weight) * (1 / len(parts))).backward()
            losses.append(weighed(out.ce.detach(), weight))
        mean = torch.stack(losses).mean()
        loss, norm = torch.stack([mean, self._optimizer.measure().to(mean)]).tolist()
        state.loss.append(loss)
        state.grad_norm.append(norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._ended = "nonfinite"
            return False
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        state.step = number
        state.step_seconds.append(time.perf_counter() - began)
        return True

    def measure_if_due(self) -> None:
        """Evaluate where the recipe says so, and look at the attention logits ``SAMPLES`` times a run."""
        step, config = self.state.step, self._recipe.train
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            self.state.val.append([step, self._evaluate()])
        if step in self._sampled:
            self._look()

    def _evaluate(self) -> float:
        config = self._recipe.train
        return validation_loss(self._model, self._validation, config.eval_batches, config.batch_size, self._device)

    def _look(self) -> None:
        batch = self._validation.batch(0, min(SEQUENCES, self._validation.sequences))
        inputs_BT, _, named = arguments_of(batch, self._device)
        self.state.logits.append([self.state.step, *largest_logits(self._model, inputs_BT, **named)])

    # -- what is kept ----------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything that the rest of the run depends on."""
        now = time.perf_counter()
        self.state.seconds += now - self._began
        self._began = now
        aside = path.with_name(f"{path.name}.new-{os.getpid()}")
        content = {"key": self._cell.key, "state": asdict(self.state), **pack(self._model, self._optimizer)}
        try:
            torch.save(content, aside)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def load(self, path: Path) -> None:
        """Go on from a saved state where there is a sound one of this very cell; else from the start."""
        try:
            saved = torch.load(path, map_location=self._device, weights_only=True)
        except FileNotFoundError:
            return
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
            return  # cut off or damaged: it saves time and nothing else
        if isinstance(saved, dict) and saved.get("key") == self._cell.key:
            unpack(self._model, self._optimizer, saved)
            self.state = _State(**saved["state"])

    def record(self) -> dict[str, Any]:
        """Return the record of a run that is over."""
        state, cell, recipe = self.state, self._cell, self._recipe
        if self._ended != "finished":
            self._look()  # the weights before the step that was no number
        finished = self._ended == "finished" and state.val and math.isfinite(state.val[-1][1])
        logits = [row for row in state.logits if len(row) > 1]
        counts = count(self._model.spec)
        return {
            "format": FORMAT,
            "key": cell.key,
            "arm": cell.arm,
            "lr": cell.lr,
            "seed": cell.seed,
            "recipe": configs.to_dict(recipe),
            "params": counts.params,
            "params_non_embedding": counts.params_non_embedding,
            "init_loss": state.init_loss,
            "final_loss": state.val[-1][1] if finished else math.nan,
            "best_val": min((value for _, value in state.val if math.isfinite(value)), default=math.nan),
            "steps_done": state.step,
            "steps": recipe.train.steps,
            "ended": self._ended,
            "loss": state.loss,
            "grad_norm": state.grad_norm,
            "val": state.val,
            "max_logit": [[int(step), _largest(of_blocks)] for step, *of_blocks in logits] or None,
            "max_logit_block0": [[int(row[0]), row[1]] for row in logits] or None,
            "seconds_per_step": statistics.median(state.step_seconds[WARM:] or state.step_seconds or [math.nan]),
            "seconds": state.seconds + time.perf_counter() - self._began,
            "threads": torch.get_num_threads(),
            "device": self._device.type,
            "environment": environment.describe(),
        }


def _largest(values: list[float]) -> float:
    """Return the largest value; nan where one is nan."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)
