"""One writer at a time: a file as a claim on a folder."""

from __future__ import annotations

from typing import IO, Any


def claim(file: IO[Any]) -> bool:
    """Claim an open file for this process until it is closed; false if another process has it.

    The claim goes with the process, however that ends. Where the system or the file system knows no locks, every
    claim succeeds.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
