"""Preparing text that is interrupted, killed or out of disk, at every place: nothing half-written, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from poise.core.errors import UserError
from poise.data import prepare as module
from poise.data import work
from poise.data.prepare import Kept, prepare
from poise.data.store import MANIFEST, Tokens, verify

if TYPE_CHECKING:
    from tests.data.conftest import Dirty

pytestmark = [
    pytest.mark.usefixtures("small_blocks"),
    pytest.mark.skipif(os.name != "posix", reason="needs signals and limits"),
]

STAGES = ("reading and cleaning", "looking for duplicates", "training tokenizer", "encoding", "writing", "sealing")
BLOCKS = 6
Call = tuple[str, int, int | None]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(folder: Path, cleaned: Tokens) -> None:
    """The result is there, byte for byte, and nothing else."""
    assert names(folder) == {"out"}
    found, expected = files_of(folder / "out"), files_of(cleaned.dir)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


class Stop:
    """Raises KeyboardInterrupt at the n-th call of a stage (from 0), and notes all calls."""

    def __init__(self, stage: str, nth: int) -> None:
        self.stage, self.nth, self.calls = stage, nth, list[Call]()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        self.calls.append((stage, done, total))
        if stage == self.stage and [call[0] for call in self.calls].count(stage) == self.nth + 1:
            raise KeyboardInterrupt


def test_interrupted_at_every_stage_it_goes_on(dirty: Dirty, cleaned: Tokens, tmp_path: Path) -> None:
    """One preparation, interrupted ten times in a row."""
    out, folder = tmp_path / "out", tmp_path / ".out.work"
    first: dict[str, int] = {}
    for stage, nth in (*[(STAGES[0], 8), (STAGES[0], 6)], *[(stage, n) for stage in STAGES[1:] for n in (0, 1)][1:]):
        stop = Stop(stage, nth)
        with pytest.raises(KeyboardInterrupt):
            dirty.prepare(out, progress=stop)
        assert names(tmp_path) == {".out.work"}
        # What was done before is not done again.
        now = {str(p): p.stat().st_mtime_ns for kind in ("clean", "tokens") for p in folder.glob(f"{kind}/*")}
        assert {path: now.get(path) for path in first} == first
        first = {path: time for path, time in now.items() if not path.endswith(".new")}
        if stage in STAGES[2:]:
            assert not [call for call in stop.calls if call[0] == STAGES[0]]
    assert sum(path.endswith(".arrow") for path in first) == sum(path.endswith(".part") for path in first) == BLOCKS
    calls = Stop("", 0)
    dirty.prepare(out, progress=calls)
    assert dict.fromkeys(call[0] for call in calls.calls).keys() == {*STAGES} - {STAGES[0], "training tokenizer"}
    same(tmp_path, cleaned)
    verify(out)


def test_killed_at_every_stage_it_goes_on(dirty: Dirty, cleaned: Tokens, tmp_path: Path) -> None:
    """Killed processes can tidy up nothing; forks of one fresh process, because starting one takes a second."""
    code = """
import contextlib, json, os, signal, sys
from pathlib import Path
from poise.data import record, work
from poise.data.prepare import prepare
from poise.data.settings import Settings

sources, settings, place, stages = json.load(sys.stdin)
record.BLOCK_BYTES = 8000
with contextlib.suppress(ImportError):
    import awkward  # the fast encoder's, here once for all forks
settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})

