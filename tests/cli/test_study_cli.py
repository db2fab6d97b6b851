"""``poise study``: mistakes are one line, runs are independent commands, and what is there is shown."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from poise.cli import study as command
from poise.cli.main import main
from poise.studies import runner
from poise.studies.pool import Standing


class StandIn:
    """A result that counts."""

    def __init__(self, records: list[dict[str, Any]], declaration: dict[str, Any]) -> None:
        self._said = f"{len(records)} records of {','.join(declaration['arms'])}"

    def table(self) -> str:
        return self._said

    def to_json(self) -> dict[str, Any]:
        return {"said": self._said}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Table and page have their own tests."""
    table, page = ModuleType("stand_in_table"), ModuleType("stand_in_page")
    table.summarise = StandIn  # type: ignore[attr-defined]

    def write(result: StandIn, records: list[dict[str, Any]], declaration: dict[str, Any], path: Path) -> None:
        path.write_text(f"<html>{result.table()}")

    page.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, runner.TABLES["lr-sensitivity"], table)
    monkeypatch.setitem(sys.modules, runner.PAGE, page)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def words(tokens_dir: Path) -> list[str]:
    """A study of two runs of a tenth of a second."""
    values = {"data.source": tokens_dir, "train.steps": 8, "train.batch_size": 2, "optim.schedule.warmup_steps": 2}
    over = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return ["study", "lr-sensitivity", "--lrs", "1e-2", "--seeds", "1", "--size", "tiny", "--out", "s", *over]


def test_a_study_as_independent_commands_and_then_shown(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*words, "--methods", "baseline,qk_norm"]
    assert main([*words, "--emit", "commands", "--hypothesis", "nothing happens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert main(["study", "show", "s"]) == 1
    out = capsys.readouterr().out
    assert "no run has a record yet" in out
    assert "2 of 2 runs are missing" in out
    assert main(["study", "show", "s", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == 2
    assert not Path("s/report.html").exists()

    assert main(shlex.split(lines[0])[1:]) == 0
    assert "baseline, lr 0.01, seed 0: finished, loss" in capsys.readouterr().out
    assert main(shlex.split(lines[0])[1:]) == 0
    assert "was there already" in capsys.readouterr().out
    assert main(["study", "show", "s"]) == 0
    out = capsys.readouterr().out
    assert "1 records of baseline,qk_norm" in out
    assert "not complete: 1 of 2 runs are missing" in out
    assert main([*words, "--emit", "commands"]) == 0
    assert capsys.readouterr().out.splitlines() == lines[1:]

    assert main([*shlex.split(lines[1])[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arm"] == "qk_norm"
    assert main([*words, "--json"]) == 0  # nothing is left to run, so no worker starts
    assert json.loads(capsys.readouterr().out) == {
        "folder": "s",
        "missing": 0,
        "failed": {},
        "said": "2 records of baseline,qk_norm",
    }
    assert Path("s/report.html").read_text() == "<html>2 records of baseline,qk_norm"
    saved = json.loads(Path("s/result.json").read_text())
    assert (saved["runs"], saved["missing"], saved["study"]["hypothesis"]) == (2, 0, "nothing happens")
    assert Path("s/table.txt").read_text() == "2 records of baseline,qk_norm\n"
    assert main(["study", "show", "s", "--keys", "--json"]) == 0
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == ["done", "done"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "--methods"),
        (["--methods", ""], "at least one arm"),
        (["--methods", "qk_nrom"], "did you mean 'qk_norm'"),
        (["--methods", "baseline,baseline"], "named twice"),
        (["--methods", "embed_norm+embed_scale"], "embed_norm"),
        (["--methods", "baseline@"], "not complete"),
        (["--methods", "baseline", "--lrs", "1:2"], "'1:2', which has 2 parts"),
        (["--methods", "baseline", "--lrs=-1e-3:1:3"], "above 0"),
        (["--methods", "baseline", "--seeds", "0"], "--seeds is '0'"),
        (["--methods", "baseline", "--size", "2m"], "no size '2m'"),
        (["--methods", "baseline", "--workers", "x"], "--workers is 'x'"),
        (["--methods", "baseline", "--workers", "-1"], "--workers is '-1'"),
        (["--methods", "baseline", "--cache", "/dev/null"], "'/dev/null': it is a file; give a folder with --cache"),
        (["--methods", "a b=baseline"], "label 'a b' may have letters"),
        (["--methods", "baseline", "--threads", "0"], "--threads is '0'"),
        (["--methods", "baseline", "--optim.lr", "1e-3"], "--lrs"),
        (["--methods", "baseline", "--optim.lrr", "1e-3"], "unknown key 'optim.lrr'"),
        (["--methods", "baseline", "--emit", "pbs"], "pbs"),
        (["--methods", "baseline", "--data.source", "no/such"], "no/such"),
        (["--methods", "baseline", "--out", "/dev/null/s"], "cannot write the study"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(
    more: list[str], says: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("poise")]
    assert len(lines) == 1
    assert lines[0].startswith("poise study: ")
    assert says in lines[0]
    assert not Path("s").exists()


def test_one_is_not_plural(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--methods", "baseline", "--dry-run"]) == 0
    assert "1 arm x 1 learning rate x 1 seed = 1 run of 8 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["study", "lr-sensitivty"], "did you mean 'lr-sensitivity'"),
        (["study", "show", "nowhere"], "'nowhere' is not a study"),
        (["study", "cell", "nowhere", "key"], "'nowhere' is not a study"),
        (["study", "cell"], "required"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_other_mistakes_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_help_lists_only_studies_that_are_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["study"]) == 2
    assert main(["study", "--help"]) == 0
    monkeypatch.setattr(command, "NAMED", {"here": ("json", "is there"), "gone": ("poise.studies.not_there", "is not")})
    capsys.readouterr()
    assert main(["study", "--help"]) == 0
    out = capsys.readouterr().out
    assert "here" in out
    assert "gone" not in out
    assert main(["study", "gone"]) == 2
    monkeypatch.setattr(sys.modules["json"], "main", lambda words: 7 + len(words), raising=False)
    assert main(["study", "here", "--x"]) == 8


def test_plain_progress_says_how_long_it_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    with command.Progress() as progress:
        for second in range(101):
            now = 1000.0 + second
            progress(Standing(second // 50, 4, 10 * second, 2000, float(second)))
        progress.note("a cell failed")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  5%  0 of 4 runs, 10 steps/s, 10 s, 3 min 10 s left"
    assert [line.split()[0] for line in lines] == ["5%", "20%", "35%", "50%", "a", "50%"]
