"""What a study declares before it runs, and its folder on disk.

A study is a folder: ``study.toml`` (the declaration, written once before the first run), ``cells/<key>.json`` (the
records), ``cells/<key>.partial`` (the state of a run that is not over), ``cells/<key>.failed`` (why a run failed), and
what is made of the records: ``table.txt``, ``result.json``, ``report.html``. A study of other contents needs another
folder: what was declared is never rewritten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from poise.core import config as configs
from poise.core.errors import UserError
from poise.data.prepare import Progress, prepare
from poise.data.store import Tokens, is_prepared, open_tokens
from poise.hardware import precision
from poise.model.build import build as build_model
from poise.studies import arms as arm_texts
from poise.studies import sizes
from poise.studies.arms import Arm
from poise.studies.cell import Cell, device, read_record, write_whole
from poise.train.optimizer import optimizer_for
from poise.train.recipe import Recipe

FORMAT: Final = 1
DECLARATION: Final = "study.toml"
MOST_POINTS: Final = 100
MOST_CELLS: Final = 100_000
NEAR: Final = 0.06
"""A point of a grid is rounded to one figure where that moves it by no more than this."""


@dataclass(frozen=True)
class Declaration:
    """What is going to be run, and what is expected of it.

    Attributes:
        name: of the kind of study, e.g. ``lr-sensitivity``.
        hypothesis: a sentence, written before anything runs.
        created: UTC date and time.
        size: name of the size.
        arms: as ``poise.studies.arms`` reads them.
        lrs: peak learning rates, growing.
        seeds: of the runs.
        text: fingerprint of the tokens.
        recipe: what all arms share, resolved.
        format: of the file.
    """

    name: str
    hypothesis: str
    created: str
    size: str
    arms: tuple[str, ...]
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    text: str
    recipe: Recipe
    format: int = FORMAT

    @cached_property
    def parsed(self) -> tuple[Arm, ...]:
        """The arms, read."""
        return arm_texts.parse_all(self.arms)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All runs in the order in which they are done.

        Seeds change last, so that a study that ends early has seen every arm and rate; arms change first, so that
        what disturbs the machine disturbs all of them.
        """
        recipes = {arm.label: arm.applied(self.recipe) for arm in self.parsed}
        return tuple(
            Cell(label, lr, seed, dataclasses.replace(recipe, seed=seed).replace("optim", lr=lr), self.text)
            for seed in self.seeds
            for lr in self.lrs
            for label, recipe in recipes.items()
        )

    def facts(self) -> dict[str, Any]:
        """Return the declaration as plain values for tables and pages.

        ``arms`` are the labels; ``arm_texts``, ``methods`` and ``changes_lr`` (reasons why the learning rate has
        another meaning) are by label.
        """
        return {
            **configs.to_dict(self),
            "arms": [arm.label for arm in self.parsed],
            "arm_texts": {arm.label: arm.text for arm in self.parsed},
            "methods": {arm.label: list(arm.methods) for arm in self.parsed},
            "changes_lr": {arm.label: arm_texts.changes_lr(arm) for arm in self.parsed},
            "cells": len(self.cells),
        }


@dataclass(frozen=True)
class Study:
    """A declared study in its folder."""

    folder: Path
    declaration: Declaration

    @property
    def cells_folder(self) -> Path:
        return self.folder / "cells"

    def record_of(self, cell: Cell) -> dict[str, Any] | None:
        """Return the record of a cell, or ``None`` where it is missing or damaged."""
        record = read_record(self.cells_folder / f"{cell.key}.json", cell.key)
        return None if record is None else record | {"arm": cell.arm}  # a cache knows it by another study's label

    def records(self) -> list[dict[str, Any]]:
        """Return the records that are there, in the order of the cells."""
        return [record for cell in self.declaration.cells if (record := self.record_of(cell)) is not None]

    def missing(self) -> list[Cell]:
        """Return the cells without a sound record, in order."""
        return [cell for cell in self.declaration.cells if self.record_of(cell) is None]

    def failures(self) -> dict[str, str]:
        """Return why cells failed, by key, for those that have failed and not been done since."""
        reasons = {}
        for cell in self.missing():
            path = self.cells_folder / f"{cell.key}.failed"
            if path.exists():
                reasons[cell.key] = path.read_text(encoding="utf-8", errors="replace").strip()
        return reasons

    def tokens(self) -> Tokens:
        """Open the text, preparing it again where that is gone.

        Raises:
            UserError: it is no longer the text that the study was declared on.
        """
        recipe = self.declaration.recipe
        kept = Path(recipe.data.dir)
        tokens = open_tokens(kept) if is_prepared(kept) else prepared(recipe.replace("data", dir=""))[0]
        if tokens.fingerprint != self.declaration.text:
            raise UserError(f"the text in '{tokens.dir}' is not the one this study was declared on; start a new study")
        return tokens


