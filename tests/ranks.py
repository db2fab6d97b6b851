"""Processes for tests of what happens between ranks: a group that stays, and worlds of their own.

An interpreter that imports torch costs seconds, and most such tests need milliseconds. All processes here are forked
from one server that has torch already. ``Ranks`` keeps its processes and their gloo group from test to test (the
fixture ``two_ranks``); ``launch`` starts a world as torchrun would, for what opens and leaves the group itself.

What runs on the ranks is a function of a module, called with the number of the rank and arguments that can be pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed

IMPORTED_ONCE = [
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
]
"""What the server imports before it forks. Nothing that starts threads: a fork does not take them along."""

PATIENCE_S = 100.0
"""How long a rank may work before it counts as stuck; longer than any test, the machine may be busy."""

GRACE_S = 3.0
"""How long the other ranks of a launched world may still work when one has failed."""


class RankError(AssertionError):
    """A rank raised, ended or hung; the message has its traceback."""


class Ranks:
    """Processes of one gloo group, started at the first use and again after a failure."""

    def __init__(self, size: int, patience_s: float = PATIENCE_S) -> None:
        self.size = size
        self.patience_s = patience_s
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``work(rank, *arguments)`` on every rank; return what they return, by rank.

        Raises:
            RankError: one of them raised, ended, or took longer than the patience; no process of the group is kept.
        """
        self._start()
        message = pickle.dumps((work, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        return self._answers()

    def end(self) -> None:
        """Kill the processes; the next ``run`` starts others."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        for rank in range(self.size):
            ours, theirs = _context().Pipe()
            process = _context().Process(target=_serve, args=(rank, self.size, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        port = self._answers([0])[0]
        for pipe in self._pipes[1:]:
            pipe.send_bytes(pickle.dumps(port))

    def _answers(self, ranks: list[int] | None = None) -> list[Any]:
        until = time.monotonic() + self.patience_s
        waiting = {self._pipes[rank]: rank for rank in (range(self.size) if ranks is None else ranks)}
        answers: dict[int, Any] = {}
        while waiting:
            ready = connection.wait(waiting, max(0.0, until - time.monotonic()))
            if not ready:
                self._fail(f"rank {', '.join(map(str, waiting.values()))} has not answered in {self.patience_s:g} s")
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                rank = waiting.pop(pipe)
                try:
                    good, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(5)
                    self._fail(f"rank {rank} has ended with code {self._processes[rank].exitcode}")
                if not good:
                    self._fail(f"on rank {rank}:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in sorted(answers)]

    def _fail(self, message: str) -> NoReturn:
        self.end()
        raise RankError(message)


def launch(work: Callable[..., None], *arguments: Any, size: int = 2, patience_s: float = PATIENCE_S) -> None:
    """Call ``work(rank, *arguments)`` in new processes with the environment that torchrun gives them; wait for all.

    Raises:
        RankError: a process did not end with code 0 within the patience; the message has what they wrote to stderr.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        errors = [Path(folder, str(rank)) for rank in range(size)]
        processes = []
        for rank in range(size):
            env = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context().Process(target=_alone, args=(env, str(errors[rank]), work, arguments), daemon=True)
            process.start()
            processes.append(process)
        try:
            until = time.monotonic() + patience_s
            running = {process.sentinel: process for process in processes}
            while running and (ended := connection.wait(running, max(0.0, until - time.monotonic()))):
                gone = [running.pop(sentinel) for sentinel in list(running) if sentinel in ended]
                if any(process.exitcode for process in gone):
                    until = min(until, time.monotonic() + GRACE_S)  # the others wait for one that is gone
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        if codes != [0] * size:
            said = "\n".join(
                path.read_text(encoding="utf-8", errors="replace")[-3000:] for path in errors if path.exists()
            )
            raise RankError(f"the ranks ended with {codes} (None: not in {patience_s:g} s)\n{said}")


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def _serve(rank: int, size: int, pipe: Connection) -> None:
    """Be one rank: join the group, then do what is sent until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends the ranks
    torch.set_num_threads(1)
    if rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        _send(pipe, True, store.port)
    else:
        store = distributed.TCPStore("127.0.0.1", pickle.loads(pipe.recv_bytes()), None, wait_for_workers=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # threads of a process group that is gone can abort the interpreter's teardown
        torch.manual_seed(0)
        try:
            work, arguments = pickle.loads(message)
            answer = work(rank, *arguments)
            assert distributed.is_initialized(), "the group has to stay for the next test"
            distributed.barrier()
            _send(pipe, True, answer)
        except BaseException:
            _send(pipe, False, traceback.format_exc())


def _send(pipe: Connection, good: bool, answer: Any) -> None:
    pipe.send_bytes(pickle.dumps((good, answer)))


def _alone(env: dict[str, str], errors: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Be one rank of a world of its own, as a program that torchrun has started."""
    os.environ |= env
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    try:
        work(int(env["RANK"]), *arguments)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)
