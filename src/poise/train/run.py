"""From a recipe to a finished run: the two functions behind ``poise train`` and ``poise resume``.

A run is a folder: ``recipe.toml`` (every value, resolved), ``journal.jsonl``, ``checkpoints/``,
``report.html``. It is never overwritten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from poise.core import config as configs
from poise.core.errors import UserError
from poise.core.journal import Journal, timeline
from poise.dashboard.report import write_report
from poise.data import sources, store
from poise.data.feed.loader import Loader
from poise.data.prepare import prepare
from poise.data.sources import STDLIB
from poise.data.store import Tokens, is_prepared, open_tokens
from poise.guard.guard import build as build_guard
from poise.guard.signals.linears import LinearNorms
from poise.hardware import compiler, distributed, environment, precision, sharding, throughput
from poise.hardware.checkpoint import CheckpointStore
from poise.model.build import build as build_model
from poise.model.counts import count
from poise.train import loop
from poise.train.budget import UTILISATION
from poise.train.drop import Drop
from poise.train.folder import new_folder, write_recipe
from poise.train.history import records_of
from poise.train.host import TrainHost
from poise.train.observers import Observer
from poise.train.optimizer import optimizer_for
from poise.train.recipe import Recipe
from poise.train.senses import Blind, Senses
from poise.train.state import Run

log = logging.getLogger("poise")

JOURNAL_FORMAT = 1
MOST_WHILE_RANKS_WAIT = 2**30
"""Bytes of text that rank 0 prepares while the others wait: minutes; their patience is half an hour."""

WORTH_COMPILING_S = 600.0
"""``compile = auto`` compiles from this many seconds of expected run time. A cold compile costs about 30 s, and on a
busy machine the expectation is too long."""

Progress = Callable[[str, int, int | None], None]


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    observers: Sequence[Observer] = (),
    progress: Progress | None = None,
    command: str = "",
    before: Callable[[Run], None] | None = None,
) -> loop.Outcome:
    """Train ``recipe`` from the start in the new folder ``out``.

    Args:
        observers: told what happens; they cannot steer.
        progress: called as (stage, done, total or None) while text is prepared.
        command: the command line, for the report.
        before: called with the assembled run before its first step (fault injection, extra logging).

    Raises:
        UserError: the folder exists, or the recipe, the text or the machine cannot do this.
    """
    world = distributed.init()
    folder = Path(out)
    if world.rank == 0:
        new_folder(folder)
    try:
        tokens, recipe = prepared(recipe, progress, world)
        recipe = resolve(recipe, tokens)
        loader = check(recipe, tokens, world)
        if world.rank == 0:
            write_recipe(recipe, folder)
    except BaseException:
        if world.rank == 0:
            folder.rmdir()  # still empty: nothing of the user's is lost
        raise
    distributed.barrier()
    run = assemble(recipe, folder, tokens, world, observers, loader)
    with _closing(run, folder):
        _write_run_record(run, command)
        if before is not None:
            before(run)
        return _attempt(run)


def resume(
    folder: str | Path,
    over: Mapping[str, Any] | None = None,
    *,
    observers: Sequence[Observer] = (),
    command: str = "",
    drop: Drop | None = None,
) -> loop.Outcome | None:
    """Go on with a run from its newest verified checkpoint; ``None`` when it has finished already.

    Args:
        over: values of the recipe to change.
        drop: samples and documents not to train on from here on; later resumes keep to it.

    Raises:
        UserError: no run there, its text has changed, ``over`` changes what a checkpoint fixes, or ``drop`` names a
            document that is not there or leaves too few samples of a mixture.
    """
    folder = Path(folder)
    recipe = read_recipe(folder, over)
    world = distributed.init()
    # Rank 0 alone reads: a long journal is large, and others might see an older one on a slow file system.
    records = records_of(folder / "journal.jsonl") if world.rank == 0 else []
    done, over_now, before = distributed.broadcast(
        (_steps_done(records), finished(records, recipe), Drop.asked_before(records))
    )
    if recipe.train.steps < done:
        raise UserError(f"the run has done {done} steps, train.steps is {recipe.train.steps}; use a larger number")
    if over_now:
        return None
    # What was prepared for this run stays, even if its source has changed since; only if it is gone, it is remade.
    kept = Path(recipe.data.dir)
    tokens = open_tokens(kept) if distributed.broadcast(is_prepared(kept)) else prepared(recipe, None, world)[0]
    loader = check(recipe, tokens, world)
    run = assemble(recipe, folder, tokens, world, observers, loader)
    with _closing(run, folder):
        wished = drop or Drop()
        wished.check(run)  # before the journal knows of it
        _take_up(run, folder, records, done, over, command, before, wished)
        before.and_also(wished).apply(run)
        return _attempt(run)


def _steps_done(records: Sequence[Mapping[str, Any]]) -> int:
    return max((record["step"] for record in timeline(records)), default=0)


def finished(records: Sequence[Mapping[str, Any]], recipe: Recipe) -> bool:
    """Whether the journal says that the whole budget has been used."""
    ends = [r for r in records if r["type"] == "end"]
    return bool(ends) and ends[-1]["reason"] == "finished" and ends[-1]["step"] >= recipe.train.steps


def read_recipe(folder: Path, over: Mapping[str, Any] | None = None) -> Recipe:
    """Read a run folder's recipe; ``over`` may change what a checkpoint does not fix."""
    if not (folder / "recipe.toml").is_file():
        raise UserError(f"'{folder}' is not a run: it has no recipe.toml; give the folder that poise train wrote")
    values = configs.load(folder / "recipe.toml")
    recipe = configs.build(Recipe, configs.merge(values, over or {}))
    fixed = configs.build(Recipe, values)
    # The place of the data may change: what it holds is compared with the checkpoint's.
    elsewhere = fixed.replace("data", dir=recipe.data.dir)
    for section in ("seed", "model", "data"):
        if getattr(recipe, section) != getattr(elsewhere, section):
            raise UserError(f"a resumed run cannot change '{section}'; start a new run: poise train ... --{section}")
    for key in ("seq_len", "batch_size", "dtype", "length_start", "length_tokens", "batch_start", "batch_tokens"):
        if getattr(recipe.train, key) != getattr(fixed.train, key):
            raise UserError(f"a resumed run cannot change 'train.{key}'; start a new run for that")
    return recipe


