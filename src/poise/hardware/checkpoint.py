"""Verified checkpoints: a checkpoint is whole, undamaged and finite, or it is not one.

Tensors are written by ``torch.distributed.checkpoint`` (any number of processes, sharded or not; a
checkpoint saved by two loads in one), which on its own loads flipped bits without a word. So: nothing
non-finite is written; files are written aside, forced to the disk, read back and hashed; a manifest with
sizes and hashes completes them; one rename commits. At a load every byte is checked before the first
tensor changes, and what is damaged is set aside in favour of the checkpoint before it.

All ranks call every method together, unless it says otherwise; they go on together or raise together.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from poise.core.errors import UserError
from poise.hardware import distributed, files, manifest, shelf
from poise.hardware.attempts import CLEAN, Attempts
from poise.hardware.manifest import Manifest
from poise.hardware.state import (
    SEPARATOR,
    first_mismatch,
    flatten,
    non_finite,
    optimizer_mismatch,
    optimizer_targets,
    unflatten,
    unpack,
)

T = TypeVar("T")
_LOG: Final = logging.getLogger("poise")


class NonFiniteState(UserError):  # noqa: N818 - says what was found
    """The state holds a NaN or an infinity; nothing was written. ``names`` has all such tensors."""

    def __init__(self, step: int, names: list[str]) -> None:
        self.names = names
        shown = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
        super().__init__(
            f"the state after step {step} is not saved: {len(names)} tensors are not finite ({shown}); "
            "roll back to the last checkpoint"
        )


class SaveFailed(UserError):  # noqa: N818 - says what happened
    """The disk refused a checkpoint; earlier ones are untouched and training can go on."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint: where it is, its size without the manifest, and how long it took."""

    step: int
    path: Path
    bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Bytes written, hashed and committed per second."""
        return self.bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came back.

    Attributes:
        step: the step after which it was saved.
        meta: as given to ``save`` (tuples are lists now).
        state: the nested state as given to ``save``, limited to the sections that were loaded; its
            tensors are the ones that were loaded into.
        rejected: one line for each newer checkpoint that was refused.
    """

    step: int
    meta: dict[str, Any]
    state: dict[str, Any]
    rejected: list[str]


