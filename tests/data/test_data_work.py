"""The work folder: what is in it is whole or not there, and who may work in it."""

from __future__ import annotations

import errno
import operator
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import staging, work
from poise.data.work import UnfinishedError, clear, commit, committed, folder_of, opened, spread


def test_what_is_committed_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.part"
    assert committed(path) is None
    meta = commit(
        path, {"rows": 3, "names": ["a", "é"], "of": {"b": 0.1}}, lambda aside: aside.write_bytes(b"x" * 1000)
    )
    assert meta == committed(path) == {"rows": 3, "names": ["a", "é"], "of": {"b": 0.1}, "size": 1000}
    assert {each.name for each in path.parent.iterdir()} == {"a.part", "a.part.json"}

    def half(aside: Path) -> None:
        aside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        commit(path, {}, half)
    assert committed(path) == meta  # the old one is still there


@given(where=st.sampled_from(["a.part", "a.part.json"]), at=st.floats(0, 0.999), change=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_damage_is_noticed(tmp_path_factory: pytest.TempPathFactory, where: str, at: float, change: int) -> None:
    path = tmp_path_factory.mktemp("work") / "a.part"
    commit(
        path, {"rows": 3, "tally": {"damaged": ["a"], "skipped": {}}}, lambda aside: aside.write_bytes(bytes(range(99)))
    )
    victim = path.with_name(where)
    raw = bytearray(victim.read_bytes())
    raw[int(at * len(raw))] ^= change
    victim.write_bytes(raw)
    before = committed(path)
    assert before is None or before == {"rows": 3, "tally": {"damaged": ["a"], "skipped": {}}, "size": 99}
    victim.write_bytes(raw[: int(at * len(raw))])
    assert committed(path) is None


def test_the_folder_goes_or_stays(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for error, stays in (
        (None, False),
        (UserError("bad input"), False),
        (UnfinishedError("no network"), True),
        (KeyboardInterrupt(), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.ENOMEM, "a worker process died"), True),
    ):
        try:
            with opened(out, "key") as folder:
                (folder / "some").write_text("text")
                if error is not None:
                    raise error
        except (UserError, KeyboardInterrupt) as caught:
            assert "\n" not in str(caught)
            if isinstance(error, OSError):
                assert str(folder) in str(caught) and "goes on from there" in str(caught)
        assert folder_of(out).exists() == stays == any(out.parent.iterdir()), error
        clear(out, "another key")
        assert folder_of(out).exists() == stays
        clear(out, "key")
        assert not any(out.parent.iterdir())
    with opened(out, "key", keep=True) as folder:
        (folder / "some").write_text("text")
    with opened(out, "key") as folder:
        assert (folder / "some").exists()
    with opened(out, "key", keep=True):
        pass
    with opened(out, "other", keep=True) as folder:  # what other settings left there goes
        assert {path.name for path in folder.iterdir()} == {"key", "lock"}


def test_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with opened(out, "key") as folder:
        with pytest.raises(UserError, match="another process is preparing"), opened(out, "other"):
            pass
        clear(out, "key")  # the owner is at work: nothing goes
        assert folder.exists()
        with opened(tmp_path / "other", "key"):
            pass
    with opened(out, "key"):
        pass
    assert not any(tmp_path.iterdir())


def test_a_claim_on_a_removed_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process before removes its folder between our opening the lock and our claiming it."""
    out, real, calls = tmp_path / "out", work.claim, []

    def late(file: object) -> bool:
        calls.append(file)
        if len(calls) == 1:
            work._remove(out)
        return real(file)  # type: ignore[arg-type]

    monkeypatch.setattr(work, "claim", late)
    with opened(out, "key") as folder:
        assert (folder / "lock").exists()
        monkeypatch.undo()
        with pytest.raises(UserError, match="another process"), opened(out, "key"):
            pass
    assert len(calls) == 2


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write prepared data") as error,
        opened(tmp_path / "file" / "out", "key"),
    ):
        pass
    assert "goes on" not in str(error.value) and "\n" not in str(error.value)


def test_in_one_process_nothing_is_read_ahead() -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            read.append(number)
            yield number

    for result in spread(lambda x: 2 * x, items(), 1):
        assert result == 2 * read[-1]
    assert len(read) == 5


def test_several_processes_keep_the_order_and_a_dead_one_is_an_error() -> None:
    read: list[int] = []

    def items() -> Iterator[Callable[[], int]]:
        for number in range(30):
            read.append(number)
            yield partial(abs, -number) if number < 24 else partial(os._exit, 1)

    results = spread(operator.call, items(), 2)
    for number in range(18):
        assert next(results) == number
        assert len(read) <= number + 1 + 2 * 2 + 1  # two for each process beyond those that are waited for
    with pytest.raises(OSError, match="a worker process died") as error:
        list(results)
    message = str(staging.cannot_write(Path("/x/out"), error.value))
    assert message.startswith("out of memory while preparing '/x/out'") and "fewer --processes" in message


def test_workers_end_with_the_first_process() -> None:
    """A pipe's end that closes stands for the first process."""
    ours, theirs = os.pipe()
    ended = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work.os, "_exit", lambda code: ended.set())
        thread = threading.Thread(target=work._end_with, args=(ours,))
        thread.start()
        assert not ended.wait(0.05)
        os.close(theirs)
        thread.join(5)
    os.close(ours)
    assert ended.is_set()
