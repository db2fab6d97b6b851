"""Runs the cells of a study in worker processes of one thread each, and keeps what is done.

Two tiny models train faster side by side on one core each than one after the other on two
(``benchmarks/study_workers.py``). A worker imports torch once and does many cells. One that dies takes only its cell
with it. On SIGINT or SIGTERM running cells save their state and everything ends; the same command goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from poise.core.errors import UserError
from poise.core.journal import to_json
from poise.studies.cell import Cell, read_record, run_cell, write_whole
from poise.studies.grid import Study
from poise.studies.pool import Pool, Standing
from poise.train.loop import StopRequest

MOST_TASKS: Final = 1000
"""Slurm's usual limit on the length of an array."""

TABLES: Final = {"lr-sensitivity": "poise.studies.lr_sensitivity"}
"""Kind of study -> module with ``summarise(records, declaration)``."""
PAGE: Final = "poise.studies.study_page"


class Result(Protocol):
    """What ``summarise`` returns."""

    def table(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass
class Outcome:
    """What came of running a study: cells that were there before, that were run, and that failed (key -> why).

    ``stopped`` is the name of the signal that ended it early.
    """

    total: int
    reused: int = 0
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    stopped: str = ""


def usable_cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_study(
    study: Study,
    *,
    workers: int = 0,
    threads: int = 1,
    cache: Path | None = None,
    progress: Callable[[Standing], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Outcome:
    """Run the cells of a study that have no record yet.

    Args:
        study: a declared one.
        workers: processes at the same time; 0 for as many as there are usable cores for.
        threads: of each.
        cache: folder of records shared with other studies: read before, and added to.
        progress: called about twice a second.
        note: told of each cell that failed, in a line.

    Raises:
        UserError: another process runs this study, its text is gone or changed, workers cannot start, the cache
            cannot be written to.
        KeyboardInterrupt: a second signal came before the workers had saved; they were killed.
    """
    check_counts(workers, threads)
    tell = note or (lambda text: None)
    with _locked(study.folder):
        _tidy(study)
        outcome = Outcome(total=len(study.declaration.cells))
        waiting = study.missing()
        if cache is not None:
            waiting = _fetch(study, waiting, cache)
        outcome.reused = outcome.total - len(waiting)
        if not waiting:
            return outcome
        tokens = study.tokens()
        count = min(workers or max(1, usable_cores() // threads), len(waiting))
        with StopRequest().listening() as asked:
            pool = Pool(study.cells_folder, tokens.dir, threads, waiting)
            try:
                pool.start(count)
                for cell, reason in pool.work(lambda: asked.signal is not None, progress or (lambda standing: None)):
                    if reason:
                        outcome.failed[cell.key] = reason
                        tell(f"{describe(cell)} failed: {reason}")
                    else:
                        outcome.done += 1
                        _publish(study, cell, cache)
            finally:
                pool.close()
            outcome.stopped = asked.signal or ""
    return outcome


def run_one(study: Study, key: str, *, threads: int = 1, cache: Path | None = None) -> tuple[dict[str, Any], bool]:
    """Run one cell in this process; return its record, and whether it was there before.

    Raises:
        UserError: the study has no such cell.
        Stopped: a signal asked for it; the same command goes on.
    """
    import torch

    check_counts(1, threads)
    cell = find(study, key)
    if (waiting := [] if study.record_of(cell) else [cell]) and cache is not None:
        waiting = _fetch(study, waiting, cache)
    if not waiting:
        record = study.record_of(cell)
        assert record is not None
        return record, True
    torch.set_num_threads(threads)
    with StopRequest().listening() as asked:
        study.cells_folder.mkdir(exist_ok=True)
        run_cell(cell, study.tokens(), study.cells_folder, stop=lambda: asked.signal is not None)
    _publish(study, cell, cache)
    record = study.record_of(cell)
    assert record is not None
    return record, False


def find(study: Study, key: str) -> Cell:
    """Return the cell of a study with this key.

    Raises:
        UserError: there is none.
    """
    for cell in study.declaration.cells:
        if cell.key == key:
            return cell
    raise UserError(
        f"the study has no cell '{key}'; poise study show {shlex.quote(str(study.folder))} --keys lists them, "
        "and they depend on the version of torch"
    )


def conclude(study: Study) -> Result | None:
    """Make table, JSON and page of the records that are there; ``None`` where there are none."""
    records = study.records()
    if not records:
        return None
    declaration = study.declaration.facts()
    if declaration["name"] not in TABLES:
        raise UserError(
            f"'{study.folder}' is a study '{declaration['name']}'; this poise tabulates {', '.join(TABLES)}"
        )
    result: Result = importlib.import_module(TABLES[declaration["name"]]).summarise(records, declaration)
    facts = {"study": declaration, "runs": len(records), "missing": declaration["cells"] - len(records)}
    write_whole(study.folder / "table.txt", (result.table().rstrip("\n") + "\n").encode())
    write_whole(study.folder / "result.json", (to_json({**facts, **result.to_json()}) + "\n").encode())
    importlib.import_module(PAGE).write(result, records, declaration, study.folder / "report.html")
    return result


def describe(cell: Cell) -> str:
    """Return a cell in a few words."""
    return f"{cell.arm}, lr {cell.lr:g}, seed {cell.seed}"


# -- commands for other machines -----------------------------------------------------------------------------------


def commands(study: Study, *, threads: int = 1, cache: Path | None = None) -> list[str]:
    """Return a command for each cell that has no record; they are independent of each other."""
    options = [] if threads == 1 else ["--threads", str(threads)]
    options += [] if cache is None else ["--cache", str(cache.absolute())]
    start = ["poise", "study", "cell", str(study.folder.absolute())]
    return [shlex.join([*start, cell.key, *options]) for cell in study.missing()]


def write_slurm(study: Study, *, threads: int = 1, cache: Path | None = None) -> Path:
    """Write ``cells.txt`` (a command a line) and ``study.sbatch``, an array that runs them; return the latter.

    Raises:
        UserError: nothing is left to run.
    """
    lines = commands(study, threads=threads, cache=cache)
    if not lines:
        raise UserError(f"all cells of '{study.folder}' have been run; see poise study show")
    each = -(-len(lines) // MOST_TASKS)
    listing = study.folder.absolute() / "cells.txt"
    script = f"""#!/bin/bash
#SBATCH --job-name=poise-study
#SBATCH --array=0-{-(-len(lines) // each) - 1}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={threads}
#SBATCH --signal=B:TERM@120
#SBATCH --chdir="{study.folder.absolute()}"
#SBATCH --output=slurm-%A_%a.out
# {len(lines)} runs, {each} a task. A run that was killed goes on where it was when its task is submitted again.
first=$((SLURM_ARRAY_TASK_ID * {each} + 1))
mapfile -t commands < <(sed -n "${{first}},$((first + {each} - 1))p" {shlex.quote(str(listing))})
stopping=; child=; status=0
trap 'stopping=1; kill -TERM "$child" 2>/dev/null' TERM
for command in "${{commands[@]}}"; do
  eval "exec $command" & child=$!
  wait "$child"; code=$?
  [ -n "$stopping" ] && {{ wait "$child"; exit 143; }}
  [ "$code" -ne 0 ] && status=$code
done
exit "$status"
"""
    write_whole(listing, ("\n".join(lines) + "\n").encode())
    path = study.folder / "study.sbatch"
    write_whole(path, script.encode())
    return path


# -- the folder ----------------------------------------------------------------------------------------------------


def check_counts(workers: int, threads: int) -> None:
    most = 4 * (os.cpu_count() or 1)
    for name, value, least in (("workers", workers, 0), ("threads", threads, 1)):
        if not least <= value <= most:
            raise UserError(f"--{name} is {value}; use {least} to {most} on this machine")


def check_cache(cache: Path) -> None:
    if cache.exists() and not cache.is_dir():
        raise UserError(f"cannot use the cache '{cache}': it is a file; give a folder with --cache")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the study for this process; the system lets go of it however the process ends."""
    with (folder / ".lock").open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running the study '{folder}'; wait for it or stop it first") from None
        except (ImportError, OSError):  # a system or a disk without locks
            pass
        yield


def _tidy(study: Study) -> None:
    """Remove what killed processes left half written; only one that holds the lock may do so."""
    study.cells_folder.mkdir(exist_ok=True)
    hour_ago = time.time() - 3600  # not what single cells may be writing at this moment
    for path in study.cells_folder.glob("*.new-*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < hour_ago:
                path.unlink()


def _fetch(study: Study, cells: Sequence[Cell], cache: Path) -> list[Cell]:
    """Copy what other studies have computed; return the cells that are still to do."""
    check_cache(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use the cache '{cache}': {error.strerror}; choose another with --cache") from None
    left = []
    for cell in cells:
        there = cache / f"{cell.key}.json"
        if read_record(there, cell.key) is None:
            left.append(cell)
        else:
            write_whole(study.cells_folder / there.name, there.read_bytes())
    return left


def _publish(study: Study, cell: Cell, cache: Path | None) -> None:
    """Add a record to the cache."""
    if cache is not None:
        aside = cache / f"{cell.key}.json.new-{os.getpid()}"
        shutil.copyfile(study.cells_folder / f"{cell.key}.json", aside)
        aside.replace(cache / f"{cell.key}.json")
