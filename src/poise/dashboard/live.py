"""Progress in the terminal: a live line on a terminal, plain lines in a pipe or a log file.

Nothing here can stop a run: without ``rich`` (an extra) the lines are plain, and a closed pipe or a dead
terminal is ignored.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TextIO

from poise.dashboard.text import count, duration, is_number, number

PLAIN_SECONDS: Final = 10.0
"""Time between two plain lines."""

_STATE_STYLES: Final = {"watching": "green", "learning": "cyan", "off": "dim"}


class _Output:
    """Where lines go: a rich live region on a terminal, or a plain stream.

    Args:
        out: the stream; None is standard error.
        tty: whether to draw live; None asks the stream.
        face: an object rich can draw, read again at every refresh.
    """

    def __init__(self, out: TextIO | None, tty: bool | None, face: Any) -> None:
        self._out = sys.stderr if out is None else out
        self._live = self._start_live(face) if self._wants_live(tty) else None
        if self._live is not None:
            atexit.register(self.close)  # a cursor hidden by a dying program stays hidden

    @property
    def live(self) -> bool:
        """Whether a live region is on the screen."""
        return self._live is not None

    def print(self, text: str) -> None:
        """Write a line; on a terminal it stays above the live region."""
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(text))
            return
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not end a run
            self._out.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            self._out.flush()

    def clear(self) -> None:
        """Take the live region off the screen; what is printed from now on is plain."""
        if self._live is not None:
            self._live.transient = True
            self.close()

    def close(self) -> None:
        """Draw the last state and give the terminal back; may be called twice."""
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self.close)
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def _wants_live(self, tty: bool | None) -> bool:
        if tty is not None:
            return tty
        try:
            return self._out.isatty() and os.environ.get("TERM") != "dumb"
        except (AttributeError, ValueError):
            return False

    def _start_live(self, face: Any) -> Any:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:
            return None
        live = Live(
            face,
            console=Console(file=self._out, force_terminal=True),
            refresh_per_second=8,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file must still go there
            redirect_stderr=sys.stderr.isatty(),
        )
        live.start()
        return live


@dataclass(frozen=True, slots=True)
class _Reading:
    step: int = 0
    loss: float | None = None
    smooth: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    guard_state: str = ""

    def cells(self) -> list[tuple[str, str]]:
        """Return (name, value) of what is known."""
        pairs = [
            ("loss", number(self.loss, 3)),
            ("smoothed", number(self.smooth, 3)),
            ("grad norm", number(self.grad_norm)),
            ("lr", f"{self.lr:.2e}" if is_number(self.lr) else number(self.lr)),
            ("tokens/s", count(self.tokens_per_s)),
            ("guard", self.guard_state),
        ]
        known = zip(pairs, (self.loss, self.smooth, self.grad_norm, self.lr, self.tokens_per_s, True), strict=True)
        return [pair for pair, value in known if value is not None and pair[1]]


class Display:
    """Progress of training.

    Args:
        total_steps: steps of the whole run.
        out: where to write; None is standard error.
        tty: True draws a live line, False writes plain lines, None asks the stream.
        every_steps: in plain mode, a line every so many steps instead of every ``PLAIN_SECONDS``.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        out: TextIO | None = None,
        tty: bool | None = None,
        every_steps: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._every = every_steps
        self._clock = clock
        self._last_line = 0.0
        self._printed = -1
        self._closed = False
        self._now = _Reading()
        self._output = _Output(out, tty, _Face(self._bar_parts, lambda: self._now.cells()))

    def update(
        self,
        step: int,
        loss: float | None = None,
        smooth: float | None = None,
        grad_norm: float | None = None,
        lr: float | None = None,
        tokens_per_s: float | None = None,
        eta_s: float | None = None,
        guard_state: str = "",
    ) -> None:
        """Show a step. Cheap: on a terminal drawing happens in a thread of its own, eight times a second.

        Args:
            step: 1-based step just done.
            loss: its training loss, nats.
            smooth: smoothed loss, nats.
            grad_norm: norm of the gradient before clipping.
            lr: learning rate.
            tokens_per_s: tokens a second.
            eta_s: seconds left.
            guard_state: what the guard is doing, in a few words, e.g. ``watching``, ``learning 12/20``.
        """
        self._now = _Reading(step, loss, smooth, grad_norm, lr, tokens_per_s, eta_s, guard_state)
        if not self._output.live and self._is_due(step):
            self._print_line()

    def note(self, text: str) -> None:
        """Write a line that stays, e.g. an event."""
        self._output.print(text)

    def close(self) -> None:
        """Leave the last state on the screen; may be called twice."""
        if self._closed:
            return
        self._closed = True
        if not self._output.live and self._now.step > 0 and self._printed != self._now.step:
            self._print_line()
        self._output.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_due(self, step: int) -> bool:
        if self._printed < 0 or step == self._total:
            return True
        if self._every is not None:
            return step % self._every == 0
        return self._clock() - self._last_line >= PLAIN_SECONDS

    def _print_line(self) -> None:
        self._last_line, self._printed = self._clock(), self._now.step
        cells = [f"{name} {value}" for name, value in self._now.cells()]
        if left := self._left():
            cells.append(left)
        self._output.print("  ".join([f"step {self._now.step:,}/{self._total:,}", *cells]))

    def _bar_parts(self) -> tuple[str, float | None, str, str]:
        share = self._now.step / self._total if self._total > 0 else None
        return "step", share, f"{self._now.step:,}/{self._total:,}", self._left()

    def _left(self) -> str:
        eta_s = self._now.eta_s
        return f"{duration(eta_s)} left" if eta_s is not None and math.isfinite(eta_s) and eta_s > 0 else ""


