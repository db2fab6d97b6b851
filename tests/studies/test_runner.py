"""Grids, arms, declarations, and the processes that run a study: what is asked for is run, once, whatever dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import Conflict, UserError
from poise.model import methods
from poise.studies import arms, runner
from poise.studies.cell import Stopped, run_cell
from poise.studies.grid import Declaration, Study, declare, expectation, lr_grid, open_study, plan, seed_list
from poise.studies.pool import Standing
from poise.studies.sizes import SIZES, recipe


@pytest.fixture
def base(tokens_dir: Path) -> dict[str, Any]:
    """Overrides that make the size ``tiny`` train on the small text in a tenth of a second."""
    return {
        "data": {"source": str(tokens_dir), "vocab_size": 512},
        "optim": {"schedule": {"warmup_steps": 2}},
        "train": {"steps": 8, "batch_size": 2, "eval_batches": 1},
    }


def planned(base: dict[str, Any], *texts: str, lrs: Iterable[float] = (1e-2,), seeds: int = 1) -> Declaration:
    return plan("lr-sensitivity", arms=texts, lrs=tuple(lrs), seeds=tuple(range(seeds)), size="tiny", over=base)


# -- the grid ------------------------------------------------------------------------------------------------------


def test_the_grid_of_the_paper() -> None:
    assert lr_grid("3e-4:3e-1:7") == (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    assert lr_grid(" 1e-2, 1e-3 ,0.1") == (1e-3, 1e-2, 0.1)
    assert lr_grid("0.01") == (0.01,)
    assert lr_grid("1e-3:4e-3:5") == (1e-3, 0.00141, 2e-3, 0.00283, 4e-3)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-9, 1e3), st.floats(1.0001, 1e9), st.integers(2, 100))
def test_a_grid_grows_and_is_nearly_even(first: float, ratio: float, points: int) -> None:
    last = first * ratio
    grid = lr_grid(f"{first!r}:{last!r}:{points}")
    assert len(grid) == points
    assert (grid[0], grid[-1]) == (first, last)
    assert all(a < b for a, b in pairwise(grid))
    for i, value in enumerate(grid):
        assert value == pytest.approx(first * ratio ** (i / (points - 1)), rel=0.061)


@pytest.mark.parametrize(
    "text",
    [
        *("", "1:2", "1:2:3:4", "1e-3:1e-1:x", "1e-3:1e-1:1", "1e-3:1e-1:0", "1e-3:1e-1:-7", "1e-3:1e-1:1e9", "fast"),
        *("1e-1:1e-3:7", "1e-3:1e-3:3", "-1e-3:1e-1:7", "0:1:3", "nan:1:3", "1e-3:inf:3", "1e-3,-1", "1e-3,0", "1,nan"),
        *("1e-3,,1", "1e-3,1e-3", "1e-3:1e-1:1000000000"),
    ],
)
def test_a_bad_grid_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        lr_grid(text)
    assert f"'{text}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "three", "1.5", "", "9999999999"])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        seed_list(text)


# -- arms ----------------------------------------------------------------------------------------------------------


def test_arms_are_read_as_documented() -> None:
    lists = [
        "baseline, qk_norm+z_loss:coefficient=1e-5:x=2",
        "w=baseline@optim.beta2=0.99;optim.schedule.decay_ends=[3,5]",
    ]
    plain, both, other = arms.parse_all(arms.split(lists))
    assert (plain.label, plain.methods, plain.over) == ("baseline", (), {})
    assert both.methods == ("qk_norm", "z_loss:coefficient=1e-5,x=2")
    assert (other.label, other.methods) == ("w", ())
    assert other.over == {"optim": {"beta2": 0.99, "schedule": {"decay_ends": [3, 5]}}}
    assert arms.parse("a=z_loss:coefficient=1e+1+qk_norm").methods == ("z_loss:coefficient=1e+1", "qk_norm")
    assert arms.parse('q=qk_norm@data="a;b,c"'.replace("data", "optim.name")).over == {"optim": {"name": "a;b,c"}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not complete"),
        ("label=", "not complete"),
        ("@optim.beta2=1", "not complete"),
        ("qk_norm@", "not complete"),
        ("a b=qk_norm", "label 'a b' may have letters, digits and _ . - +"),
        ("=qk_norm", "label '' may have"),
        ("a/b=z_loss:coefficient=1e-5@optim.beta2=1", "label 'a/b' may"),
        ("baseline+qk_norm", "stands alone"),
        ("qk_norm+", "stands alone"),
        ("qk_norm@beta2", "not key=value"),
        ("qk_norm@optim.beta2=", "not key=value"),
        ("qk_norm@optim.lr=1e-3", "--lrs"),
        ("qk_norm@seed=3", "--seeds"),
        ("qk_norm@guard.enabled=true", "without a guard"),
        ("qk_norm@train.compile=on", "too short"),
        ("qk_norm@data.source=x", "same text"),
        ("qk_norm@model.methods=[]", "before the @"),
    ],
)
def test_a_bad_arm_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        arms.parse(text)
    assert f"'{text}'" in str(caught.value)
    assert says in str(caught.value)


def test_two_arms_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="'qk_norm' is named twice"):
        arms.parse_all(["qk_norm", "qk_norm"])
    with pytest.raises(UserError, match="at least one arm"):
        arms.parse_all([])


def test_a_method_says_that_it_changes_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = arms.parse("qk_norm+z_loss:coefficient=1e-5")
    assert arms.changes_lr(arm) == []
    monkeypatch.setattr(methods.load("z_loss"), "CHANGES_LR", "it divides it by two", raising=False)
    assert arms.changes_lr(arm) == ["z_loss: it divides it by two"]
    assert arms.changes_lr(arms.parse("baseline")) == []


# -- declarations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "over", "kind", "says"),
    [
        (["qk_nrom"], {}, UserError, "arm 'qk_nrom': no model method 'qk_nrom', did you mean 'qk_norm'"),
        (["embed_norm+embed_scale"], {}, Conflict, "embed_norm"),
        (["qk_norm:x=1"], {}, UserError, "no setting 'x'"),
        (["qk_norm@optim.beta3=1"], {}, UserError, "unknown key 'optim.beta3'"),
        (["baseline@model.n_heads=3"], {}, UserError, "arm 'baseline@model.n_heads=3'"),
        (["baseline", "other=baseline"], {}, UserError, "'baseline' and 'other' are the same"),
        (["baseline"], {"optim": {"lr": 1.0}}, UserError, "'optim.lr' cannot be set in a study"),
        (["baseline"], {"seed": 1}, UserError, "--seeds"),
        (["baseline"], {"train": {"steps": 1}}, UserError, "warmup_steps"),
        (["baseline"], {"data": {"val_fraction": 0.0}}, UserError, "val_fraction is 0"),
        (["baseline"], {"train": {"seq_len": 100_000}}, UserError, "held-out"),
        (["baseline"], {"train": {"stepz": 3}}, UserError, "did you mean 'train.steps'"),
    ],
)
def test_everything_is_checked_before_anything_runs(
    texts: list[str], over: dict[str, Any], kind: type[UserError], says: str, base: dict[str, Any]
) -> None:
    from poise.core.config import merge

    with pytest.raises(kind) as caught:
        planned(merge(base, over), *texts)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seeds_are_outermost_and_arms_innermost(base: dict[str, Any]) -> None:
    declaration = planned(base, "baseline", "qk_norm", lrs=(1e-3, 1e-2), seeds=2)
    order = [(cell.seed, cell.lr, cell.arm) for cell in declaration.cells]
    assert order == [(s, lr, arm) for s in (0, 1) for lr in (1e-3, 1e-2) for arm in ("baseline", "qk_norm")]
    assert len({cell.key for cell in declaration.cells}) == 8
    assert all(
        cell.recipe.model.methods == ((cell.arm,) if cell.arm != "baseline" else ()) for cell in declaration.cells
    )


def test_methods_of_all_arms_come_first(base: dict[str, Any]) -> None:
    declaration = planned({**base, "model": {"methods": ["z_loss"]}}, "baseline", "qk_norm")
    assert [cell.recipe.model.methods for cell in declaration.cells] == [("z_loss",), ("z_loss", "qk_norm")]


def test_a_declaration_is_written_once(base: dict[str, Any], tmp_path: Path) -> None:
    first = planned(base, "baseline", "w=qk_norm@optim.beta2=0.99", lrs=(1e-3, 1e-2))
    study = declare(tmp_path / "s", first)
    text = (tmp_path / "s" / "study.toml").read_text()
    assert open_study(tmp_path / "s").declaration == first
    assert [c.key for c in open_study(tmp_path / "s").declaration.cells] == [c.key for c in first.cells]
    again = declare(tmp_path / "s", planned(base, "baseline", "w=qk_norm@optim.beta2=0.99", lrs=(1e-3, 1e-2)))
    assert again.declaration == study.declaration
    with pytest.raises(UserError, match=r"declares another study: lrs is \[0.001, 0.01\] there and \[0.001\] here"):
        declare(tmp_path / "s", planned(base, "baseline", "w=qk_norm@optim.beta2=0.99", lrs=(1e-3,)))
    assert (tmp_path / "s" / "study.toml").read_text() == text


def test_a_hypothesis_stands_unless_another_is_given(base: dict[str, Any], tmp_path: Path) -> None:
    import dataclasses

    default = planned(base, "baseline", "qk_norm")
    assert default.hypothesis == expectation(["baseline", "qk_norm"])
    declare(tmp_path / "s", dataclasses.replace(default, hypothesis="it breaks"))
    assert declare(tmp_path / "s", default, keep_hypothesis=True).declaration.hypothesis == "it breaks"
    with pytest.raises(UserError, match="hypothesis is 'it breaks' there"):
        declare(tmp_path / "s", dataclasses.replace(default, hypothesis="it holds"))


def test_a_folder_that_is_no_study(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a study"):
        open_study(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has other files"):
        declare(tmp_path, planned(base, "baseline"))
    with pytest.raises(UserError, match="cannot write the study"):
        declare(tmp_path / "notes.txt" / "s", planned(base, "baseline"))
    (tmp_path / "study.toml").write_text("format = 1\nname = 3\nlrs = 'x'")
    with pytest.raises(UserError, match="lrs"):
        open_study(tmp_path)
    (tmp_path / "study.toml").write_text("format = 1")
    with pytest.raises(UserError, match=r"study\.toml|Declaration"):
        open_study(tmp_path)
    (tmp_path / "study.toml").write_text("format = 99")
    with pytest.raises(UserError, match="format 99"):
        open_study(tmp_path)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_small_recipes_without_methods(size: str) -> None:
    from poise.model.counts import count

    made = recipe(size)
    assert (made.model.methods, made.optim.name, made.optim.clip_norm) == ((), "adamw", 1.0)
    assert count(made.spec()).params <= {"tiny": 100_000, "proxy": 500_000, "1m": 3_000_000, "10m": 15_000_000}[size]


def test_an_unknown_size() -> None:
    with pytest.raises(UserError, match="no size 'tinny', did you mean 'tiny'"):
        recipe("tinny")


# -- running -------------------------------------------------------------------------------------------------------


def finish_here(study: Study) -> None:
    """Run what is missing in this process."""
    for cell in study.missing():
        run_cell(cell, study.tokens(), study.cells_folder)


def test_what_is_there_is_not_run_again_and_a_damaged_record_is(base: dict[str, Any], tmp_path: Path) -> None:
    study = declare(tmp_path / "s", planned(base, "baseline", lrs=(1e-3, 1e-2)))
    finish_here(study)
    first, second = (study.cells_folder / f"{cell.key}.json" for cell in study.declaration.cells)
    assert runner.run_study(study) == runner.Outcome(total=2, reused=2)  # no worker was started
    kept = first.stat().st_mtime_ns
    loss = json.loads(second.read_text())["loss"]
    second.write_text(second.read_text()[:100])
    assert [cell.key for cell in study.missing()] == [second.stem]
    record, there = runner.run_one(study, second.stem)
    assert (record["loss"], there) == (loss, False)
    assert runner.run_one(study, first.stem)[1]
    assert first.stat().st_mtime_ns == kept


def test_two_studies_share_a_cache(base: dict[str, Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    study = declare(tmp_path / "a", planned(base, "baseline", "qk_norm"))
    for cell in study.declaration.cells:
        runner.run_one(study, cell.key, cache=cache)
    other = declare(tmp_path / "b", planned(base, "with_norm=qk_norm"))
    assert runner.run_study(other, cache=cache) == runner.Outcome(total=1, reused=1)
    (record,) = other.records()
    assert record["arm"] == "with_norm"
    assert record["loss"] == study.records()[1]["loss"]
    assert json.loads((other.cells_folder / f"{record['key']}.json").read_text())["loss"] == record["loss"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot use the cache"):
        runner.run_study(declare(tmp_path / "c", planned(base, "z_loss")), cache=tmp_path / "file")


def test_a_second_process_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    study = declare(tmp_path / "s", planned(base, "baseline"))
    fcntl = pytest.importorskip("fcntl")
    with (study.folder / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is running the study"):
            runner.run_study(study)


def test_bad_counts_and_keys(base: dict[str, Any], tmp_path: Path) -> None:
    study = declare(tmp_path / "s", planned(base, "baseline"))
    with pytest.raises(UserError, match="--workers is 100000"):
        runner.run_study(study, workers=100_000)
    with pytest.raises(UserError, match="--threads is 0"):
        runner.run_study(study, threads=0)
    with pytest.raises(UserError, match="no cell 'abc'"):
        runner.run_one(study, "abc")


def test_commands_and_the_slurm_array_run_every_missing_cell_once(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = declare(tmp_path / "my study", planned(base, "baseline", lrs=(1e-3, 1e-2, 1e-1), seeds=2))
    done = study.declaration.cells[1]
    run_cell(done, study.tokens(), study.cells_folder)
    keys = [cell.key for cell in study.declaration.cells if cell is not done]
    lines = runner.commands(study)
    assert [shlex.split(line) for line in lines] == [["poise", "study", "cell", str(study.folder), key] for key in keys]

    monkeypatch.setattr(runner, "MOST_TASKS", 3)
    script = runner.write_slurm(study)
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "poise"
    stub.write_text(f'#!/bin/bash\necho "$4" >> {shlex.quote(str(tmp_path / "ran"))}\n[ "$4" != {keys[1]} ]\n')
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert "#SBATCH --array=0-2\n" in script.read_text()
    codes = [
        subprocess.run(["bash", script], env=environment | {"SLURM_ARRAY_TASK_ID": str(task)}, check=False).returncode
        for task in range(3)
    ]
    assert (tmp_path / "ran").read_text().split() == keys
    assert codes == [1, 0, 0]  # a run that failed is seen, and the others of its task are done


def test_a_killed_worker_takes_its_cell_only_and_a_stopped_study_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
    """One worker: its first cell fails, its second is killed (-9), its third is stopped (SIGTERM) and goes on later."""
    long = "@train.steps=4000;train.eval_every=0"
    study = declare(tmp_path / "s", planned(base, "baseline", f"killed=qk_norm{long}", f"stopped=z_loss{long}"))
    fails, killed, stopped = study.declaration.cells
    (study.cells_folder / f"{fails.key}.json").mkdir()  # its record cannot be written
    notes: list[str] = []
    signals: list[int] = []
    others = set(multiprocessing.active_children())

    def disturb(standing: Standing) -> None:
        steps = standing.steps - sum(cell.recipe.train.steps for cell in (fails, killed)[: standing.cells])
        if steps <= 0 or standing.cells in signals:
            return
        signals.append(standing.cells)
        if standing.cells == 1:
            (child,) = set(multiprocessing.active_children()) - others
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        elif standing.cells == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    outcome = runner.run_study(study, workers=1, progress=disturb, note=notes.append)
    assert (outcome.total, outcome.reused, outcome.done, outcome.stopped) == (3, 0, 0, "SIGTERM")
    assert set(outcome.failed) == {fails.key, killed.key}
    assert "IsADirectoryError" in outcome.failed[fails.key]
    assert "signal 9" in outcome.failed[killed.key]
    assert notes == [f"{runner.describe(c)} failed: {outcome.failed[c.key]}" for c in (fails, killed)]
    assert study.failures() == outcome.failed
    assert set(multiprocessing.active_children()) <= others
    assert (study.cells_folder / f"{stopped.key}.partial").exists()

    steps: list[int] = []
    with pytest.raises(Stopped):
        run_cell(stopped, study.tokens(), study.cells_folder, progress=steps.append, stop=lambda: True)
    assert 1 < steps[0] < 4000