def prepared(recipe: Recipe, progress: Progress | None, world: distributed.World) -> tuple[Tokens, Recipe]:
    """Return the recipe's text as tokens, preparing it where that has not been done; rank 0 does the work."""
    data = recipe.data
    folder = Path(data.dir) if data.dir else None
    if world.rank == 0:
        if world.size > 1:
            _refuse_long_preparation(data.source)
        folder = prepare(data.source, folder, data.settings, progress=progress).dir
    folder = Path(distributed.broadcast(str(folder)))
    return open_tokens(folder), recipe.replace("data", dir=str(folder.resolve()))


def _refuse_long_preparation(source: str) -> None:
    """Raise a ``UserError`` where the other ranks would wait for the text until their patience is over."""
    if source == STDLIB or is_prepared(Path(source).expanduser()):
        return
    size = sources.resolve(source).size
    if size is None or size > MOST_WHILE_RANKS_WAIT:
        raise UserError(
            f"'{source}' takes too long to prepare while other processes wait; do it first with poise data prepare "
            f"{source} --out DIR, then train with --data.source DIR"
        )


def resolve(recipe: Recipe, tokens: Tokens) -> Recipe:
    """Replace every ``auto`` by what it means on this machine, so that a resumed run means the same."""
    config = recipe.train
    device = distributed.init().device
    dtype = precision.pick_dtype(config.dtype, device)
    compiled = config.compile
    if compiled == "auto":
        compiled = "off"
        if expected_seconds(recipe, tokens.vocab_size) > WORTH_COMPILING_S and compiler.can_compile()[0]:
            compiled = "on"
    elif compiled == "on" and not compiler.can_compile()[0]:
        raise UserError(f"train.compile is on, but {compiler.can_compile()[1]}; use --train.compile off")
    return recipe.replace(
        "train",
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        compile=compiled,
        threads=config.threads or torch.get_num_threads(),
    )


