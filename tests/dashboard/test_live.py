"""The terminal: plain lines carry no escape codes, a live line fits its width, nothing stops a run."""

from __future__ import annotations

import io
import re
import sys

import pytest

from poise.dashboard.live import Bar, Display, _Face


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(display: Display, step: int, **more: object) -> None:
    display.update(step, 4.5, 4.6, 0.83, 3e-4, 12_345.0, 90.0, **{"guard_state": "watching"} | more)


def test_plain_lines_have_no_escape_codes_and_come_every_ten_seconds():
    out, clock = io.StringIO(), Clock()
    with Display(100, out, clock=clock) as display:
        for step in range(1, 51):
            shown(display, step)
            clock.now += 1.0
        display.note("guard: skip")
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        f"{s}/100" for s in (1, 11, 21, 31, 41, 50)
    ]
    assert lines[0] == (
        "step 1/100  loss 4.500  smoothed 4.600  grad norm 0.83  lr 3.00e-04  tokens/s 12.3k"
        "  guard watching  2 min left".replace("2 min", "1 min 30 s")
    )
    assert "guard: skip" in lines


def test_plain_lines_every_so_many_steps_and_at_the_end():
    out = io.StringIO()
    with Display(10, out, tty=False, every_steps=4, clock=Clock()) as display:
        for step in range(1, 11):
            shown(display, step)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/10", "4/10", "8/10", "10/10"]


def test_nonfinite_and_missing_readings_are_shown():
    out = io.StringIO()
    with Display(10, out) as display:
        display.update(1, loss=float("nan"), smooth=None, lr=0.0, eta_s=float("nan"))
    assert out.getvalue() == "step 1/10  loss NaN  lr 0.00e+00\n"


@pytest.mark.parametrize("width", [12, 30, 40, 60, 100, 200])
def test_live_lines_fit_the_width(width):
    from rich.console import Console

    face = _Face(
        lambda: ("step", 0.5, "123,456/250,000", "3 d 4 h left"),
        lambda: [
            ("loss", "4.500"),
            ("smoothed", "4.600"),
            ("tokens/s", "12.3k"),
            ("guard", "learning 12/20"),
        ],
    )
    out = io.StringIO()
    Console(file=out, width=width, height=20, force_terminal=False).print(face)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines), lines
    assert "loss 4.500" in out.getvalue() and len(lines) <= 5
    assert ("guard learning 12/20" in out.getvalue()) == (width >= 30)
    assert ("━" in out.getvalue()) == (width >= 60)


def test_live_display_draws_and_gives_the_cursor_back():
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Display(100, out, tty=True) as display:
        shown(display, 40)
        display.note("event [bold] line")
        raise KeyboardInterrupt
    text = out.getvalue()
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "event [bold] line" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "40/100" in text
    display.close()
    assert out.getvalue() == text


def test_bar_in_a_pipe():
    out, clock = io.StringIO(), Clock()
    bar = Bar("tokenize", 30_000_000, out, clock=clock)
    clock.now += 11
    bar.update(11_000_000)
    clock.now += 1
    bar.update(12_000_000)
    clock.now += 18
    bar.update(30_000_000)
    bar.close()
    bar.close()
    assert out.getvalue().splitlines() == [
        "tokenize: 30.0 MB ...",
        "tokenize:  37%  11.0/30.0 MB  1.0 MB/s  19 s left",
        "tokenize:  100%  30.0/30.0 MB  1.0 MB/s  0.0 s left",
        "tokenize: 30.0 MB in 30 s, 1.0 MB/s",
    ]


def test_bar_without_a_total_and_with_another_unit():
    out, clock = io.StringIO(), Clock()
    with Bar("scan", None, out, unit="documents", clock=clock) as bar:
        clock.now += 20
        bar.update(5000)
    assert out.getvalue().splitlines() == [
        "scan ...",
        "scan:  5k documents  250 documents/s",
        "scan: 5k documents in 20 s, 250 documents/s",
    ]


def test_live_bar_leaves_one_plain_line():
    out = io.StringIO()
    with Bar("tokenize", 1000, out, tty=True) as bar:
        bar.update(500)
    assert out.getvalue().splitlines()[-1].startswith("tokenize:") or "tokenize: 0.0 MB" in out.getvalue()


def test_a_closed_stream_does_not_end_a_run():
    out = io.StringIO()
    display = Display(10, out)
    out.close()
    shown(display, 1)
    display.note("text")
    display.close()


def test_an_ascii_stream_gets_every_line():
    raw = io.BytesIO()
    with Display(10, io.TextIOWrapper(raw, encoding="ascii")) as display:
        display.note("loss 9 → 3")
        shown(display, 1)
        assert raw.getvalue().startswith(b"loss 9 ? 3\nstep 1/10")


def test_without_rich_lines_are_plain(monkeypatch):
    for name in [n for n in sys.modules if n == "rich" or n.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    out = io.StringIO()
    with Display(10, out, tty=True) as display:
        shown(display, 1)
    assert out.getvalue().startswith("step 1/10  loss 4.500") and "\x1b" not in out.getvalue()