def lr_grid(text: str) -> tuple[float, ...]:
    """Read ``a:b:n``, n points evenly spaced in the logarithm, or a comma-separated list; growing.

    Points between the ends are rounded to one figure where that moves them by at most ``NEAR``, else to three.

    >>> lr_grid("3e-4:3e-1:7")
    (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    >>> lr_grid("1e-2,1e-3")
    (0.001, 0.01)

    Raises:
        UserError: not such a grid, or a rate that is not above 0.
    """
    spaced = ":" in text
    parts = text.split(":") if spaced else text.split(",")
    try:
        numbers = [float(part) for part in (parts[:2] if spaced else parts)]
        points = int(parts[2]) if spaced and len(parts) == 3 else 0
    except ValueError:
        raise UserError(
            f"the learning rates are '{text}'; write first:last:points or a list, as in {_EXAMPLES}"
        ) from None
    if spaced and len(parts) != 3:
        raise UserError(f"the learning rates are '{text}', which has {len(parts)} parts; write e.g. {_EXAMPLES}")
    if not all(0.0 < number < math.inf for number in numbers):
        raise UserError(f"the learning rates are '{text}'; use finite numbers above 0, as in {_EXAMPLES}")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"the learning rates are '{text}', where one comes twice; use different ones")
    if not spaced:
        return tuple(sorted(numbers))
    first, last = numbers
    if last < first or not 2 <= points <= MOST_POINTS:
        raise UserError(f"the learning rates are '{text}'; give the smaller end first and 2 to {MOST_POINTS} points")
    exact = [first * (last / first) ** (i / (points - 1)) for i in range(1, points - 1)]
    rounded = [first, *map(_rounded, exact), last]
    grows = all(a < b for a, b in pairwise(rounded))
    return tuple(rounded if grows else [first, *exact, last])


_EXAMPLES: Final = "3e-4:3e-1:7 or 1e-3,1e-2"


def _rounded(value: float) -> float:
    decade = math.floor(math.log10(value))
    for figure in (1, 10, 3, 2, 5, 4, 6, 7, 8, 9):  # 9.5e-4 is 1e-3 to people, though 9e-4 is nearer
        short = float(f"{figure}e{decade}")
        if abs(short / value - 1) <= NEAR:
            return short
    return float(f"{value:.3g}")


def seed_list(text: str) -> tuple[int, ...]:
    """Return the seeds 0 to n - 1 of a number n, or those of a list.

    >>> seed_list("3"), seed_list("3,4,")
    ((0, 1, 2), (3, 4))

    Raises:
        UserError: not a whole number above 0, nor a list of different whole numbers of 0 or more.
    """
    try:
        numbers = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        numbers = []
    if "," not in text and len(numbers) == 1 and 1 <= numbers[0] <= MOST_CELLS:
        return tuple(range(numbers[0]))
    if "," not in text or not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds is '{text}'; give the number of seeds, e.g. 3, or a list of them, e.g. 3,4,5")
    return tuple(numbers)


def expectation(labels: Sequence[str]) -> str:
    """Return the hypothesis of a study of learning-rate sensitivity that states none of its own.

    >>> expectation(["qk_norm", "baseline", "z_loss"])
    'each of qk_norm, z_loss has a lower LR sensitivity than baseline'
    """
    reference = arm_texts.BASELINE if arm_texts.BASELINE in labels else labels[0]
    others = [label for label in labels if label != reference]
    if not others:
        return f"none: {reference} is measured and compared with nothing"
    return f"{'each of ' if len(others) > 1 else ''}{', '.join(others)} has a lower LR sensitivity than {reference}"


def prepared(recipe: Recipe, progress: Progress | None = None) -> tuple[Tokens, Recipe]:
    """Prepare the recipe's text once for all runs; return it and the recipe that names its folder."""
    data = recipe.data
    done = prepare(
        data.source,
        Path(data.dir) if data.dir else None,
        data.settings,
        progress=progress,
    )
    return open_tokens(done.dir), recipe.replace("data", dir=str(done.dir.resolve()))