class Bar:
    """Progress of one stage of data preparation: what is done, a rate and a time left.

    Args:
        stage: what is being done, e.g. ``tokenize``.
        total: how much there is; None if nobody knows.
        out: where to write; None is standard error.
        tty: True draws a live bar, False writes plain lines, None asks the stream.
        unit: ``B`` counts bytes and shows MB/s; any other noun, e.g. ``documents``, counts those.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stage: str,
        total: float | None = None,
        out: TextIO | None = None,
        tty: bool | None = None,
        unit: str = "B",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage = stage
        self._total = total
        self._unit = unit
        self._clock = clock
        self._done: float = 0
        self._closed = False
        self._began = self._last_line = clock()
        self._output = _Output(out, tty, _Face(self._bar_parts, list))
        if not self._output.live:
            self._output.print(f"{stage} ..." if not total else f"{stage}: {self._amount(total)} ...")

    def update(self, done: float, total: float | None = None) -> None:
        """Show that ``done`` is behind us; ``total`` replaces the total given before."""
        self._done = done
        self._total = self._total if total is None else total
        if not self._output.live and self._clock() - self._last_line >= PLAIN_SECONDS:
            self._last_line = self._clock()
            _, share, amount, tail = self._bar_parts()
            percent = [] if share is None else [f"{share:.0%}"]
            self._output.print("  ".join([f"{self._stage}:", *percent, amount, tail]).rstrip())

    def note(self, text: str) -> None:
        """Write a line that stays."""
        self._output.print(text)

    def close(self) -> None:
        """Leave one line that says how much was done and how fast; may be called twice."""
        if self._closed:
            return
        self._closed = True
        amount = f"{self._amount(self._done)} in " if self._done else ""
        seconds = duration(self._clock() - self._began)
        self._output.clear()
        self._output.print(f"{self._stage}: {amount}{seconds}{self._rate(', ')}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _amount(self, value: float) -> str:
        if self._unit != "B":
            return f"{count(value)} {self._unit}"
        return f"{value / 1e6:.1f} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"

    def _rate(self, before: str = "") -> str:
        seconds = self._clock() - self._began
        if seconds < 0.2 or self._done <= 0:
            return ""
        rate = self._done / seconds
        return before + (f"{rate / 1e6:.1f} MB/s" if self._unit == "B" else f"{count(rate)} {self._unit}/s")

    def _bar_parts(self) -> tuple[str, float | None, str, str]:
        share = min(1.0, self._done / self._total) if self._total else None
        amount = self._amount(self._done)
        if self._total:
            whole = self._amount(self._total)
            short = amount.split()[0] if amount.split()[-1] == whole.split()[-1] else amount
            amount = f"{short}/{whole}"
        seconds = self._clock() - self._began
        left = ""
        if self._total and self._done > 0 and seconds > 1:
            left = f"{duration(seconds * max(0.0, self._total - self._done) / self._done)} left"
        return self._stage, share, amount, "  ".join(part for part in (self._rate(), left) if part)


class _Face:
    """What rich draws: a bar line, and cells of text packed into as many lines as the width asks for."""

    def __init__(
        self,
        bar: Callable[[], tuple[str, float | None, str, str]],
        cells: Callable[[], list[tuple[str, str]]],
    ) -> None:
        self._bar = bar
        self._cells = cells

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        name, share, amount, tail = self._bar()
        if not name:
            return
        percent = "" if share is None else f" {share:4.0%}"
        head = f"{name} "
        end = f" {amount}{percent}" + (f"  {tail}" if tail else "")
        width = min(40, options.max_width - len(head) - len(end))
        line = Text(head)
        if share is not None and width >= 8:
            filled = round(share * width)
            block, rest = ("━", "━") if options.encoding.startswith("utf") else ("#", "-")
            line.append(block * filled, style="cyan").append(rest * (width - filled), style="bright_black")
        line.append(end)
        line.truncate(options.max_width)
        yield line
        yield from self._packed(options.max_width)

    def _packed(self, width: int) -> Iterator[Any]:
        from rich.text import Text

        line = Text()
        for name, value in self._cells():
            style = _STATE_STYLES.get(value.split(" ")[0], "yellow") if name == "guard" else "bold"
            cell = Text(f"{name} ", style="dim").append(value, style=style)
            cell.truncate(width)
            if line and len(line) + 3 + len(cell) > width:
                yield line
                line = Text()
            line.append_text(Text("   " if line else "").append_text(cell))
        if line:
            yield line
