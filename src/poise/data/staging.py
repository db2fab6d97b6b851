"""Writing a folder of prepared data aside and renaming it into place: what is there is whole, or what was before."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from poise.core.errors import UserError
from poise.data.store import DROPPED, FILES, MANIFEST, first_line

_ABANDONED_AFTER: Final = 24 * 3600.0  # seconds after which another machine's unfinished folder is removed


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that takes its place when the block ends without an error.

    On any error, and on Ctrl-C, nothing is left behind and what was at ``out`` stays. What a killed process
    left is removed by the next call for the same ``out``.

    Raises:
        UserError: the place cannot be written to, or the disk is full.
    """
    aside = beside(out, "partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_abandoned(out)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        publish(aside, out)
    except OSError as error:
        raise cannot_write(out, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_foreign(out: Path) -> None:
    """Raise a ``UserError`` if ``out`` is something that preparing data must not replace."""
    try:
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        foreign = os.path.lexists(out) and not out.is_dir()
    except OSError as error:
        raise cannot_write(out, error) from None
    if foreign or not names <= {*FILES, MANIFEST, DROPPED}:
        what = "holds other files" if not foreign else "leads nowhere" if out.is_symlink() else "is a file"
        raise UserError(f"'{out}' {what}; prepared data needs a folder of its own, give --data.dir PATH")


def publish(aside: Path, out: Path) -> None:
    """Rename the folder ``aside`` to ``out``, replacing older prepared data there."""
    old = beside(out, "old")
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    if os.name == "posix":  # the renaming itself must survive a power cut
        handle = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def beside(out: Path, kind: Literal["partial", "old"]) -> Path:
    """Return this process' own place beside ``out``, which ``clear_abandoned`` knows."""
    return out.parent / f".{out.name}.{kind}-{socket.gethostname()}-{os.getpid()}"


def clear_abandoned(out: Path) -> None:
    """Remove what killed processes left beside ``out``; one killed between two renames has its old data put back."""
    for kind in ("partial", "old"):
        for path in out.parent.glob(f".{_escaped(out.name)}.{kind}-*-*"):
            host, _, pid = path.name.split(f".{kind}-", 1)[1].rpartition("-")
            here = host == socket.gethostname() and pid.isdigit() and os.name == "posix"
            old = time.time() - path.stat().st_mtime > _ABANDONED_AFTER
            if (not _alive(int(pid))) if here else old:
                if kind == "old" and not out.exists():
                    path.rename(out)
                    continue
                shutil.rmtree(path, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def cannot_write(out: Path, error: OSError, kept: Path | None = None) -> UserError:
    """Return what to tell about an error of writing; ``kept`` is a work folder from which a new call goes on."""
    again = goes_on(kept) if kept else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"the disk is full at '{out.parent}'; free some space or give --data.dir PATH{again}")
    if error.errno == errno.ENOMEM:
        return UserError(f"out of memory while preparing '{out}' ({error.strerror}); use fewer --processes{again}")
    reason = error.strerror or first_line(error)
    return UserError(f"cannot write prepared data to '{out}': {reason}; give --data.dir PATH or set POISE_CACHE{again}")


def goes_on(kept: Path) -> str:
    """Return what to tell about a work folder that stays."""
    return f"; what is done is in '{kept}', the same command goes on from there"
