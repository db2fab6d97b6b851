"""Given a folder: which file in it is the log, or which files are it together.

One folder may hold several accounts of one run (the Hugging Face Trainer leaves ``trainer_state.json`` and event
files). The first in the order of ``_KINDS`` is taken. Several runs are never chosen among: that is an error that names
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from poise.core.errors import UserError

LOOKED_FOR = (
    "journal.jsonl, run-*.wandb, trainer_state.json, trainer_log.jsonl, checkpoint-*, metrics.csv, "
    "event files of TensorBoard"
)

CONTAINERS = ("wandb", "runs", "lightning_logs", "logs", "tensorboard", "tb")
"""Folders that trainers make for the logs of a run; looked into when what is above them holds none."""

TEXT_LOGS = (".log", ".out", ".jsonl", ".csv", ".tsv")
"""Ends of names that are taken for a log when there is nothing better, and only one."""

SHOWN = 4
NO_EVENTS = 200
"""Bytes of an event file that holds no event but its version."""

HEAD = 4096
"""Bytes of a ``trainer_state.json`` in which its step stands."""

_STEP = re.compile(rb'"global_step"\s{0,9}:\s{0,9}(\d{1,15})')
_EVENTS = re.compile(r"tfevents\.(\d{1,18})")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_WANDB = re.compile(r"run-([^.]+)\.wandb")
_PACKED = re.compile(r"\.(?:gz|bz2|xz)$")
_TRAIN, _HELD_OUT = frozenset({"train", "training"}), frozenset({"val", "valid", "validation", "eval", "test"})


def members(folder: Path) -> list[Path]:
    """Return the log in a folder: its file, or the files that make up one run, in the order of time.

    Known are: a run of poise; a W&B run's folder, or the ``wandb`` folder with its ``latest-run`` (all parts of a
    resumed run); the Hugging Face Trainer's output or checkpoint folder; LLaMA-Factory's; a Lightning version
    folder; event files of TensorBoard, there or one level below.

    Raises:
        UserError: there is no log, or there are several runs.
    """
    try:
        found = _here(folder) or _below(folder) or _contained(folder) or _versions(folder) or _text(folder)
    except OSError as error:
        raise UserError(f"folder '{folder}' cannot be read ({error.strerror}); name a log file") from None
    if not found:
        raise UserError(f"folder '{folder}' has no log in it; looked for: {LOOKED_FOR}. Name a log file")
    return found


def _here(folder: Path) -> list[Path]:
    """Return the log that lies in the folder itself."""
    for kind in _KINDS:
        found = kind(folder)
        if found:
            return found
    return []


def _below(folder: Path) -> list[Path]:
    """Return the log of the one subfolder that has any."""
    found = {sub: files for sub in _folders(folder) if sub.name not in CONTAINERS and (files := _here(sub))}
    if scalars := _added_scalars(found):
        return scalars
    names = {sub.name.lower(): sub for sub in found}
    if len(found) > 1 and len(names.keys() & _TRAIN) == 1 and names.keys() <= _TRAIN | _HELD_OUT:  # as Keras parts them
        return found[names[(names.keys() & _TRAIN).pop()]]
    return _only(folder, found, "runs")


def _added_scalars(found: dict[Path, list[Path]]) -> list[Path]:
    """Return the training loss of TensorBoard's ``add_scalars``, which makes a folder ``TAG_NAME`` for each curve."""
    parts = {sub: sub.name.lower().rpartition("_")[::2] for sub in found}
    if len(found) < 2 or any(name not in _TRAIN | _HELD_OUT for _, name in parts.values()):
        return []
    losses = [sub for sub, (tag, name) in parts.items() if name in _TRAIN and "loss" in tag]
    return found[losses[0]] if len(losses) == 1 else []


def _versions(folder: Path) -> list[Path]:
    """Return the log of a Lightning logger's folder: ``NAME/version_0``."""
    found = {
        f"{sub.name}/{version.name}": files
        for sub in _folders(folder)
        for version in _folders(sub)
        if version.name.startswith("version_") and (files := _here(version))
    }
    return _only(folder, found, "runs")


