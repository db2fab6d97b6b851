"""The restart ledger: does the run die at once, again and again, from the same checkpoint?

A checkpoint can be whole and finite and still lead to the same death within a few steps of every restart.
The ledger notes from which step an attempt resumed, how far it got and how it ended. After two attempts in
a row that died in the same way within a few steps of the same checkpoint, the next one is told to go one
checkpoint further back. If every checkpoint down to the oldest fails like that, the checkpoints are not
to blame, and the next attempt takes the newest again. An attempt that got further is healthy, however it
ended: being killed in the middle of training never costs more than the steps since the last save.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

KILLED: Final = "killed"
CLEAN: Final = "clean"
_KEPT: Final = 20
_LOG: Final = logging.getLogger("poise")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One process's try at a run.

    Attributes:
        start: the step it resumed from, 0 for a fresh start.
        reached: the last step it is known to have finished; not followed once it is healthy.
        healthy: it finished more than a few steps, or saved a checkpoint.
        end: ``clean``, the name of an error, or ``killed`` as long as nothing else is known.
    """

    start: int
    reached: int
    healthy: bool = False
    end: str = KILLED


class Attempts:
    """The ledger in one small file. A ledger that cannot be read or written is a warning, never an error."""

    def __init__(self, path: Path, grace: int = 5, deaths: int = 2) -> None:
        assert grace >= 1 and deaths >= 1
        self.path = path
        self.grace = grace
        self.deaths = deaths
        self._attempts = self._read()

    @property
    def start(self) -> int:
        """The step from which the present attempt resumed."""
        return self._attempts[-1].start if self._attempts else 0

    def begin(self, start: int) -> None:
        """Note that a process starts (or starts again) from the checkpoint of step ``start``."""
        self._attempts = [*self._read(), Attempt(start, start)][-_KEPT:]
        self._write(sync=True)

    def note_progress(self, step: int, saved: bool = False) -> bool:
        """Note a finished (or saved) step; return True once, when the attempt turns out healthy.

        Costs a small write in the first ``grace`` + 1 steps of an attempt and nothing after.
        """
        if not self._attempts or self._attempts[-1].healthy:
            return False
        healthy = saved or step > self._attempts[-1].start + self.grace
        self._attempts[-1] = replace(self._attempts[-1], reached=step, healthy=healthy)
        self._write()
        return healthy

    def end(self, how: str = CLEAN) -> None:
        """Note how the attempt ended: ``clean``, or the name of an error.

        A person who stops a run twice in a row says nothing about its checkpoint: that counts as clean.
        """
        if how in ("KeyboardInterrupt", "SystemExit"):
            how = CLEAN
        if self._attempts:
            self._attempts[-1] = replace(self._attempts[-1], end=how)
            self._write(sync=True)

    def limit(self, steps: Sequence[int]) -> int | None:
        """Return the newest step to resume from, or None for no limit.

        Args:
            steps: the committed checkpoints.
        """
        dead: list[Attempt] = []
        for attempt in reversed(self._read()):
            same = not dead or (attempt.start, attempt.end) == (dead[0].start, dead[0].end)
            if attempt.end == CLEAN or attempt.healthy or not same:
                break
            dead.append(attempt)
        if not dead:
            return None
        start = dead[0].start
        if len(dead) >= self.deaths:
            return start - 1 if any(step < start for step in steps) else None
        # A newer checkpoint beside an attempt that proved nothing: the walk back is under way, and
        # this checkpoint has a chance left.
        return start if start in steps and start != max(steps) else None

    def _read(self) -> list[Attempt]:
        try:
            return [Attempt(**entry) for entry in json.loads(self.path.read_text())["attempts"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            _LOG.warning("the restart ledger '%s' is unreadable and starts anew: %s", self.path.name, error)
            return []

    def _write(self, sync: bool = False) -> None:
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            with aside.open("w") as file:
                json.dump({"attempts": [asdict(attempt) for attempt in self._attempts]}, file)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            aside.replace(self.path)
        except OSError as error:
            _LOG.warning("the restart ledger was not written: %s", error.strerror or error)
            with contextlib.suppress(OSError):
                aside.unlink()
