"""Preparation that is killed, interrupted, or runs out of disk at any point: the same bytes in the end."""

from __future__ import annotations

import errno
import gzip
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.shell import Poise, contents, end, names, start, write

from poise.data import prepare as preparing
from poise.data import record, staging, store, work, writer
from poise.data.store import verify

pytestmark = pytest.mark.usefixtures("own_places")


def _tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "BLOCK_BYTES", 8000)
    monkeypatch.setattr(record, "BLOCK_DOCUMENTS", 12)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 62 texts, with duplicates, a damaged and an empty file among them; not to be changed."""
    folder = write(tmp_path_factory.mktemp("many") / "many", 60)
    (folder / "copy.txt").write_text((folder / "007.txt").read_text())
    (folder / "near.txt").write_text((folder / "009.txt").read_text() + " more")
    (folder / "zz.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "%d loss"}\n' % n for n in range(99)))[:-9])
    (folder / "zzz.txt").write_text("")
    return folder


NEAR = ["--dedup", "near", "--filters", "gopher_repetition"]


def _reference(poise: Poise, many: Path, tmp_path: Path) -> dict[str, bytes]:
    assert poise.prepare(many, "--out", "reference", *NEAR).code == 0
    return contents(tmp_path / "reference")


def _killed(many: Path, tmp_path: Path, count: int, sent: int = signal.SIGKILL) -> int:
    """Interrupt a preparation some times at random moments; return how often it was under way."""
    begun = time.perf_counter()
    assert end(*start([many, "--out", "out", *NEAR])).code == 0
    shutil.rmtree(tmp_path / "out")
    longest = time.perf_counter() - begun
    rng, under_way = random.Random(count), 0
    for _ in range(count):
        pid, reading = start([many, "--out", "out", *NEAR])
        time.sleep(rng.uniform(0.0, longest))
        os.kill(pid, sent)
        ran = end(pid, reading)
        if ran.code == 0:
            shutil.rmtree(tmp_path / "out")
        elif sent == signal.SIGINT:
            assert ran.code == 130 and ran.err.splitlines()[-1] == "poise data: interrupted", ran
        else:
            assert ran.code == -sent
        under_way += ran.code != 0 and not (tmp_path / "out").exists()
        assert all(name in ("reference", "out") or name.startswith(".out.") for name in names(tmp_path))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    return under_way


@pytest.mark.parametrize(("sent", "count"), [(signal.SIGKILL, 1), (signal.SIGINT, 1)])
def test_killed_at_random_moments(
    poise: Poise, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int, count: int
) -> None:
    _tiny_blocks(monkeypatch)
    reference = _reference(poise, many, tmp_path)
    assert _killed(many, tmp_path, count, sent) >= 1
    assert poise.prepare(many, "--out", "out", *NEAR).code == 0
    assert contents(tmp_path / "out") == reference
    assert names(tmp_path) == {"reference", "out"}


@pytest.mark.slow
def test_killed_twenty_times(poise: Poise, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tiny_blocks(monkeypatch)
    reference = _reference(poise, many, tmp_path)
    assert _killed(many, tmp_path, 20) >= 10
    assert poise.prepare(many, "--out", "out", *NEAR).code == 0
    assert contents(tmp_path / "out") == reference
    assert names(tmp_path) == {"reference", "out"}


def test_what_a_kill_between_the_renames_left_is_removed(poise: Poise, notes: Path, tmp_path: Path) -> None:
    assert poise.prepare(notes, "--out", "out").code == 0
    host = os.uname().nodename
    (tmp_path / "out").rename(tmp_path / f".out.old-{host}-{2**22 + 1}")  # no process has such a number
    assert poise.prepare(notes, "--out", "out").code == 0
    assert names(tmp_path) == {"out"} and verify("out")


def _limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_at_any_file(poise: Poise, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of a file is the nearest thing to a full disk that every machine has."""
    _tiny_blocks(monkeypatch)
    reference = _reference(poise, many, tmp_path)
    stages = set()
    for size in (1, 3000, 12_000, 24_000, 30_000):
        ran = end(*start([many, "--out", "out", *NEAR], _limited(size)))
        if ran.code == 0:
            break
        assert "the disk is full at" in ran.line and "the same command goes on from there" in ran.line, size
        stages.add("".join(ran.err.splitlines()[-2:-1]).partition(":")[0].removesuffix(" ..."))
        assert names(tmp_path) == {"reference", ".out.work"}
    assert len(stages) >= 3, stages
    assert poise.prepare(many, "--out", "out", *NEAR).code == 0
    assert contents(tmp_path / "out") == reference


PLACES = [
    (work, "commit"),
    (preparing, "judge"),
    (writer.SplitWriter, "add_block"),
    (writer.SplitWriter, "close"),
    (preparing, "write_dropped"),
    (store, "seal"),
    (staging, "publish"),
]


@pytest.mark.parametrize(
    ("place", "number"),
    [*((place, errno.ENOSPC) for place in PLACES), (PLACES[0], errno.EIO)],
    ids=lambda value: value[1] if isinstance(value, tuple) else errno.errorcode[value],
)
def test_an_error_in_every_stage(
    poise: Poise, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], number: int
) -> None:
    assert poise.prepare(notes, "--out", "out").code == 0
    old = contents(tmp_path / "out")
    with monkeypatch.context() as patch:

        def full(*args: object, **kwargs: object) -> None:
            raise OSError(number, os.strerror(number))

        patch.setattr(*place, full)
        line = poise.prepare(notes, "--out", "out", "--seed", "1").line
    assert ("the disk is full" if number == errno.ENOSPC else os.strerror(number)) in line
    assert "the same command goes on from there" in line
    assert contents(tmp_path / "out") == old
    assert poise.prepare(notes, "--out", "out", "--seed", "1").code == 0
    assert poise.prepare(notes, "--out", "straight", "--seed", "1").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert names(tmp_path) == {"out", "straight"}


def test_a_damaged_work_folder_is_no_harm(
    poise: Poise, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tiny_blocks(monkeypatch)
    reference = _reference(poise, many, tmp_path)
    assert poise.prepare(many, "--out", "out", *NEAR, "--dry-run").code == 0
    clean = sorted((tmp_path / ".out.work" / "clean").iterdir())
    os.truncate(clean[4], 10)
    clean[9].unlink()
    (tmp_path / ".out.work" / "judge" / "reason.npy").write_bytes(b"")
    assert poise.prepare(many, "--out", "out", *NEAR).code == 0
    assert contents(tmp_path / "out") == reference
