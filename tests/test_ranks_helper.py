"""The processes that other tests share: what a rank says is heard, and one that fails spoils no other test."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.ranks import RankError, Ranks, launch
from torch import distributed

pytestmark = pytest.mark.dist


def total(rank: int, value: float) -> tuple[int, float, int]:
    sum_ = torch.tensor(value + rank)
    distributed.all_reduce(sum_)
    return rank, float(sum_), os.getpid()


def fails_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("what rank 1 saw")
    distributed.barrier()


def dies(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def sleeps(rank: int) -> None:
    time.sleep(60.0 * rank)


def leaves_the_group(rank: int) -> None:
    distributed.destroy_process_group()


def answers_what_cannot_be_sent(rank: int) -> object:
    return lambda: rank


def test_ranks_answer_and_stay(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(total, 3.0), two_ranks.run(total, 4.0)
    assert [answer[:2] for answer in first] == [(0, 7.0), (1, 7.0)]
    assert [answer[:2] for answer in second] == [(0, 9.0), (1, 9.0)]
    assert [answer[2] for answer in first] == [answer[2] for answer in second]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (fails_on_one, "on rank 1:(.|\n)*in fails_on_one\n(.|\n)*ValueError: what rank 1 saw"),
        (dies, "rank 0 has ended with code -9|Connection closed by peer"),
        (sleeps, r"rank 0, 1 has not answered in 0\.5 s"),
        (leaves_the_group, "the group has to stay"),
        (answers_what_cannot_be_sent, "on rank [01]:(.|\n)*lambda"),
    ],
    ids=lambda case: case.__name__ if callable(case) else "",
)
def test_a_failure_is_said_and_ends_with_its_group(work: object, message: str) -> None:
    with Ranks(2) as ranks:
        before = ranks.run(total, 0.0)
        ranks.patience_s = 0.5 if work is sleeps else 60.0
        with pytest.raises(RankError, match=message):
            ranks.run(work)
        ranks.patience_s = 60.0
        after = ranks.run(total, 0.0)
        assert [answer[1] for answer in after] == [1.0, 1.0]
        assert not {answer[2] for answer in before} & {answer[2] for answer in after}
        for _, _, pid in before:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def writes_its_place(rank: int, folder: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
    assert not distributed.is_initialized()
    (folder / str(rank)).write_text(" ".join(os.environ[name] for name in names))


def fails_alone(rank: int) -> None:
    os.write(2, b"said by the rank\n")
    assert rank == 1, "rank 0 is wrong"
    time.sleep(60)


def hangs(rank: int) -> None:
    time.sleep(60)


def test_a_launched_world_has_what_torchrun_gives(tmp_path: Path) -> None:
    launch(writes_its_place, tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["0 0 2 127.0.0.1", "1 1 2 127.0.0.1"]
    assert "RANK" not in os.environ


def test_a_launched_rank_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ranks.GRACE_S", 0.1)
    with pytest.raises(RankError, match=r"(?s)ended with \[1, None\].*said by the rank.*rank 0 is wrong"):
        launch(fails_alone)
    with pytest.raises(RankError, match=r"ended with \[None, None\] \(None: not in 0\.2 s\)"):
        launch(hangs, patience_s=0.2)
