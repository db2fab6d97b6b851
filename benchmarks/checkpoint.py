"""Speed of verified checkpoints: MB/s of saving, verifying and loading about 30 M parameters with AdamW.

    python benchmarks/checkpoint.py [FOLDER]

Saving is everything: finite check, write, fsync, read back and hash, commit, remove the old one.
``torch.save`` of the same state beside the old file, with an fsync and a rename, is the yardstick. The best
of six of each, taken in turns, because others who use the disk and the CPU disturb single ones.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from poise.hardware import manifest, state
from poise.hardware.checkpoint import CheckpointStore
from poise.hardware.environment import describe


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a transformer-shaped stack of about 30 M parameters after one AdamW step."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(512, 2048), nn.Linear(2048, 512)) for _ in range(12)]
    model = nn.Sequential(nn.Embedding(8192, 512), *blocks)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain_save(folder: Path, values: dict[str, object]) -> None:
    """What most scripts do, made durable and never without a whole file, but unchecked."""
    with (folder / "plain.new").open("wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
    (folder / "plain.new").replace(folder / "plain.pt")


def main() -> None:
    """Print the table."""
    model, optimizer = build()
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=parent))
    store = CheckpointStore(folder, keep_last=1, keep_best=0)
    packed = state.pack(model, optimizer)
    flat, _ = state.flatten(packed)
    saved = store.save(0, packed, {})
    entries = manifest.read(saved.path).files

    def verify() -> None:
        assert not any(manifest.fault(store.folder / "step-00000000", entry) for entry in entries)

    parts: dict[str, Callable[[], object]] = {
        "save, all of it": lambda: store.save(0, packed, {}),
        "  finite check": lambda: state.non_finite(flat),
        "verify": verify,
        "verify and load": lambda: store.restore(model, optimizer),
        "torch.save, fsync": lambda: plain_save(folder, packed),
        "torch.load": lambda: torch.load(folder / "plain.pt"),
    }
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(6):
        for name, work in parts.items():
            if name == "verify":
                entries = manifest.read(store.folder / "step-00000000").files
            best[name] = min(best[name], seconds(work))
    shutil.rmtree(folder)

    where = describe()
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f} M parameters with AdamW moments, {saved.bytes / 1e6:.0f} MB, best of 6")
    print(f"{where['cpu']}, {where['cpus_usable']} CPUs, {where['threads']} threads, torch {where['torch']}")
    print("files are read back from the page cache")
    for name, time_s in best.items():
        print(f"{name:22s} {time_s:7.3f} s {saved.bytes / time_s / 1e6:8.0f} MB/s")


if __name__ == "__main__":
    main()
