"""``poise diagnose``: exit codes, strict JSON, a screen for people, one line for mistakes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.cli.main import main


def write_log(path: Path, *, bad: str = "", n: int = 600) -> Path:
    rng = np.random.default_rng(len(path.stem))
    loss = (3.0 + 5.0 * np.exp(-np.arange(n) / 60)) * np.exp(rng.normal(0, 0.01, n))
    if bad == "spike":
        loss[400:430] *= 1 + 0.6 * np.exp(-np.arange(30) / 10)
    if bad == "diverged":
        loss[400:] = np.nan
    if bad == "nan":
        loss[:] = np.nan
    if bad == "odd":
        loss[400] *= 1.4
    path.write_text("step,loss\n" + "".join(f"{i + 1},{x:.5f}\n" for i, x in enumerate(loss)))
    return path


def strict(text: str) -> dict[str, Any]:
    """Parse JSON that holds no NaN or Infinity."""
    return dict(json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")))


def fails(words: list[str], capsys: pytest.CaptureFixture[str], *says: str) -> None:
    assert main(["diagnose", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("poise diagnose: ") and err.count("\n") == 1
    for text in says:
        assert text in err


def test_a_screen_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(write_log(tmp_path / "run.csv", bad="spike"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run: table, 600 points, steps 1 to 600"
    assert lines[1].startswith("1 loss spike in 600 points")
    assert any(line.startswith("401-") and "fast spike" in line for line in lines)
    assert "What to do:" in lines and len(lines) < 40 and max(map(len, lines)) <= 120


def test_json_of_one_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(write_log(tmp_path / "run.csv", bad="diverged")), "--json"]) == 0
    out, err = capsys.readouterr()
    told = strict(out)
    assert not err and out.count("\n") == 1
    assert (told["format"], told["points"], told["health"]) == ("table", 600, "diverged")
    (event,) = told["events"]
    wanted = {"kind", "start", "peak", "end", "severity", "cause", "recommendation", "cost", "precursors", "recovery"}
    assert wanted <= set(event)
    assert (event["kind"], event["start"], event["value"]) == ("nonfinite", 401, "nan")
    assert event["cost"]["steps"] == 200 and isinstance(event["cause"]["evidence"], list)
    assert event["recommendation"]["source"]


def test_json_of_a_healthy_log_has_no_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", "--json", str(write_log(tmp_path / "ok.csv"))]) == 0
    told = strict(capsys.readouterr().out)
    assert (told["events"], told["health"], told["lost_steps"]) == ([], "healthy", 0)


@pytest.mark.parametrize(
    ("bad", "fail_on", "code"),
    [
        ("", "note", 0),
        ("odd", "note", 1),
        ("odd", "warning", 0),
        ("spike", "warning", 1),
        ("spike", "critical", 0),
        ("diverged", "critical", 1),
        ("diverged", "", 0),
    ],
)
def test_exit_code(bad: str, fail_on: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diagnose", str(write_log(tmp_path / "run.csv", bad=bad)), *(["--fail-on", fail_on] if fail_on else [])]
    assert main(words) == code
    assert main([*words, "--json"]) == code
    capsys.readouterr()


def test_several_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [str(write_log(tmp_path / "a.csv", bad="spike")), str(write_log(tmp_path / "bb.csv"))]
    assert main(["diagnose", *logs, "--fail-on", "warning"]) == 1
    out = capsys.readouterr().out
    assert "a and bb: " in out and [line.split()[0] for line in out.splitlines() if " notes)" in line] == ["a", "bb"]
    assert main(["diagnose", *logs, "--json"]) == 0
    told = strict(capsys.readouterr().out)
    assert [log["name"] for log in told["logs"]] == ["a", "bb"]
    assert [c["verdict"] for c in told["comparisons"]] == ["cannot tell"]


def test_a_missing_log_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_log(tmp_path / "metrics.csv")
    fails([str(good), str(tmp_path / "metric.csv")], capsys, "no log", "metric.csv", "did you mean 'metrics.csv'?")


def test_files_that_are_no_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"")
    fails([str(path)], capsys, "is empty")
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    fails([str(path)], capsys, "no log that can be read", "looked for", "--loss-column")
    path.write_bytes(gzip.compress(b""))
    fails([str(path)], capsys, "x.log")
    path.write_text("time,host\n1,2\n2,3\n")
    fails([str(path)], capsys, "no loss", "--loss-column")


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = str(write_log(tmp_path / "a.csv"))
    fails([log, "--fail-on", "always"], capsys, "note", "warning", "critical", "--help")
    fails([log, "--tokens-per-step", "0"], capsys, "--tokens-per-step is 0")
    fails([log, "--loss-column", "los"], capsys, "'los'", "did you mean 'loss'?")
    fails([log, "--html", str(tmp_path / "a.csv" / "x.html")], capsys, "a.csv")
    fails([], capsys, "LOG")


def test_a_log_of_nothing_but_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = str(write_log(tmp_path / "a.csv", bad="nan", n=100))
    assert main(["diagnose", log, "--fail-on", "critical", "--html", str(tmp_path / "a.html")]) == 1
    out = capsys.readouterr().out
    assert "Diverged: the loss is not finite from step 1 on" in out and "NaN" in out
    assert main(["diagnose", log, "--json"]) == 0
    (event,) = strict(capsys.readouterr().out)["events"]
    assert (event["kind"], event["end"], event["recovery"]) == ("nonfinite", 100, "never")


def test_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "report.html"
    log = str(write_log(tmp_path / "a.csv", bad="spike"))
    assert main(["diagnose", log, "--html", str(page)]) == 0
    assert "report: " in capsys.readouterr().out
    assert "1 loss spike in 600 points" in page.read_text(encoding="utf-8")
    page.unlink()
    assert main(["diagnose", log, "--html", str(page), "--json"]) == 0
    assert strict(capsys.readouterr().out)["points"] == 600 and page.exists()


def test_tokens_lost_are_counted_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = str(write_log(tmp_path / "a.csv", bad="diverged"))
    assert main(["diagnose", log, "--json", "--tokens-per-step", "1000"]) == 0
    assert strict(capsys.readouterr().out)["lost_tokens"] == 200_000


RUN = [sys.executable, "-W", "error", "-m", "poise.cli", "diagnose"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_in_an_old_encoding(encoding: str, tmp_path: Path) -> None:
    log = write_log(tmp_path / "läufe.csv", bad="spike")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*RUN, str(log)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.decode(encoding).startswith("l?ufe" if encoding == "ascii" else "läufe")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    log = write_log(tmp_path / "a.csv", bad="spike")
    with subprocess.Popen([*RUN, str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert not running.stderr.read()
    assert running.returncode == 0


def test_starts_without_what_it_does_not_need(tmp_path: Path) -> None:
    """20,000 steps in a second of one core, without torch or plotly."""
    log = write_log(tmp_path / "a.csv", n=20_000, bad="spike")
    program = (
        "import sys, time, resource\nfrom poise.cli.main import main\nmain(['diagnose', sys.argv[1]])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'plotly', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "print(used.ru_utime + used.ru_stime, sorted(heavy), file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(log)], capture_output=True, text=True, encoding="utf-8", check=True
    )
    seconds, heavy = done.stderr.strip().split(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 3.0, f"{seconds} s of CPU, {time.perf_counter() - began:.1f} s in all"  # 0.7 s when idle
