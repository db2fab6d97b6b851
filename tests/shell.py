"""The command line ``poise data``, run in this process or in a forked one, for tests of what can go wrong."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from poise.cli.main import main

VOCABULARY = ["--vocab-size", "280"]
WORDS = ("loss", "gradient", "step", "weight", "norm", "layer", "token", "batch", "spike", "learning", "rate", "decay")


def words(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(count))


def write(folder: Path, count: int = 12, length: int = 80) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(f"{number} {words(length, number)}\n")
    return folder


class Ran(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of a mistake."""
        lines = [line for line in self.err.splitlines() if line.startswith("poise")]
        assert self.code == 2 and len(lines) == 1, self
        assert self.err.splitlines()[-1] == lines[0] and "Traceback" not in self.err, self
        return lines[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What ``--json`` printed."""
        assert self.code == 0, self
        facts: dict[str, Any] = json.loads(self.out)
        return facts


class Poise:
    """The command line, in this process or in a forked one."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: object) -> Ran:
        self._capsys.readouterr()
        code = main(["data", *map(str, args)])
        return Ran(code, *self._capsys.readouterr())

    def prepare(self, *args: object) -> Ran:
        return self("prepare", *args, *VOCABULARY, "--json")


def start(args: list[object], before: Callable[[], object] = lambda: None) -> tuple[int, int]:
    """Run a command in a forked process; return its number and where its standard error comes out."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child keeps to itself
        pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 70
    try:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()
        code = main(["data", "prepare", *map(str, args), *VOCABULARY])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(pid: int, reading: int) -> Ran:
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(reading) as pipe:
        return Ran(os.waitstatus_to_exitcode(status), "", pipe.read())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def without_permission() -> None:
    """Let the permission bits bind the superuser too (Linux: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data) == 0:
        for place in (0, 1):  # effective and permitted, of the lower 32 capabilities
            data[place] &= ~0b110
        libc.capset(header, data)
