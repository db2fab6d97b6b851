"""Reading, writing and verifying the files of one checkpoint; all ranks call each function together."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from poise.core.errors import UserError
from poise.hardware import distributed, manifest
from poise.hardware.manifest import Damaged, Manifest


def write_tensors(folder: Path, flat: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Write this rank's part of the tensors; return name to (whole shape, dtype name) of all."""
    with _quiet():
        written = dcp.save(
            flat,
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=distributed.size() == 1,
        )
    return {
        name: (tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in written.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def hash_files(folder: Path) -> list[manifest.FileEntry]:
    """Force this rank's share of the files to the disk and hash what reads back."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [manifest.hash_file(path, sync=True) for path in files[distributed.rank() :: distributed.size()]]


def verify(folder: Path) -> tuple[Manifest | None, str, bool]:
    """Return (manifest if all is well, what is wrong, whether it is damage and not just unreadable).

    The ranks share the hashing and return the same.
    """
    box: Manifest | Exception | None = None
    if distributed.rank() == 0:
        try:
            box = manifest.read(folder)
        except (Damaged, OSError, UserError) as error:
            box = error
    found = distributed.broadcast(box)
    assert found is not None
    if isinstance(found, UserError):
        raise found
    if isinstance(found, Exception):
        return None, reason(found), isinstance(found, Damaged)
    faults: list[tuple[str, bool]] = []
    for entry in found.files[distributed.rank() :: distributed.size()]:
        try:
            fault, damaged = manifest.fault(folder, entry), True
        except OSError as error:
            fault, damaged = f"{entry.name} cannot be read ({reason(error)})", False
        if fault:
            faults.append((fault, damaged))
    faults = [fault for part in distributed.gather(faults) for fault in part]
    if faults:
        return None, faults[0][0], any(damaged for _, damaged in faults)
    return found, "", False


def read_tensors(folder: Path, found: Manifest, targets: Mapping[str, Tensor]) -> None:
    """Load a verified checkpoint into ``targets``, in place; names, shapes and dtypes must fit.

    Raises:
        UserError: this version of torch cannot read what another has written.
    """
    if not targets:
        return
    try:
        with _quiet():
            dcp.load(
                dict(targets),
                storage_reader=dcp.FileSystemReader(folder),
                planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=distributed.size() == 1,
            )
    except CheckpointException as error:
        fault = unwrapped(error)
        if not isinstance(fault, CheckpointException | OSError):
            raise fault from None
        raise UserError(
            f"checkpoint of step {found.step}, written by torch {found.torch}, is undamaged but cannot be "
            f"read by torch {torch.__version__}: {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """Return an error in one line, without paths where the system has a message."""
    if isinstance(error, CheckpointException):
        return reason(next(iter(error.failures.values()))[0])
    inner: BaseException | None = error
    while isinstance(inner, RuntimeError | OSError):
        # Torch's writer buries "disk full" under a complaint about positions.
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def unwrapped(error: BaseException) -> BaseException:
    """Return what DCP wrapped if it is no failure (Ctrl-C, exit), else the error as it is."""
    if isinstance(error, CheckpointException):
        for inner, _ in error.failures.values():
            if not isinstance(inner, Exception):
                return inner
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence DCP's remark that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
