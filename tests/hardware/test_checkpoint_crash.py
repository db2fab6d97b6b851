"""Dying or failing at any moment of a save: what loads afterwards is whole, old or new, never a mixture."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from poise.hardware import checkpoint, files, manifest, shelf
from poise.hardware.checkpoint import CheckpointStore, SaveFailed

HERE = Path(__file__).parent


class Killed(BaseException):
    """Stands for kill -9: nothing in the store may catch it, so nothing is tidied up."""


def state(value):
    return {"a": torch.full((200,), float(value)), "b": {"c": torch.full((3, 3), float(value))}}


def loaded_value(folder):
    """Load as a restarted process would; every number must be of one checkpoint."""
    target = state(-1)
    loaded = CheckpointStore(folder).load(target)
    values = {float(v) for t in (target["a"], target["b"]["c"]) for v in t.flatten()}
    assert len(values) == 1, "a mixture of two checkpoints"
    (value,) = values
    assert loaded.meta == {"value": value}
    return value


def failing(function, at, error):
    """The function, raising at its ``at``-th call (counted over all injections of one test)."""
    calls = iter(range(10_000))

    def wrapped(*args, **kwargs):
        if next(calls) == at:
            raise error
        return function(*args, **kwargs)

    return wrapped


POINTS = [
    *[(os, "fsync", n) for n in range(8)],
    *[(Path, "replace", n) for n in range(2)],
    *[(os, "open", n) for n in range(2)],
    (Path, "mkdir", 0),
    (checkpoint.files, "write_tensors", 0),
    (files, "hash_files", 0),
    *[(manifest, "hash_file", n) for n in range(2)],
    (manifest, "write", 0),
    (FileSystemWriter, "write_data", 0),
    (FileSystemWriter, "finish", 0),
    (shelf, "commit", 0),
    (shelf, "prune", 0),
    (shutil, "rmtree", 0),
]


def name_of(point):
    return f"{point[0].__name__}.{point[1]}-{point[2]}"


def attempt(monkeypatch, store, point, error, step, value):
    owner, name, at = point
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, error))
        try:
            store.save(step, state(value), {"value": value})
        except (Killed, SaveFailed) as caught:
            return caught
    return None


@pytest.mark.parametrize("step", [10, 20], ids=["same-step", "new-step"])
@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_killed_at_any_point(tmp_path, monkeypatch, point, step):
    store = CheckpointStore(tmp_path)
    store.save(10, state(1), {"value": 1})
    caught = attempt(monkeypatch, store, point, Killed(), step, 2)
    value = loaded_value(tmp_path)
    assert value in (1, 2)
    assert caught is not None or value == 2, "save returned, but the checkpoint is not there"
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name or "replaced" in p.name]


@pytest.mark.parametrize("step", [10, 20], ids=["same-step", "new-step"])
@pytest.mark.parametrize("point", [p for p in POINTS if p[1] not in ("rmtree", "prune")], ids=name_of)
def test_disk_full_at_any_point(tmp_path, monkeypatch, point, step):
    store = CheckpointStore(tmp_path)
    store.save(10, state(1), {"value": 1})
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    caught = attempt(monkeypatch, store, point, full, step, 2)
    if caught is not None:
        assert "No space left on device" in str(caught)
        assert "\n" not in str(caught)
        assert not [p for p in tmp_path.iterdir() if "partial" in p.name]
    assert store.steps() in ([10], [10, 20])
    assert caught is not None or loaded_value(tmp_path) == 2
    store.save(30, state(3), {"value": 3})  # the same process goes on, and the next save works
    assert loaded_value(tmp_path) == 3


def test_every_injection_point_is_reached(tmp_path, monkeypatch):
    """Without this, a renamed function would silently turn the tests above into nothing."""
    for number, point in enumerate(POINTS):
        if point in [(os, "fsync", 7), (shutil, "rmtree", 0), (Path, "replace", 1)]:
            continue  # reached only when a step is replaced
        store = CheckpointStore(tmp_path / str(number))
        assert isinstance(attempt(monkeypatch, store, point, Killed(), 1, 1), Killed), point


@contextmanager
def file_size_limit(size):
    """Let the system itself refuse longer files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 30_000])
def test_a_disk_that_really_refuses(tmp_path, size):
    store = CheckpointStore(tmp_path)
    store.save(10, state(1), {"value": 1})
    with file_size_limit(size), pytest.raises(SaveFailed, match=r"step 20 was not saved .*File too large"):
        store.save(20, {"a": torch.zeros(50_000)}, {})
    assert sorted(p.name for p in tmp_path.glob("step*")) == ["step-00000010"]
    assert loaded_value(tmp_path) == 1


def test_a_vanished_folder_is_not_made_again(tmp_path):
    store = CheckpointStore(tmp_path / "disk" / "checkpoints")
    store.save(10, state(1), {"value": 1})
    shutil.rmtree(tmp_path / "disk")
    with pytest.raises(SaveFailed, match="No such file or directory"):
        store.save(20, state(2), {"value": 2})
    assert not (tmp_path / "disk").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(tmp_path):
    store = CheckpointStore(tmp_path / "c")
    store.save(10, state(1), {"value": 1})
    (tmp_path / "c").chmod(0o500)
    try:
        with pytest.raises(SaveFailed, match="Permission denied"):
            store.save(20, state(2), {"value": 2})
    finally:
        (tmp_path / "c").chmod(0o700)
    assert loaded_value(tmp_path / "c") == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed, match="the checkpoint folder cannot be used"):
        CheckpointStore(tmp_path / "file" / "c")


def test_an_interrupt_inside_the_writer_is_no_disk_failure(tmp_path, monkeypatch):
    """DCP wraps whatever it catches; Ctrl-C must still end the program."""
    store = CheckpointStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        attempt(monkeypatch, store, (FileSystemWriter, "write_data", 0), KeyboardInterrupt(), 1, 1)
    assert CheckpointStore(tmp_path).steps() == []


def test_a_bug_keeps_its_type(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    with pytest.raises(ZeroDivisionError):
        attempt(monkeypatch, store, (files, "hash_files", 0), ZeroDivisionError(), 1, 1)
    assert not list(tmp_path.glob("step*"))


@pytest.mark.parametrize("trials", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_real_kills_at_random_moments(tmp_path, trials):
    """A process that saves as fast as it can is killed with SIGKILL, again and again; see the script."""
    done = subprocess.run(
        [sys.executable, str(HERE / "scripts" / "kill_while_saving.py"), str(tmp_path), str(trials)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{trials} kills" in done.stdout
