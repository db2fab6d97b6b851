"""Fork a process that saves without a pause, kill it at a random moment, load what is there; again and again.

    python kill_while_saving.py FOLDER TRIALS

Checks after each kill: what loads is whole (all numbers are of one step) and not older than the last step
that the killed process reported as saved.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from poise.hardware.checkpoint import CheckpointStore


def state(step):
    return {"a": torch.full((30_000,), float(step)), "b": torch.full((100,), float(step))}


def save_forever(folder, first, pipe):
    store = CheckpointStore(folder, keep_last=2)
    step = first
    while True:
        store.save(step, state(step), {"step": step})
        os.write(pipe, step.to_bytes(8, "little"))
        step += 1


def last_reported(pipe):
    data = b""
    while part := os.read(pipe, 65536):
        data += part
    return int.from_bytes(data[-8:], "little") if data else 0  # 0: no more than what was read before


def main():
    folder, trials = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    chance = random.Random(1)
    CheckpointStore(folder).save(1, state(1), {"step": 1})
    newest, inside = 1, 0
    for _ in range(trials):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            save_forever(folder, newest + 1, write)
        os.close(write)
        for _ in range(chance.randint(1, 3)):
            os.read(read, 8)
        time.sleep(chance.uniform(0.0, 0.015))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reported = max(newest, last_reported(read))
        os.close(read)
        inside += any("partial" in path.name for path in folder.iterdir())
        target = state(0)
        loaded = CheckpointStore(folder, keep_last=2).load(target)
        assert not loaded.rejected, loaded.rejected
        assert loaded.meta == {"step": loaded.step}
        assert all(bool((tensor == loaded.step).all()) for tensor in target.values()), "a mixture"
        assert loaded.step >= reported, f"step {reported} was reported as saved, {loaded.step} came back"
        newest = loaded.step
    assert newest > trials, "hardly anything was saved"
    assert inside, "no kill fell into a save"
    sys.stdout.write(f"{trials} kills, {inside} inside a save, {newest} steps\n")


if __name__ == "__main__":
    main()
