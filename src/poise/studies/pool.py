"""Worker processes that run cells, one thread or a few each.

A worker imports torch once and does many cells. One that dies takes only its cell with it, and another takes its
place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Literal

from poise.core.errors import UserError
from poise.data.store import Tokens, open_tokens
from poise.studies.cell import Cell, Stopped, run_cell, write_whole
from poise.train.loop import StopRequest

TELL_EVERY: Final = 0.5
"""Seconds between two messages of a worker about its steps."""
PATIENCE: Final = 30.0
"""Seconds that workers have to save and end when they are asked to."""


@dataclass(frozen=True)
class Standing:
    """How far a study is. Cells and steps that were there before are not counted."""

    cells: int
    total_cells: int
    steps: int
    total_steps: int
    seconds: float

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; ``None`` before the first step."""
        return self.seconds * (self.total_steps - self.steps) / self.steps if self.steps else None


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    cell: Cell | None = None
    step: int = 0
    ready: bool = False


class Pool:
    """Worker processes and the cells that wait for them."""

    def __init__(self, folder: Path, tokens: Path, threads: int, cells: Sequence[Cell]) -> None:
        self._folder, self._tokens, self._threads = folder, tokens, threads
        self._waiting = deque(cells)
        self._steps_total = sum(cell.recipe.train.steps for cell in cells)
        self._steps_over = self._over = 0
        self._total = len(cells)
        self._workers: list[_Worker] = []
        self._began: float | None = None

    def start(self, count: int) -> None:
        """Start so many workers."""
        self._workers += [self._started() for _ in range(count)]

    def _started(self) -> _Worker:
        ours, theirs = get_context("spawn").Pipe()
        arguments = (theirs, self._folder, self._tokens, self._threads)
        process = get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        with _sigint_ignored():  # the worker inherits it: Ctrl-C is ours to pass on
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def work(self, stop: Callable[[], bool], progress: Callable[[Standing], None]) -> Iterator[tuple[Cell, str]]:
        """Yield each cell that is over, with the reason where it failed, until all are or ``stop`` says so."""
        while self._workers and not stop():
            progress(self._standing())
            events = connection.wait(
                [thing for worker in self._workers for thing in (worker.pipe, worker.process.sentinel)], TELL_EVERY
            )
            for worker in list(self._workers):
                if worker.pipe in events or worker.process.sentinel in events:
                    yield from self._hear(worker)
        progress(self._standing())

    def _hear(self, worker: _Worker) -> Iterator[tuple[Cell, str]]:
        try:
            while worker.pipe.poll():
                kind, value = worker.pipe.recv()
                if kind == "step":
                    worker.step = value
                    continue
                if kind == "over":
                    assert worker.cell is not None
                    yield self._over_with(worker, value)
                worker.ready = True
                self._began = self._began or time.monotonic()  # starting is no part of the pace
                self._give(worker)
                return
        except (EOFError, OSError):
            yield from self._buried(worker)

    def _give(self, worker: _Worker) -> None:
        if self._waiting:
            worker.cell, worker.step = self._waiting.popleft(), 0
            worker.pipe.send(worker.cell)
        else:
            self._workers.remove(worker)
            _end(worker)

    def _over_with(self, worker: _Worker, reason: str) -> tuple[Cell, str]:
        cell = worker.cell
        assert cell is not None
        worker.cell, worker.step = None, 0
        self._steps_over += cell.recipe.train.steps
        self._over += 1
        failed = self._folder / f"{cell.key}.failed"
        if reason:
            with contextlib.suppress(OSError):  # the reason is told in any case
                write_whole(failed, (reason + "\n").encode())
        else:
            failed.unlink(missing_ok=True)
        return cell, reason

    def _buried(self, worker: _Worker) -> Iterator[tuple[Cell, str]]:
        """A worker died: its cell has failed, and another takes its place."""
        worker.process.join(PATIENCE)
        code = worker.process.exitcode
        died = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        _end(worker)
        if worker in self._workers:
            self._workers.remove(worker)
        if not worker.ready:
            raise UserError(
                f"a worker process ended while it started ({died}); is there memory for {self._count} of them?"
            )
        if worker.cell is not None:
            yield self._over_with(worker, f"its process died ({died}; out of memory?)")
        if self._waiting:
            self._workers.append(self._started())

    @property
    def _count(self) -> int:
        return len(self._workers) + 1

    def _standing(self) -> Standing:
        running = sum(worker.step for worker in self._workers)
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        return Standing(self._over, self._total, self._steps_over + running, self._steps_total, seconds)

    def close(self) -> None:
        """Let running cells save their state, and end all workers; those that do not are killed."""
        for worker in self._workers:
            with contextlib.suppress(OSError, ValueError):
                worker.pipe.send(None)
            if worker.ready:
                worker.process.terminate()  # SIGTERM: save and stop
            else:
                worker.process.kill()
        until = time.monotonic() + PATIENCE
        try:
            for worker in self._workers:
                while worker.process.is_alive() and time.monotonic() < until:
                    with contextlib.suppress(EOFError, OSError):
                        while worker.pipe.poll(0.05):
                            worker.pipe.recv()
                    worker.process.join(0.05)
        finally:  # also when a second signal says that it takes too long
            for worker in self._workers:
                _end(worker)
            self._workers.clear()


def _end(worker: _Worker) -> None:
    """Take leave of a worker that has nothing to do."""
    with contextlib.suppress(OSError, ValueError):
        worker.pipe.send(None)
    worker.process.join(0 if worker.cell is not None else 5)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.pipe.close()


def serve(pipe: Connection, folder: Path, tokens_dir: Path, threads: int) -> None:
    """What a worker process does: cells that come through ``pipe``, until ``None`` comes or nobody is there.

    It sends ("ready", ""), ("step", number), ("over", reason or "") and ("stopped", "").
    """
    import torch

    asked = StopRequest()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(asked, "signal", "SIGTERM"))
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    tokens = open_tokens(tokens_dir)
    _tell(pipe, "ready", "")
    while True:
        try:
            cell = pipe.recv()
        except (EOFError, OSError):
            return
        if cell is None or asked.signal is not None:
            return
        _tell(pipe, "over", _reason(cell, tokens, folder, pipe, asked))


def _reason(cell: Cell, tokens: Tokens, folder: Path, pipe: Connection, asked: StopRequest) -> str:
    """Run a cell; return why it failed, or an empty text."""
    told = time.monotonic()

    def progress(step: int) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY:
            told = time.monotonic()
            _tell(pipe, "step", step)

    try:
        run_cell(cell, tokens, folder, stop=lambda: asked.signal is not None, progress=progress)
    except Stopped:
        raise SystemExit(0) from None
    except Exception as error:  # recorded as this cell's; the others go on
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"
    return ""


def _tell(pipe: Connection, kind: Literal["ready", "step", "over"], value: Any) -> None:
    try:
        pipe.send((kind, value))
    except OSError:  # the study was killed: whoever takes it up starts from the last saved state
        os._exit(1)


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
