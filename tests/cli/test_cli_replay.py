"""``poise replay``: one JSON object a line for programs, a table for people, one line for mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from poise.cli.main import main


def write_log(path: Path, bad: int = 200, n: int = 260) -> Path:
    loss = (3.0 + 5.0 * np.exp(-np.arange(n) / 60)) * np.exp(np.random.default_rng(1).normal(0, 0.01, n))
    rows = [f"{i + 1},{x:.5f}" for i, x in enumerate(loss)]
    if bad:
        rows[bad - 1] = f"{bad},nan"
    path.write_text("step,loss\n" + "\n".join(rows) + "\n")
    return path


def test_json_is_one_object_an_alarm_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "run_a.csv")
    assert main(["replay", str(log), "--json"]) == 0
    out, err = capsys.readouterr()
    (found,) = [json.loads(line) for line in out.splitlines()]
    assert list(found)[:5] == ["trace", "step", "kind", "severity", "action"]
    assert (found["trace"], found["step"], found["kind"], found["severity"]) == ("run_a", 200, "nonfinite", "critical")
    assert found["action"] == "skip" and found["value"] == "nan" and found["expected"] > 0
    assert not err


def test_healthy_log_prints_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--json", str(write_log(tmp_path / "ok.csv", bad=0))]) == 0
    assert capsys.readouterr().out == ""


def test_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    logs = [write_log(tmp_path / "a.csv"), write_log(tmp_path / "b" / "a.csv", bad=0)]
    assert main(["replay", *map(str, logs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{logs[0]}: table, 260 points, steps 1 to 260"  # two of one name are told apart
    assert lines[1].split()[:4] == ["step", "kind", "severity", "would"]
    assert lines[2].split()[:4] == ["200", "nonfinite", "critical", "skip"]
    assert lines[3] == "  1 alarms: 1 nonfinite; would have done: 1 skip"
    assert lines[5] == "  0 alarms; would have done: nothing"


def test_notes_of_the_reader_and_of_the_guard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "a.csv", bad=0)
    norms = np.exp(np.random.default_rng(2).normal(0, 0.1, 260))
    norms[150] = 50.0
    rows = log.read_text().splitlines()
    log.write_text("step,lm loss,grad norm\n" + "".join(f"{r},{x}\n" for r, x in zip(rows[1:], norms, strict=True)))
    assert main(["replay", str(log), "--json"]) == 0
    out, err = capsys.readouterr()
    assert not out and "column 'lm loss' is taken as loss" in err
    assert main(["replay", str(log), "--json", "--all"]) == 0
    kinds = {(found["step"], found["kind"]) for found in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (151, "grad_spike") in kinds
    assert main(["replay", str(log)]) == 0
    assert "  note: column 'lm loss' is taken as loss" in capsys.readouterr().out


def test_guard_values_and_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "a.csv")
    log.write_text(log.read_text().replace("step,loss", "t,objective"))
    words = ["replay", str(log), "--json", "--step-column", "t", "--loss-column=objective"]
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main([*words, "--guard.enabled=false"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*words, "--guard.skip_patience", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["action"] == "rollback"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: LOG"),
        (["nowhere.csv"], "no log 'nowhere.csv'"),
        (["text.txt"], "is no log that can be read"),
        (["empty.csv"], "is empty"),
        (["."], "name one of them"),
        (["a.csv", "--guard.enabledd", "true"], "did you mean 'guard.enabled'"),
        (["a.csv", "--optim.lr", "1"], "unknown key 'optim.lr'"),
        (["a.csv", "--guard.mode", "halt"], "only observes"),
        (["a.csv", "--jsn"], "--jsn"),
        (["a.csv", "--loss-column", "lss"], "did you mean 'loss'"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_log(Path("a.csv"))
    Path("text.txt").write_text("Dear all,\nall is well.\n")
    Path("empty.csv").touch()
    assert main(["replay", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert err.startswith("poise replay: ") and says in err


def test_a_missing_log_is_said_before_any_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(write_log(tmp_path / "a.csv")), str(tmp_path / "b.csv")]) == 2
    assert capsys.readouterr().out == ""


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["replay", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "poise replay loss.csv" in out and "--guard.skip_patience" in out


def test_replay_costs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom poise.cli.main import main\n"
        "code = main(['replay', '--json', sys.argv[1]])\nsys.exit(code or 'torch' in sys.modules)"
    )
    log = write_log(tmp_path / "a.csv")
    assert subprocess.run([sys.executable, "-c", code, str(log)], check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("steps", [3, 3000])
def test_a_reader_that_has_gone_is_no_error(tmp_path: Path, steps: int) -> None:
    """Neither when it goes before anything was written, nor in the middle of more than a pipe holds."""
    log = tmp_path / "a.csv"
    log.write_text("step,loss\n" + "".join(f"{i},nan\n" for i in range(1, steps + 1)))
    command = [sys.executable, "-m", "poise.cli", "replay", "--json", str(log)]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline() if steps > 3 else ""
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=20) == 0
    assert not first or json.loads(first)["step"] == 1
    assert said == ""
