"""The restart ledger: back one checkpoint after repeated deaths at once, and never otherwise."""

import json

import pytest
import torch

from poise.hardware.attempts import Attempts
from poise.hardware.checkpoint import CheckpointStore

GRACE = 5


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=9)
    for step in (60, 80, 100):
        store.save(step, {"x": torch.tensor(step)}, {})
    return store


def live(store, steps_done, end=None, save_every=20):
    """One process: resume as the trainer does, train some steps, and die (or end)."""
    store = CheckpointStore(store.folder, keep_last=9)
    start = store.load({"x": torch.tensor(0)}, at_most=store.resume_limit()).step
    store.begin_attempt(start)
    for step in range(start + 1, start + steps_done + 1):
        store.note_progress(step)
        if step % save_every == 0:
            store.save(step, {"x": torch.tensor(step)}, {})
    if end:
        store.end_attempt(end)
    return start


def test_two_deaths_at_once_go_one_checkpoint_back(store):
    assert store.resume_limit() is None
    assert live(store, 1) == 100
    assert store.resume_limit() is None
    assert live(store, 1) == 100
    assert store.resume_limit() == 99
    assert live(store, 1) == 80
    assert live(store, 1) == 80, "one more chance, although the newer checkpoint is still there"
    assert live(store, 1) == 60


def test_when_every_checkpoint_fails_they_are_not_to_blame(store):
    starts = [live(store, 0) for _ in range(8)]
    assert starts == [100, 100, 80, 80, 60, 60, 100, 100]
    assert store.steps() == [60, 80, 100], "nothing is thrown away on the way"


def test_once_the_older_one_works_the_bad_one_is_put_aside(store):
    assert [live(store, 1) for _ in range(3)] == [100, 100, 80]
    assert live(store, GRACE) == 80  # not yet healthy
    assert store.steps() == [60, 80, 100]
    assert live(store, 0) == 60
    assert live(store, GRACE + 1) == 60
    assert store.steps() == [60], "what was saved after step 60 is from another history now"
    assert live(store, 3) == 60, "it was healthy: no limit, newest good"
    assert store.resume_limit() is None


@pytest.mark.parametrize("progress", [GRACE + 1, 19, 25])
def test_kills_during_healthy_training_never_go_back(store, progress):
    newest = 100
    for _ in range(6):
        assert live(store, progress) == newest
        newest = store.latest()
        assert store.resume_limit() is None
    assert newest == (100 if progress < 20 else 220)


def test_a_save_is_progress_however_few_the_steps(store):
    starts = [live(store, 2, save_every=2) for _ in range(4)]
    assert starts == [100, 102, 104, 106]


def test_different_deaths_are_not_the_same_way(store):
    assert live(store, 1, end="NonFiniteState") == 100
    assert live(store, 1) == 100
    assert store.resume_limit() is None
    assert live(store, 1, end="NonFiniteState") == 100
    assert live(store, 1, end="NonFiniteState") == 100
    assert store.resume_limit() == 99


@pytest.mark.parametrize("end", ["clean", "KeyboardInterrupt", "SystemExit"])
def test_a_clean_end_is_no_death(store, end):
    for _ in range(4):
        assert live(store, 0, end=end) == 100
    assert store.resume_limit() is None


def test_a_fresh_start_has_nowhere_to_go_back_to(tmp_path):
    store = CheckpointStore(tmp_path)
    for _ in range(4):
        store.begin_attempt(0)
        assert store.resume_limit() is None


def test_progress_is_written_only_in_the_first_steps(tmp_path):
    ledger = Attempts(tmp_path / "attempts.json")
    ledger.begin(10)
    answers = [ledger.note_progress(step) for step in range(11, 30)]
    assert answers.index(True) == GRACE
    assert answers.count(True) == 1
    assert json.loads(ledger.path.read_text())["attempts"][-1]["reached"] == 16


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempts": [{"x": 1}]}', "\x00\xff"])
def test_an_unreadable_ledger_starts_anew(tmp_path, content, caplog):
    path = tmp_path / "attempts.json"
    path.write_text(content)
    ledger = Attempts(path)
    assert ledger.limit([10]) is None
    assert "starts anew" in caplog.text
    ledger.begin(10)
    assert Attempts(path).start == 10


def test_a_ledger_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    ledger = Attempts(tmp_path / "gone" / "attempts.json")
    ledger.begin(1)
    assert ledger.note_progress(2) is False
    ledger.end()
    assert "was not written" in caplog.text


def test_the_ledger_stays_small(tmp_path):
    ledger = Attempts(tmp_path / "attempts.json")
    for step in range(100):
        ledger.begin(step)
    assert len(json.loads(ledger.path.read_text())["attempts"]) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["attempts.json"]