def expected_seconds(recipe: Recipe, vocab_size: int) -> float:
    """Rough time of the run here: its arithmetic at ``UTILISATION`` of this machine's matrix-product rate."""
    device = distributed.init().device
    rate = throughput.matmul_rate(precision.pick_dtype(recipe.train.dtype, device), device)
    flops = count(recipe.spec(vocab_size)).flops_per_token * recipe.total_tokens
    return float(flops / (UTILISATION * rate * distributed.size()))


def _check_contents(tokens: Tokens, world: distributed.World) -> None:
    """Raise a ``UserError`` on every rank where small prepared data is not what it was; rank 0 looks."""
    wrong = ""
    if world.rank == 0:
        try:
            store.check(tokens)
        except UserError as error:
            wrong = str(error)
    if wrong := distributed.broadcast(wrong):
        raise UserError(wrong)


def check(recipe: Recipe, tokens: Tokens, world: distributed.World) -> Loader:
    """Find what cannot work before the first step; return the loader of the training text."""
    _check_contents(tokens, world)
    if recipe.train.batch_size % world.size:
        raise UserError(
            f"train.batch_size {recipe.train.batch_size} does not divide over {world.size} processes; "
            f"use a multiple of {world.size}"
        )
    growing = recipe.train.batch_ramp
    for size in sorted({recipe.train.batch_size, *(rows for _, rows in (growing.changes if growing else ()))}):
        micro = min(recipe.train.micro_batch or size, size // world.size)
        if size % world.size or (size // world.size) % max(1, micro):
            key = "micro_batch" if size == recipe.train.batch_size else "batch_start"
            raise UserError(
                f"a step of {size} sequences cannot be shared evenly by {world.size} processes with train.micro_batch "
                f"{recipe.train.micro_batch}; use another train.{key}"
            )
    # Raises where the text is shorter than one sequence, or the mixture names a source that is not there.
    loader = Loader(tokens, recipe.train.seq_len, recipe.seed, feed=recipe.data.feed)
    end = None if loader.mix is None else loader.mix.total
    if end is not None and recipe.total_samples > end:
        raise UserError(
            f"the run needs {recipe.total_samples:,} samples and the mixture ends after {end:,}; raise the limits of "
            f"epochs in data.mix, or lower train.steps"
        )
    return loader


def assemble(
    recipe: Recipe,
    folder: Path,
    tokens: Tokens,
    world: distributed.World,
    observers: Sequence[Observer],
    loader: Loader | None = None,
) -> Run:
    """Build the run's parts from its resolved recipe (``loader``: the one that ``check`` made). Nothing is trained yet.

    The journal comes first: its lock says that no other process is at work in the folder.
    """
    journal = Journal(folder / "journal.jsonl") if world.rank == 0 else None
    try:
        loader = loader or Loader(tokens, recipe.train.seq_len, recipe.seed, feed=recipe.data.feed)
        return _assemble(recipe, folder, tokens, world, observers, journal, loader)
    except BaseException:
        if journal is not None:
            journal.close()
        raise


def _assemble(
    recipe: Recipe,
    folder: Path,
    tokens: Tokens,
    world: distributed.World,
    observers: Sequence[Observer],
    journal: Journal | None,
    loader: Loader,
) -> Run:
    config = recipe.train
    torch.set_num_threads(config.threads or torch.get_num_threads())
    spec = recipe.spec(tokens.vocab_size)
    dtype = precision.pick_dtype(config.dtype, world.device)
    model = build_model(spec, seed=recipe.seed, device=world.device, compute_dtype=dtype)
    model.recompute_blocks(config.recompute)
    if config.compile == "on":
        model.compile_trunk()
    sharding.shard(model, list(model.trunk.blocks), world, dtype)
    optimizer = optimizer_for(recipe.optim, model)
    validation = None
    if recipe.data.val_fraction > 0 and len(tokens.split("val").tokens) > config.seq_len:
        validation = Loader(tokens, config.seq_len, recipe.seed, "val", recipe.data.feed)
    store = CheckpointStore(folder / "checkpoints", config.keep_last, config.keep_best)
    run = Run(
        recipe=recipe,
        model=model,
        optimizer=optimizer,
        guard=build_guard(recipe.guard),
        loader=loader,
        validation=validation,
        world=world,
        store=store,
        journal=journal,
        fingerprint={
            **{f"model.{key}": value for key, value in spec.to_dict().items()},
            "data": tokens.fingerprint,
            "seed": recipe.seed,
        },
        text={
            **{key: tokens.manifest[key] for key in ("source", "splits", "replaced_bytes", "skipped")},
            "converted": tokens.manifest.get("converted", {}),
            "fingerprint": tokens.fingerprint,
            "validation": validation is not None,
            **({} if loader.mix is None else {"mix": loader.mix.report(recipe.total_samples, config.seq_len)}),
        },
        observers=list(observers) if world.rank == 0 else [],
    )
    run.host = TrainHost(run)
    if config.linear_norms_every:
        run.linears = LinearNorms(model, config.linear_norms_every)
    run.senses = Senses(run, recipe.guard.every) if recipe.guard.enabled else Blind(run)
    run.guard = build_guard(recipe.guard, store.latest, examine=run.senses.examine)
    return run


def _write_run_record(run: Run, command: str) -> None:
    if run.journal is None:
        return
    record = run.journal.write(
        "run",
        format=JOURNAL_FORMAT,
        recipe=configs.to_dict(run.recipe),
        command=command,
        environment=environment.describe(),
        parameters=count(run.model.spec).params,
        tokens_per_step=run.recipe.tokens_per_step,
        total_steps=run.recipe.train.steps,
        total_tokens=run.recipe.total_tokens,
        data=run.text,
    )
    run.tell("on_start", record)
    for line in (one["warning"] for one in run.text.get("mix", ()) if one["warning"]):
        run.tell("on_note", line)


def _take_up(
    run: Run,
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    done: int,
    over: Mapping[str, Any] | None,
    command: str,
    before: Drop,
    drop: Drop,
) -> None:
    """Bring an assembled run to where its newest verified checkpoint is, and say so in the journal."""
    reason, damaged = "no checkpoint yet: started again from step 0", list[str]()
    if run.store.steps():
        limit = run.store.resume_limit()
        loaded = run.restore(limit)
        reason, damaged = f"resumed from step {loaded.step}", loaded.rejected
        if limit is not None:
            reason += "; the checkpoint after it led to the same death twice and is passed over"
    elif done:
        raise UserError(
            f"the journal of '{folder}' knows {done} steps, but no good checkpoint is left; start a new run with: "
            f"poise train {folder / 'recipe.toml'}"
        )
    short = before.and_also(drop).too_much(run)
    if short and (drop.samples or over):
        raise UserError(short)
    run.tell("on_note", reason)
    if short:
        run.tell("on_note", short)
    if run.journal is None:
        return
    if over:
        write_recipe(run.recipe, folder)
    if over or not any(record["type"] == "run" for record in records):
        _write_run_record(run, command)
    else:
        run.tell("on_start", next(r for r in reversed(records) if r["type"] == "run"))
    facts: dict[str, Any] = {"damaged_checkpoints": damaged}
    if run.position.documents:
        facts["dropped"] = run.position.documents
    if drop.samples:
        facts["drop_samples"] = drop.samples
    if drop.documents:
        facts["drop_documents"] = drop.documents
    run.journal.write("restart", step=run.position.step, reason=reason, **facts)


def _attempt(run: Run) -> loop.Outcome:
    """Train on from where the run is; a death goes into the ledger that keeps restarts from looping."""
    run.store.begin_attempt(run.position.step)
    try:
        return loop.train(run)
    except BaseException as error:
        run.store.end_attempt(type(error).__name__)
        raise


@contextmanager
def _closing(run: Run, folder: Path) -> Iterator[None]:
    """Close the journal and write the report, however the run ends."""
    try:
        yield
    finally:
        if run.journal is not None:
            try:
                run.journal.close()
                write_report(folder)
            except OSError as error:  # a full disk must not hide how the run ended
                log.warning("no report: %s", error.strerror)