class CheckpointStore:
    """A folder of verified checkpoints of one run.

    Args:
        folder: made if it is missing; a shared file system where processes run on several machines.
        keep_last: how many of the newest to keep.
        keep_best: how many of those with the lowest metric to keep as well.
        read_only: only look: nothing is made, cleaned up or set aside. For everybody but the trainer.

    Raises:
        SaveFailed: the folder cannot be made or cleaned up.
        UserError: ``keep_last`` below 1 or ``keep_best`` below 0.
    """

    def __init__(self, folder: Path, keep_last: int = 3, keep_best: int = 1, read_only: bool = False) -> None:
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}, but must be at least 1: the newest is never removed")
        if keep_best < 0:
            raise UserError(f"keep_best is {keep_best}, but must be 0 or more")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.read_only = read_only
        self._attempts = Attempts(self.folder / "attempts.json")
        if not read_only:
            self._together(self._open, "the checkpoint folder cannot be used")

    def _open(self) -> None:
        if distributed.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shelf.clean(self.folder)

    # What there is.

    def steps(self) -> list[int]:
        """Return the committed steps, ascending. Any rank, at any time."""
        return shelf.steps(self.folder)

    def latest(self, at_most: int | None = None) -> int | None:
        """Return the newest committed step (not above ``at_most``), or None. Any rank, at any time."""
        return max((s for s in self.steps() if at_most is None or s <= at_most), default=None)

    # Save.

    def save(self, step: int, tensors: dict[str, Any], meta: dict[str, Any], metric: float | None = None) -> Saved:
        """Commit a checkpoint, then remove those that need not be kept.

        Saving ends the history at ``step``: newer checkpoints are from before a rollback and are set
        aside. A checkpoint of the same step is replaced.

        Args:
            step: the last finished step.
            tensors: nested state of tensors and plain values, see ``state.pack``.
            meta: JSON values: guard state, data position, hash of the recipe, ...; rank 0's counts.
            metric: lower is better.

        Raises:
            NonFiniteState: a tensor holds a NaN or an infinity; nothing was written.
            SaveFailed: the disk refused; no trace is left and earlier checkpoints are untouched.
            TypeError: ``tensors`` or ``meta`` holds what a checkpoint cannot hold.
        """
        assert not self.read_only, "a read-only store saves nothing"
        assert step >= 0
        started = time.perf_counter()
        flat, node = flatten(tensors)
        manifest.check_meta(meta)
        self._refuse_non_finite(step, flat)
        trouble = f"step {step} was not saved in '{self.folder}', earlier checkpoints are untouched"
        final = shelf.folder_of(self.folder, step)
        partial = final.with_name(distributed.broadcast(f"{final.name}.partial-{os.getpid()}"))
        lead = distributed.rank() == 0
        try:
            self._together(lambda: self._fresh(partial) if lead else None, trouble)
            shapes = self._together(lambda: files.write_tensors(partial, flat), trouble)
            hashed = self._together(lambda: files.hash_files(partial), trouble)
            entries = [entry for part in distributed.gather(hashed) for entry in part]
            entries.sort(key=lambda entry: entry.name)
            whole = Manifest(step, metric, meta, tuple(entries), shapes, node, torch.__version__)
            self._together(lambda: manifest.write(partial, whole) if lead else None, trouble)
            self._together(lambda: shelf.commit(partial, final) if lead else None, trouble)
        except Exception:
            if lead:
                shutil.rmtree(partial, ignore_errors=True)
            distributed.barrier()
            raise
        if lead:
            self._attempts.note_progress(step, saved=True)
            shelf.prune(self.folder, step, self.keep_last, self.keep_best)
            self._abandon(step)
        distributed.barrier()
        return Saved(step, final, whole.bytes, time.perf_counter() - started)

    @staticmethod
    def _fresh(partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()  # not its parents: a folder that vanished may be a disk that is gone

    @staticmethod
    def _refuse_non_finite(step: int, flat: Mapping[str, Tensor]) -> None:
        names = dict.fromkeys(name for part in distributed.gather(non_finite(flat)) for name in part)
        if names:
            raise NonFiniteState(step, list(names))

    def discard_after(self, step: int) -> None:
        """Set all checkpoints above ``step`` aside: the run went back and they are no longer its history.

        A rollback calls this, so that a crash before the next save does not resume from them.
        """
        if distributed.rank() == 0 and not self.read_only:
            self._abandon(step)
        distributed.barrier()

    def _abandon(self, step: int) -> None:
        for newer in [s for s in self.steps() if s > step]:
            shelf.set_aside(shelf.folder_of(self.folder, newer), "abandoned")

    # Load.

    def load(
        self, tensors: dict[str, Any], at_most: int | None = None, expect: Mapping[str, Any] | None = None
    ) -> Loaded:
        """Load the newest good checkpoint into the given tensors, in place.

        Args:
            tensors: nested state whose tensors are loaded into. A section (top-level key) that is left
                out is not loaded; in the others names, shapes and dtypes must be those of the checkpoint.
            at_most: newest step to consider.
            expect: values that ``meta`` must have, e.g. the hash of the recipe.

        Raises:
            UserError: no good checkpoint is left, or it is from another recipe.
        """
        flat, _ = flatten(tensors)
        path, found, rejected = self._newest_good(at_most)
        _check_expected(found, expect)
        return _load(path, found, flat, set(tensors), rejected)

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        at_most: int | None = None,
        expect: Mapping[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Loaded:
        """Load the newest good checkpoint of ``state.pack(model, optimizer)``, bit for bit.

        The optimizer may be fresh (without moments) or used. ``extra`` names further sections to load
        into; arguments and errors are those of ``load``.
        """
        path, found, rejected = self._newest_good(at_most)
        _check_expected(found, expect)
        if mismatch := optimizer_mismatch(found.state, found.tensors, optimizer):
            raise UserError(f"checkpoint of step {found.step} is from another recipe: {mismatch}")
        flat, _ = flatten({"model": model.state_dict(), **(extra or {})})
        sections = {"model", "optimizer", *(extra or {})}
        loaded = _load(path, found, flat | optimizer_targets(optimizer, found.tensors, "optimizer"), sections, rejected)
        unpack(model, optimizer, loaded.state)
        return loaded

    def _newest_good(self, at_most: int | None) -> tuple[Path, Manifest, list[str]]:
        rejected: list[str] = []
        passed: set[int] = set()
        while True:
            present = distributed.broadcast(self.steps())
            step = max((s for s in present if s not in passed and (at_most is None or s <= at_most)), default=None)
            if step is None:
                raise UserError(self._none_left(at_most, rejected))
            path = shelf.folder_of(self.folder, step)
            found, fault, damaged = files.verify(path)
            if found:
                return path, found, rejected
            passed.add(step)
            rejected.append(f"checkpoint of step {step} is not used: {fault}")
            if distributed.rank() == 0:
                _LOG.warning("%s", rejected[-1])
                if damaged and not self.read_only:
                    shelf.set_aside(path, "damaged")
            distributed.barrier()

    def _none_left(self, at_most: int | None, rejected: list[str]) -> str:
        limit = "" if at_most is None else f" of step {at_most} or before"
        if rejected:
            found = "; ".join(rejected)
            return f"no good checkpoint{limit} is left in '{self.folder}': {found}; start a new run"
        return f"no checkpoint{limit} in '{self.folder}'; start a new run or name another folder"

    # Restarts.

    def begin_attempt(self, step_resumed: int) -> None:
        """Note that this process starts training from ``step_resumed`` (0: from scratch)."""
        if distributed.rank() == 0:
            self._attempts.begin(step_resumed)

    def note_progress(self, step: int) -> None:
        """Note a finished step; free after the first few. Any rank, at any time.

        Once the attempt is healthy, checkpoints newer than its start, which led to repeated deaths, are
        set aside.
        """
        if distributed.rank() == 0 and self._attempts.note_progress(step):
            self._abandon(self._attempts.start)

    def end_attempt(self, how: str = CLEAN) -> None:
        """Note how training ended: cleanly, or with the named error. Not called: it was killed."""
        if distributed.rank() == 0:
            self._attempts.end(how)

    def resume_limit(self) -> int | None:
        """Return the ``at_most`` for the next resume, or None; see ``attempts``.

        After two attempts that died at once and in the same way from the same checkpoint, it is the step
        before that one.
        """
        return distributed.broadcast(self._attempts.limit(self.steps()))

    def _together(self, work: Callable[[], T], trouble: str) -> T:
        """Run ``work``; if it fails on any rank, raise on all of them."""
        value: T | None = None
        fault: BaseException | None = None
        try:
            value = work()
        except (Exception, CheckpointException) as error:
            fault = files.unwrapped(error)
        reasons = distributed.gather(None if fault is None else files.reason(fault))
        if fault is not None and not isinstance(fault, OSError | CheckpointException):
            raise fault  # a bug, or somebody who wants to stop: not a matter of the disk
        for number, reason in enumerate(reasons):
            if reason is not None:
                where = f" (rank {number})" if len(reasons) > 1 else ""
                raise SaveFailed(f"{trouble}: {reason}{where}") from fault
        return value  # type: ignore[return-value]


def _check_expected(found: Manifest, expect: Mapping[str, Any] | None) -> None:
    for key, value in (expect or {}).items():
        if found.meta.get(key) != value:
            raise UserError(
                f"checkpoint of step {found.step} is from another recipe: its {key} is "
                f"{found.meta.get(key)!r}, here it is {value!r}"
            )


def _load(path: Path, found: Manifest, targets: dict[str, Tensor], sections: set[str], rejected: list[str]) -> Loaded:
    """Load a verified checkpoint into ``targets`` and rebuild the wanted sections around them."""
    wanted = {name: entry for name, entry in found.tensors.items() if name.split(SEPARATOR)[0] in sections}
    if mismatch := first_mismatch(wanted, targets):
        raise UserError(f"checkpoint of step {found.step} is from another recipe: {mismatch}")
    files.read_tensors(path, found, targets)
    state = {key: unflatten(inner, targets) for key, inner in found.state["dict"] if key in sections}
    return Loaded(found.step, found.meta, state, rejected)
