"""The work folder of a preparation: what is done so far, kept until the result is in its place.

``.<name>.work`` beside the result holds one file a block and stage, each written aside, renamed and described by a
small JSON file with its checksum. So an interruption at any point, also a power cut, loses at most the blocks that
were being worked on; the next call for the same input goes on from there. One process at a time works in it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from poise.core.errors import UserError
from poise.core.lock import claim
from poise.data import staging

Meta = dict[str, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

_LOCK: Final = "lock"
_KEY: Final = "key"
_AHEAD: Final = 2  # blocks given out per process beyond the one it works on


def folder_of(out: Path) -> Path:
    """Return the work folder of a result at ``out``."""
    return out.parent / f".{out.name}.work"


class UnfinishedError(UserError):
    """An error that may be over at the next call (a network, a permission): the work folder stays."""


@contextmanager
def opened(out: Path, key: str, *, keep: bool = False) -> Iterator[Path]:
    """Yield the work folder for ``out``; on success remove it, after an interruption or with ``keep`` leave it.

    What another input or other settings left there is removed first. It is also removed when the input turns out to
    be unusable (a ``UserError``): going on with it would not help, unless it is an ``UnfinishedError``.

    Raises:
        UserError: another process works there, the place cannot be written to, or the disk is full.
    """
    folder = folder_of(out)
    try:
        with _claimed(out):
            try:
                staging.clear_abandoned(out)
                _begin(folder, key)
                yield folder
            except UnfinishedError:
                raise
            except UserError:
                _remove(out)
                raise
            if not keep:
                _remove(out)
    except OSError as error:
        raise staging.cannot_write(out, error, kept=folder if folder.exists() else None) from None


def clear(out: Path, key: str) -> None:
    """Remove the work folder for ``key``, left by a process that was killed when its result was in place already."""
    if _is_for(folder_of(out), key):
        with suppress(UserError), opened(out, key):
            pass


def _claimed(out: Path) -> IO[str]:
    """Return the claim on the work folder for ``out``, which is made where it is missing."""
    folder = folder_of(out)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / _LOCK).open("a", encoding="utf-8")
        except FileNotFoundError:  # another process has finished and removed the folder just now
            continue
        if not claim(lock):
            lock.close()
            raise UserError(f"another process is preparing '{out}'; wait for it, or give another folder")
        if os.fstat(lock.fileno()).st_nlink:  # else, the same a moment later
            return lock
        lock.close()


def _is_for(folder: Path, key: str) -> bool:
    try:
        return (folder / _KEY).read_text(encoding="utf-8") == key
    except (OSError, ValueError):
        return False


def _begin(folder: Path, key: str) -> None:
    if not _is_for(folder, key):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
        (folder / _KEY).write_text(key, encoding="utf-8")


def _remove(out: Path) -> None:
    """Remove the work folder at one stroke: from then on another process may make a new one."""
    gone = staging.beside(out, "partial")
    try:
        folder_of(out).rename(gone)
    except OSError:  # a system that renames no folder with an open file
        gone = folder_of(out)
    shutil.rmtree(gone, ignore_errors=True)


def commit(path: Path, meta: Meta, write: Callable[[Path], object]) -> Meta:
    """Let ``write`` make the file ``path`` and describe it; return the description, ``size`` added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.new")
    write(aside)
    meta = {**meta, "size": aside.stat().st_size}
    crc = _crc(aside, meta)
    aside.replace(path)
    described = _description(path).with_name(f"{path.name}.json.new")
    described.write_text(json.dumps(meta | {"crc": crc}), encoding="utf-8")
    described.replace(_description(path))
    return meta


def committed(path: Path) -> Meta | None:
    """Return the description of a file that is whole, else ``None``."""
    try:
        meta: Meta = json.loads(_description(path).read_bytes())
        crc = meta.pop("crc")
        whole = path.stat().st_size == meta["size"] and _crc(path, meta) == crc
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if whole else None


def _description(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _crc(path: Path, meta: Meta) -> int:
    """Return the checksum of a file and of its description."""
    crc = zlib.crc32(json.dumps(meta).encode())
    with path.open("rb") as file:
        while part := file.read(2**22):
            crc = zlib.crc32(part, crc)
    return crc


def hashed(value: object) -> str:
    """Return a 128-bit hash of a value made of plain parts, in hexadecimal."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def spread(work: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """Yield ``work(item)`` for every item in order, in this process or in several.

    Only a few items per process are ahead of what has been yielded, so memory stays bounded.

    Raises:
        UserError: a process died, most likely for want of memory.
    """
    if processes <= 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker, initargs=(work,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_do, item))
                while len(waiting) > _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise OSError(errno.ENOMEM, "a worker process died, perhaps for want of memory") from None
        finally:
            for future in waiting:
                future.cancel()


_job: list[Callable[[Any], Any]] = []  # in a worker process: what it does, sent once and not with every item


def _do(item: Any) -> Any:
    return _job[0](item)


def _begin_worker(work: Callable[[Any], Any]) -> None:
    """Each worker process has one core, leaves Ctrl-C to the first process, and ends when that does."""
    _job[:] = [work]
    # The libraries' own threads would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (first := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(first.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