def _contained(folder: Path) -> list[Path]:
    for name in CONTAINERS:
        inner = folder / name
        if inner.is_dir():
            found = _here(inner) or _below(inner)
            if found:
                return found
    return []


def _text(folder: Path) -> list[Path]:
    files = [file for file in _files(folder) if _PACKED.sub("", file.name).endswith(TEXT_LOGS)]
    return _only(folder, {file: [file] for file in files}, "logs")


def _journal(folder: Path) -> list[Path]:
    file = folder / "journal.jsonl"
    return [file] if file.is_file() else []


def _wandb_run(folder: Path) -> list[Path]:
    """Return the file of a W&B run's folder."""
    return _only(folder, {file: [file] for file in _files(folder) if _WANDB.fullmatch(file.name)}, "W&B runs")


def _wandb_folder(folder: Path) -> list[Path]:
    """Return all parts of the latest run in a ``wandb`` folder: each start of a resumed run has made one."""
    latest = _wandb_files(folder / "latest-run")
    runs: dict[str, list[Path]] = {}
    for sub in sorted(_folders(folder), key=lambda sub: sub.name.removeprefix("offline-")):
        if sub.name != "latest-run" and sub.name.startswith(("run-", "offline-run-")):
            for file in _wandb_files(sub):
                runs.setdefault(file.name, []).append(file)
    if latest:
        return runs.get(latest[0].name) or latest
    return _only(folder, runs, "W&B runs")


def _wandb_files(folder: Path) -> list[Path]:
    return [file for file in _files(folder) if _WANDB.fullmatch(file.name)] if folder.is_dir() else []


def _hugging_face(folder: Path) -> list[Path]:
    """Return the ``trainer_state.json`` that goes furthest, of the folder itself or its checkpoints.

    LLaMA-Factory's log goes before a checkpoint's, because it is written at every step.
    """
    states = []
    own = folder / "trainer_state.json"
    if own.is_file():
        states.append((_step(own), 1, own))
    log = folder / "trainer_log.jsonl"
    if log.is_file() and not states:
        return [log]
    for sub in _folders(folder):
        number = _CHECKPOINT.fullmatch(sub.name)
        state = sub / "trainer_state.json"
        if number and state.is_file():
            states.append((int(number.group(1)), 0, state))
    return [max(states, key=lambda state: state[:2])[2]] if states else []


def _step(state: Path) -> int:
    with state.open("rb") as file:
        found = _STEP.search(file.read(HEAD))
    return int(found.group(1)) if found else 0


def _lightning(folder: Path) -> list[Path]:
    file = folder / "metrics.csv"
    return [file] if file.is_file() else []


def _events(folder: Path) -> list[Path]:
    """Return all event files: TensorBoard too takes those of one folder for one run."""
    found = []
    for file in _files(folder):
        stamp = _EVENTS.search(file.name)
        if stamp and not _PACKED.sub("", file.name).endswith(".profile-empty"):
            found.append((int(stamp.group(1)), _natural(file.name), file))
    files = [file for *_, file in sorted(found)]
    if sum(file.stat().st_size for file in files) <= NO_EVENTS and len(_folders(folder)) > 1:
        return _added_scalars({sub: own for sub in _folders(folder) if (own := _events(sub))}) or files
    return files


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which ``x.10`` comes after ``x.9``."""
    return [
        (int(part), "") if part.isascii() and part.isdigit() else (-1, part)
        for part in re.split(r"([0-9]{1,18})", name)
    ]


_KINDS: Sequence[Callable[[Path], list[Path]]] = (
    _journal,
    _wandb_run,
    _wandb_folder,
    _hugging_face,
    _lightning,
    _events,
)


def _only(folder: Path, found: dict[Path, list[Path]] | dict[str, list[Path]], what: str) -> list[Path]:
    """Return the only log there is; an empty list when there is none."""
    if len(found) > 1:
        names = [f"'{key.name if isinstance(key, Path) else key}'" for key in found]
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise UserError(f"folder '{folder}' has {len(names)} {what}: {shown}; name one of them")
    return next(iter(found.values()), [])


def _folders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir())


def _files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())
