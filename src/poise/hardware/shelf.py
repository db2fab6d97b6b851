"""The folder of checkpoints: names, what is committed, what is left over, what may go.

``step-00000120`` is a committed checkpoint: the name appears in one rename, after everything in it is on
the disk. Anything after the number is something else:

- ``.partial-PID``: being written, or what a dead process left; removed at the next start.
- ``.replaced-PID``: the former holder of the name, until its successor has it; put back if that failed.
- ``.abandoned``: newer than the point a run went back to; removed after the next save.
- ``.damaged``: refused at a load; kept for a look, the newest only.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Final

from poise.hardware import manifest

_COMMITTED: Final = re.compile(r"step-(\d{8,})")
_ANY: Final = re.compile(r"(step-(\d{8,}))\.(partial|replaced|abandoned|damaged)\b.*")
_LOG: Final = logging.getLogger("poise")


def folder_of(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies once it is committed."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """Return the steps of all committed checkpoints, ascending; empty where there is no folder."""
    try:
        names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _COMMITTED.fullmatch(name)))


def clean(root: Path) -> None:
    """Remove what a process that died while saving left behind, and finish a replacement it had begun.

    Raises:
        OSError: the disk refuses.
    """
    for name, committed, kind in _others(root):
        if kind == "partial":
            shutil.rmtree(root / name)
        elif kind == "replaced":
            if (root / committed).exists():
                shutil.rmtree(root / name)
            else:
                (root / name).replace(root / committed)
    sync_folder(root)


def commit(partial: Path, final: Path) -> None:
    """Give a complete folder its final name, in one step; a former holder of the name goes afterwards.

    Raises:
        OSError: the disk refuses; the former holder is in its place again.
    """
    sync_folder(partial)
    former = None
    if final.exists():
        former = final.with_name(f"{final.name}.replaced-{os.getpid()}")
        final.replace(former)
    try:
        partial.replace(final)
    except OSError:
        if former:
            former.replace(final)
        raise
    sync_folder(final.parent)
    if former:
        shutil.rmtree(former, ignore_errors=True)


def set_aside(folder: Path, why: str) -> Path | None:
    """Rename a committed checkpoint so that it is not tried again; None where the disk refuses."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}.{why}" + (f"-{number}" if number else ""))).exists():
        number += 1
    try:
        folder.replace(aside)
        sync_folder(folder.parent)
    except OSError as error:
        _LOG.warning("cannot set %s aside: %s", folder.name, error.strerror or error)
        return None
    return aside


def prune(root: Path, newest: int, keep_last: int, keep_best: int) -> None:
    """Of the steps up to ``newest``, keep the last ``keep_last`` and the ``keep_best`` of lowest metric.

    Removes earlier abandoned folders too, and all damaged ones but the newest. A folder that will not go
    is a warning: the next save tries again.
    """
    try:
        doomed = _doomed(root, newest, keep_last, keep_best)
    except OSError as error:
        _LOG.warning("cannot look for old checkpoints: %s", error.strerror or error)
        return
    for folder in doomed:
        try:
            if _COMMITTED.fullmatch(folder.name):  # half removed, it must not look like a damaged checkpoint
                aside = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
                folder = folder.replace(aside)
            shutil.rmtree(folder)
        except OSError as error:
            _LOG.warning("cannot remove the old checkpoint %s: %s", folder.name, error.strerror or error)


def _doomed(root: Path, newest: int, keep_last: int, keep_best: int) -> list[Path]:
    present = [step for step in steps(root) if step <= newest]
    keep = set(present[-keep_last:])
    if keep_best:
        measured = [(metric, -step) for step in present if (metric := _metric(folder_of(root, step))) is not None]
        keep |= {-negative for _, negative in sorted(measured)[:keep_best]}
    doomed = [folder_of(root, step) for step in present if step not in keep]
    doomed += [root / name for name, _, kind in _others(root) if kind == "abandoned"]
    doomed += [root / name for name, _, kind in _others(root) if kind == "damaged"][:-1]
    return doomed


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _others(root: Path) -> list[tuple[str, str, str]]:
    """Return (name, name it would have as a committed checkpoint, kind) of all other folders, by step."""
    found = [match for entry in os.scandir(root) if (match := _ANY.fullmatch(entry.name))]
    return [(m[0], m[1], m[3]) for m in sorted(found, key=lambda m: (int(m[2]), m[0]))]


def _metric(folder: Path) -> float | None:
    try:
        metric = manifest.read(folder).metric
    except (manifest.Damaged, OSError, ValueError):  # ValueError: UserError of a newer format
        return None
    return metric if metric is not None and math.isfinite(metric) else None
