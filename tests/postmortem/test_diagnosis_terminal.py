"""The diagnosis on a terminal: fits it, whatever its width and encoding, and nothing of the log steers it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from poise.postmortem import chart, terminal, wording
from poise.postmortem.diagnosis import Diagnosis, diagnose
from poise.postmortem.event import Advice, Cause, Cost, Event, Precursor
from poise.postmortem.log import Log, read_log

SHARED = Path(__file__).resolve().parents[3] / "shared"


def event(start: int = 1000, **more: object) -> Event:
    fields = {"kind": "fast_spike", "severity": "warning", "start": start, "peak": start + 5, "end": start + 30}
    fields |= {"baseline": 3.0, "value": 4.0, "points": 31, "recovery": "returned", "cost": Cost(31, 31_000, 0.01)}
    fields |= {
        "cause": Cause("too-high LR", "schedule", "likely", (f"seen at {start}", f"the rate was high at {start}")),
        "precursors": (Precursor("grad_norm", start - 3, 3, f"the gradient norm rose before {start}"),),
        "advice": Advice("lower_lr", f"Lower the rate before {start}.", "PaLM (arXiv 2204.02311): back 100 steps"),
    }
    return Event(**(fields | more))  # type: ignore[arg-type]


def diagnosis(*events: Event, name: str = "run", n: int = 3000, notes: tuple[str, ...] = ()) -> Diagnosis:
    steps = np.arange(1, n + 1)
    loss = (2.5 + 6.0 * np.exp(-steps / 250.0)) * np.exp(0.004 * np.random.default_rng(0).standard_normal(n))
    for e in events:
        if np.isfinite(e.value):
            loss[e.peak - 1] = e.value
    log = Log(Path(f"{name}.csv"), name, "table", {"loss": (steps, loss)}, notes)
    done = diagnose(log)
    return dataclasses.replace(done, events=events, health="events" if events else "healthy")


def shown(d: Diagnosis, width: int = 120, encoding: str = "utf-8", **more: object) -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)  # strict, as standard output is
    console = Console(file=file, width=width, highlight=False)
    terminal.show(d, console, **more)  # type: ignore[arg-type]
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("width", [120, 80, 40, 20])
def test_fits_the_width_and_one_screen(width: int) -> None:
    events = [event(500 + 100 * i, severity="critical" if i % 2 else "warning") for i in range(20)]
    notes = ("column 'lm loss' is taken as loss", "column 'gn' is taken as grad_norm", *map(str, range(9)))
    lines = shown(diagnosis(*events, notes=notes), width)
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert len(lines) <= 44
        assert sum("likely)" in line for line in lines) == terminal.MOST_EVENTS
        assert "and 12 smaller ones; --all shows them" in lines
        assert "and 7 more notes on the reading; --all shows them" in lines


def test_narrow_terminals_get_lines_instead_of_a_table() -> None:
    lines = shown(diagnosis(event()), 40)
    assert "1000-1030 fast spike" in lines and not any("likely cause" in line for line in lines)
    text = " ".join(line.strip() for line in lines)
    assert "peak 4.00 (+33 %); came back; cause: too-high LR (likely); cost: 31, 31k tokens; do: lower lr" in text


def test_says_why_and_what_to_do_in_short() -> None:
    worst, other, third = event(2000, severity="critical", recovery="never"), event(1000), event(1500, value=3.5)
    lines = shown(diagnosis(other, third, worst))
    why = [line for line in lines if line.startswith("Why")]
    assert why == ["Why, for the one at 2000:", "Why, for the one at 1000:"]  # the worst first, and no third
    todo = next(line for line in lines if line.startswith("  lower lr"))
    assert todo == "  lower lr (at 1000, 1500, 2000): Lower the rate before 2000. [PaLM (arXiv 2204.02311)]"
    everything = "\n".join(shown(diagnosis(other, third, worst), everything=True))
    assert "back 100 steps" in everything and "Why, for the one at 1500:" in everything


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "latin-1"])
def test_encodings_without_braille_get_a_plain_chart(encoding: str) -> None:
    lines = shown(diagnosis(event(), name="läufe\u2192"), 100, encoding)
    assert any(line.count("*") > 20 for line in lines) and any("^" in line for line in lines)
    if encoding == "ascii":
        assert lines[0].startswith("l?ufe?: table, 3,000 points")
    assert lines[0].startswith("läufe") == (encoding != "ascii")


def test_nothing_of_the_log_steers_the_terminal() -> None:
    bad = "\x1b]0;owned\x07\x1b[31m[bold]x[/nope]\r\nnext\u202e"
    evil = event(
        signal=f"max_logit {bad}",
        cause=Cause(bad, "unknown", "likely", (bad,)),
        advice=Advice("wait", bad, bad),
        precursors=(),
    )
    d = diagnosis(evil, name=bad, notes=(bad,))
    for width in (120, 40):
        text = "\n".join(shown(d, width, everything=True, extra=[bad]))
        assert "\x1b" not in text and "\x07" not in text and "\r" not in text and "\u202e" not in text
        assert "[bold]x[/nope]" in text.replace("\n", "").replace("    ", "")


def test_nothing_to_draw() -> None:
    steps, nan = np.arange(1, 101), np.full(100, np.nan)
    lines = shown(diagnose(Log(Path("a.csv"), "a", "table", {"loss": (steps, nan)})))
    assert lines[1].startswith("Diverged") and any(line.startswith("1-100  nonfinite  NaN") for line in lines)
    one = diagnose(Log(Path("a.csv"), "a", "table", {"loss": (steps[:1], np.array([2.0]))}))
    assert len(shown(one)) == 2


def test_several_logs_and_their_comparison() -> None:
    from poise.postmortem.compare import compare

    a, b = diagnosis(event(), name="[a]"), diagnosis(name="b")
    file = io.StringIO()
    console = Console(file=file, width=120, highlight=False)
    terminal.compared([a, b], console)
    terminal.verdict(compare(a.log, b.log, a.events, b.events), console)
    lines = file.getvalue().splitlines()
    assert lines[1].split()[:2] == ["[a]", "3,000"] and "1 (+0 notes)" in lines[1]
    assert lines[3].startswith("[a] and b: ") and lines[4].startswith("  ")


# -- chart and words -----------------------------------------------------------------------------------


def test_no_spike_is_lost_in_a_long_curve() -> None:
    steps, x = np.arange(100_000), np.zeros(100_000)
    x[77_777] = 1.0
    for draw in (chart.ascii_rows, chart.braille_rows):
        rows = draw(steps, x, 50, (0, 99_999))
        assert [i for i, c in enumerate(rows[0]) if c != " "] == [38], rows[0]
        assert rows[-1].count(" ") == 0 and {len(row) for row in rows} == {50}


def test_points_far_apart_are_joined_but_not_over_a_gap() -> None:
    steps = np.array([0, 10, 20, 80, 90, 100])
    (row,) = {row for row in chart.ascii_rows(steps, np.zeros(6), 101, (0, 100)) if row.strip()}
    assert row == "*" * 21 + " " * 59 + "*" * 21


def test_the_first_descent_does_not_take_the_height() -> None:
    steps = np.arange(1000)
    values = np.where(steps < 10, 20.0, 3.0)
    values[500] = 5.0
    assert chart.roof(steps, values, []) == 5.0
    assert chart.roof(steps, values, [(5, 7.0)]) == 7.0  # but what is an event there is seen
    assert chart.roof(steps, np.linspace(4.0, 3.0, 1000), []) == 4.0


def test_words() -> None:
    notes = ("column 'lm loss' is taken as loss", "cut off", "column 'gn' is taken as grad_norm")
    assert wording.note_texts(notes) == ["cut off", "columns: 'lm loss' is loss, 'gn' is grad_norm"]
    assert wording.peak_text(event(value=float("nan"))) == "NaN"
    assert wording.recovery_text(event(recovery="never", lasting=0.061)) == "no, +6.1 %"
    longer = event(cause=Cause("a", "data", "likely", ("up by 3", "up by 3, 2 steps before", "other")), precursors=())
    assert wording.evidence(longer) == ["up by 3, 2 steps before", "other"]
    two = wording.todos([event(10), event(20, severity="critical"), event(5, severity="note")])
    assert len(two) == 1 and two[0].advice.text == "Lower the rate before 20."
    assert [e.start for e in two[0].events] == [10, 20]


@pytest.mark.skipif(not (SHARED / "logs").is_dir(), reason="the real logs are not on this machine")
@pytest.mark.parametrize("name", ["llmc_stdout__gpt2_124m_all_nan.log", "megatron_stdout__bigscience_gpt2_n16.out"])
def test_real_logs_fit_a_screen(name: str) -> None:
    d = diagnose(read_log(SHARED / "logs" / name))
    for width in (80, 120):
        lines = shown(d, width)
        assert len(lines) <= 42 and max(map(len, lines)) <= width