def plan(
    name: str,
    *,
    arms: Iterable[str],
    lrs: tuple[float, ...],
    seeds: tuple[int, ...],
    size: str,
    over: Mapping[str, Any] | None = None,
    hypothesis: str = "",
    progress: Progress | None = None,
) -> Declaration:
    """Return the declaration of a study, with everything in it checked; prepares the text.

    Args:
        name: of the kind of study.
        arms: one text an arm.
        lrs: growing.
        seeds: of the runs.
        size: a name of ``poise.studies.sizes``.
        over: recipe values for all arms; ``model.methods`` are methods that every arm has.
        hypothesis: empty for ``expectation``.
        progress: told of the preparation of the text.

    Raises:
        UserError: an unknown size, method or key, methods in conflict, two arms that are the same, a value that the
            study sets itself, text without a held-out part.
    """
    over = over or {}
    arm_texts.refuse_set_by_study(over)
    base = sizes.recipe(size, over)
    read = arm_texts.parse_all(arms)
    if (cells := len(read) * len(lrs) * len(seeds)) > MOST_CELLS:
        raise UserError(f"this study has {cells:,} runs; use at most {MOST_CELLS:,}")
    for arm in read:
        _try(arm, base, base.data.vocab_size)
    if base.data.val_fraction == 0:
        raise UserError("data.val_fraction is 0, but a study compares losses on held-out text; use e.g. 0.01")
    tokens, base = prepared(base, progress)
    needed = max(arm.applied(base).train.seq_len for arm in read) + 1
    if (held_out := len(tokens.split("val").tokens)) < needed:
        raise UserError(
            f"the held-out text has {held_out} tokens, and a sequence needs {needed}; "
            "use more text, a larger --data.val_fraction or a smaller --train.seq_len"
        )
    dtype = "bf16" if precision.pick_dtype(base.train.dtype, device()).itemsize == 2 else "fp32"
    declaration = Declaration(
        name=name,
        hypothesis=hypothesis.strip() or expectation([arm.label for arm in read]),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        size=size,
        arms=tuple(arm.text for arm in read),
        lrs=lrs,
        seeds=seeds,
        text=tokens.fingerprint,
        recipe=base.replace("train", dtype=dtype),
    )
    _all_different(declaration)
    return declaration


def _try(arm: Arm, base: Recipe, vocab_size: int) -> None:
    """Build an arm's model without memory and its optimizer: what cannot be is found before anything runs."""
    recipe = arm.applied(base)
    try:
        optimizer_for(recipe.optim, build_model(recipe.spec(vocab_size), seed=0, device="meta"))
        arm_texts.changes_lr(arm)
    except UserError as error:
        raise type(error)(f"arm '{arm.label}': {error}") from None


def _all_different(declaration: Declaration) -> None:
    seen: dict[str, str] = {}
    for cell in declaration.cells:
        if cell.key in seen:
            raise UserError(f"arms '{seen[cell.key]}' and '{cell.arm}' are the same runs; remove one")
        seen[cell.key] = cell.arm


# -- on disk -------------------------------------------------------------------------------------------------------


def declare(folder: Path, declaration: Declaration, *, keep_hypothesis: bool = False) -> Study:
    """Write the declaration into its folder, or go on with the same one that is there.

    Args:
        folder: of the study; made where it is missing.
        declaration: what is to be run.
        keep_hypothesis: the one that is there stands, because none was given this time.

    Raises:
        UserError: another study is declared there, or the folder cannot be written to.
    """
    path = folder / DECLARATION
    if path.exists():
        study = open_study(folder)
        _same(study, declaration, keep_hypothesis)
        return study
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"'{folder}' has other files in it; choose a folder of its own with --out")
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        write_whole(path, configs.to_toml(declaration).encode())
    except OSError as error:
        raise UserError(f"cannot write the study to '{folder}': {error.strerror}; choose another with --out") from None
    return Study(folder, declaration)


def open_study(folder: Path) -> Study:
    """Return the study in a folder.

    Raises:
        UserError: there is none, or its declaration is damaged or of another version.
    """
    path = folder / DECLARATION
    if not path.is_file():
        raise UserError(f"'{folder}' is not a study: it has no {DECLARATION}; give the folder that poise study wrote")
    values = configs.load(path)
    if values.get("format") != FORMAT:
        raise UserError(f"'{path}' has format {values.get('format')}, this poise reads {FORMAT}; start a new study")
    try:
        declaration = configs.build(Declaration, values, where=str(path))
        _ = declaration.cells
    except TypeError as error:
        raise UserError(f"'{path}' is damaged: {error}") from None
    return Study(folder, declaration)


def _same(study: Study, wanted: Declaration, keep_hypothesis: bool) -> None:
    there, here = (_flat(configs.to_dict(d)) for d in (study.declaration, wanted))
    ignored = {"created", "recipe.data.dir", *(["hypothesis"] if keep_hypothesis else [])}
    for name in here:
        if name not in ignored and there.get(name) != here[name]:
            raise UserError(
                f"'{study.folder}' declares another study: {name} is {_short(there.get(name))} there and "
                f"{_short(here[name])} here; choose another folder with --out"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."