def dies(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def killed(stage):
    calls = []
    def progress(name, done, total):
        calls.append(name)
        if name == stage and calls.count(name) == 2:
            dies()
    if stage == "committing":
        # A block is there, its description is not.
        Path.replace, replace = lambda path, to: (replace(path, to), dies()), Path.replace
    if stage == "publishing":
        Path.rename, rename = lambda path, to: (rename(path, to), dies()), Path.rename
    if stage == "removing":
        work._remove = dies
    prepare(sources, Path(place), settings, progress=progress)

for stage in stages:
    child = os.fork()
    if not child:
        killed(stage)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, stage
    print(json.dumps(sorted(path.name for path in Path(place).parent.iterdir())))
"""
    settings = {name: getattr(dirty.settings, name) for name in dirty.settings.__dataclass_fields__}
    out = tmp_path / "out"
    older(cleaned, out)
    stages = ("committing", *STAGES, "publishing", "removing")
    given = json.dumps([dirty.sources, settings, str(out), stages])
    run = subprocess.run([sys.executable, "-c", code], input=given, text=True, check=True, stdout=subprocess.PIPE)
    left = dict(zip(stages, map(json.loads, run.stdout.splitlines()), strict=True))
    old = left.pop("publishing")  # killed between two renames: the old data are beside
    assert len(old) == 2 and old[0].startswith(".out.old-") and old[1] == ".out.work"
    assert all(found == [".out.work", "out"] for found in left.values()), left
    assert dirty.prepare(out).manifest == cleaned.manifest  # it was in its place before the last kill
    same(tmp_path, cleaned)


def older(cleaned: Tokens, out: Path) -> None:
    """Put a result of other input at ``out``."""
    shutil.copytree(cleaned.dir, out)
    manifest: dict[str, Any] = json.loads((out / MANIFEST).read_bytes())
    manifest["source"]["fingerprint"] = "older"
    (out / MANIFEST).write_text(json.dumps(manifest))


def fill() -> None:
    """Limit the size of a file: the nearest thing to a full disk that every machine has."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_at_every_stage(
    dirty: Dirty, cleaned: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    older(cleaned, out)
    before = files_of(out)
    full_at = ""

    def progress(name: str, done: int, total: int | None) -> None:
        if name == full_at:
            fill()

    def filling(name: str) -> Callable[..., object]:
        function = getattr(module, name)

        def filled(*args: object) -> object:
            if name == full_at:
                fill()
            return function(*args)

        return filled

    functions = ("judge", "assemble", "write_dropped")
    for name in functions:
        monkeypatch.setattr(module, name, filling(name))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for full_at in (*STAGES, *functions):
        try:
            with pytest.raises(UserError) as error:
                dirty.prepare(out, progress=progress)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        message = str(error.value)
        assert message.startswith(f"the disk is full at '{tmp_path}'; free some space or give --data.dir PATH"), full_at
        assert message.endswith(f"what is done is in '{tmp_path / '.out.work'}', the same command goes on from there")
        assert "\n" not in message
        assert names(tmp_path) == {"out", ".out.work"}
        assert files_of(out) == before
    full_at = ""
    dirty.prepare(out)
    same(tmp_path, cleaned)


def test_a_damaged_work_file_is_made_again(dirty: Dirty, cleaned: Tokens, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / ".out.work"

    def stop() -> None:
        with pytest.raises(KeyboardInterrupt):
            dirty.prepare(out, progress=Stop("sealing", 0))

    stop()
    good = files_of(folder)
    whole = (folder / "clean" / "000000.arrow").stat().st_mtime_ns
    for damaged in (
        ("tokens/000001.part", "tokenizer.json"),
        ("clean/000003.arrow", "clean/000002.arrow.json", "read.json"),
    ):
        for name in damaged:
            raw = bytearray(good[name])
            raw[len(raw) // 2] ^= 1
            (folder / name).write_bytes(raw)
        stop()
        assert files_of(folder) == good
        assert (folder / "clean" / "000000.arrow").stat().st_mtime_ns == whole
    dirty.prepare(out)
    same(tmp_path, cleaned)


def test_other_settings_begin_anew(dirty: Dirty, cleaned: Tokens, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare(dirty.sources, out, replace(dirty.settings, filters=()), progress=Stop("sealing", 0))
    calls = Stop("", 0)
    dirty.prepare(out, progress=calls)
    assert calls.calls[0][0] == STAGES[0]
    same(tmp_path, cleaned)


def test_a_dry_run_is_half_the_work(dirty: Dirty, cleaned: Tokens, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reports: list[Kept] = []
    dry = prepare(dirty.sources, out, dirty.settings, report=reports.append, dry_run=True)
    assert (dry.dir, dry.manifest, dry.reused) == (out, {}, False)
    assert names(tmp_path) == {".out.work"}
    calls = Stop("", 0)
    dirty.prepare(out, progress=calls, report=reports.append)
    assert calls.calls[0][0] == "looking for duplicates"
    same(tmp_path, cleaned)
    dropped = cleaned.manifest["dropped"]
    for kept in reports:
        assert (kept.documents, kept.bytes) == (
            cleaned.manifest["read"]["documents"],
            cleaned.manifest["read"]["bytes_after_cleaning"],
        )
        assert {name: {"documents": n, "bytes": size} for name, (n, size) in kept.dropped.items()} == dropped
        assert [n for n, _ in kept.dropped.values()] == sorted((d["documents"] for d in dropped.values()), reverse=True)
    # After the real run a dry one leaves nothing behind.
    prepare(dirty.sources, out, dirty.settings, report=reports.append, dry_run=True)
    assert reports[2] == reports[0]
    same(tmp_path, cleaned)


def test_one_process_at_a_time(dirty: Dirty, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with work.opened(out, "another key"):
        (tmp_path / ".out.work" / "done").write_text("")
        with pytest.raises(UserError, match=r"^another process is preparing '.*out'; wait for it, or give another fo"):
            dirty.prepare(out)
        assert (tmp_path / ".out.work" / "done").exists()


def test_two_processes_write_the_same_bytes(dirty: Dirty, cleaned: Tokens, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):  # what one process began two can end
        dirty.prepare(tmp_path / "out", progress=Stop(STAGES[0], 8))
    assert 0 < len(names(tmp_path / ".out.work" / "clean")) < 2 * BLOCKS
    dirty.prepare(tmp_path / "out", processes=2)
    same(tmp_path, cleaned)


def test_what_may_be_over_at_the_next_call_costs_no_work(dirty: Dirty, cleaned: Tokens, tmp_path: Path) -> None:
    real, out = module.sources.documents, tmp_path / "out"

    def breaks(*args: object, **kwargs: object) -> Iterator[object]:
        for number, document in enumerate(real(*args, **kwargs)):  # type: ignore[arg-type]
            if number == 20:
                raise UserError("cannot read 's3://here': Connection reset")
            yield document

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match=r"reset; what is done is in .*\.out\.wo"),
    ):
        patch.setattr(module.sources, "documents", breaks)
        dirty.prepare(out)
    assert (tmp_path / ".out.work" / "clean" / "000000.arrow").exists()
    dirty.prepare(out)
    same(tmp_path, cleaned)
