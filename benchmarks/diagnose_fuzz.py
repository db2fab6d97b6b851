"""Damaged logs: mutated inputs for every reader. Nothing may crash, and none may take long.

    python benchmarks/diagnose_fuzz.py [--count 100000] [--only GROUP ...] [--seed 0]

``--count`` inputs go to every group of readers, shared out evenly among its formats.

For every format a small healthy log is made, in that format, and then cut, shuffled, doubled, overwritten with random
bytes or with what breaks parsers (NaN, huge numbers, unclosed brackets, NUL bytes, long lines), or joined with another
format's. ``read_log`` must return a log or raise ``UserError`` in one line; every hundredth log that can be read is
diagnosed, too. Prints what happened, and the slowest input of each format.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

from poise.core.errors import UserError
from poise.core.journal import to_json
from poise.postmortem.diagnosis import diagnose
from poise.postmortem.log import read_log

ROWS = 40
SLOW = 2.0
"""Seconds."""

NASTY = (
    b"nan", b"NaN", b"-inf", b"1e999", b"-1e-999", b"9" * 400, b"{" * 200, b"[" * 200, b'"', b"'", b"\x00" * 9, b"\r",
    b"\n\n\n", b"|" * 50, b"," * 300, b"\x1b[31m", b"\xff\xfe", b"\xef\xbb\xbf", b"A" * 5000, b" " * 5000, b"0x1p-3",
    b"iteration", b"step", b"loss:", b":::MLLOG", b"=" * 100, b"\\", b"%", b"\xf0\x9f\x92\xa5", b"None", b"1_000",
)  # fmt: skip


REPLACED = ((b".", b","), (b"\n", b"\r"), (b" ", b""), (b":", b"="), (b"1", b"nan"))


def curve() -> list[tuple[int, float, float, float]]:
    """Return (step, loss, gradient norm, learning rate) of a small run."""
    return [(i, 2.0 + 8.0 / math.sqrt(i), 1.0 + 0.1 * (i % 5), 3e-4 * min(i / 10, 1.0)) for i in range(1, ROWS + 1)]


def lines(form: str, head: str = "", tail: str = "") -> bytes:
    """Return one line a row."""
    body = "\n".join(form.format(s=s, x=x, g=g, lr=lr, n=ROWS, t=s * 4096) for s, x, g, lr in curve())
    return (head + body + "\n" + tail).encode()


def protobuf_varint(n: int) -> bytes:
    """Return ``n`` as a protocol-buffer varint."""
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def _table() -> list[int]:
    table = []
    for i in range(256):
        for _ in range(8):
            i = i >> 1 ^ (0x82F63B78 if i & 1 else 0)
        table.append(i)
    return table


CRC32C = _table()


def masked_crc(data: bytes) -> bytes:
    """Return TensorBoard's checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CRC32C[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def field(number: int, kind: int, payload: bytes) -> bytes:
    """Return one protocol-buffer field."""
    return protobuf_varint(number << 3 | kind) + (protobuf_varint(len(payload)) if kind == 2 else b"") + payload


def event_file() -> bytes:
    """Return a TensorBoard event file."""
    events = [field(1, 1, struct.pack("<d", 1.7e9)) + field(3, 2, b"brain.Event:2")]
    for step, loss, norm, _ in curve():
        for tag, value in (("train/loss", loss), ("grad_norm", norm)):
            one = field(1, 2, tag.encode()) + field(2, 5, struct.pack("<f", value))
            when = field(1, 1, struct.pack("<d", 1.7e9 + step)) + field(2, 0, protobuf_varint(step))
            events.append(when + field(5, 2, field(1, 2, one)))
    lengths = [struct.pack("<Q", len(event)) for event in events]
    return b"".join(n + masked_crc(n) + e + masked_crc(e) for n, e in zip(lengths, events, strict=True))


def wandb_file() -> bytes:
    """Return a W&B offline file."""
    out = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for step, loss, norm, _ in curve():
        items = b""
        for key, value in (("_step", step), ("train/loss", loss), ("train/grad_norm", norm)):
            items += field(1, 2, field(1, 2, key.encode()) + field(16, 2, json.dumps(value).encode()))
        record = field(2, 2, items + field(2, 2, field(1, 0, protobuf_varint(step))))
        out += struct.pack("<IHB", zlib.crc32(record, zlib.crc32(b"\x01")), len(record), 1) + record
    return out


def golden() -> bytes:
    """Return Megatron's golden values."""
    values = {str(s): round(x, 5) for s, x, _, _ in curve()}
    return json.dumps({"lm loss": {"start_step": 1, "end_step": ROWS, "step_interval": 1, "values": values}}).encode()


def trainer_state() -> bytes:
    """Return a Hugging Face trainer state."""
    history = [{"epoch": s / 40, "loss": x, "grad_norm": g, "learning_rate": lr, "step": s} for s, x, g, lr in curve()]
    history.append({"epoch": 1.0, "step": ROWS, "train_loss": 3.0, "train_runtime": 9.0})
    return json.dumps({"best_metric": None, "global_step": ROWS, "log_history": history, "max_steps": ROWS}).encode()


SAMPLES: dict[str, bytes] = {
    "table": lines("{s},{x:.5f},{g:.3f},{lr:.3e}", "step,loss,grad_norm,lr\n"),
    "jsonl": lines('{{"step": {s}, "loss": {x:.5f}, "grad_norm": {g:.3f}}}'),
    "journal": lines(
        '{{"type": "step", "time": 1.0, "step": {s}, "loss": {x:.5f}, "grad_norm": {g:.3f}, "lr": {lr}, "tokens": {t}}}'
    ),
    "hf": trainer_state(),
    "hf_stdout": lines("{{'loss': {x:.4f}, 'grad_norm': {g:.4f}, 'learning_rate': {lr}, 'epoch': 0.{s:02d}}}"),
    "tensorboard": event_file(),
    "wandb": wandb_file(),
    "megatron": lines(
        " [2024-05-01 10:00:00] iteration {s:8d}/ {n:8d} | consumed samples: {t:12d} | "
        "elapsed time per iteration (ms): 1234.5 | learning rate: {lr:.6E} | global batch size: 64 | "
        "lm loss: {x:.6E} | loss scale: 65536.0 | "
        "grad norm: {g:.3f} | number of skipped iterations:   0 | number of nan iterations:   0 |",
        "------------------------ arguments ------------------------\n  adam_beta1 ...................... 0.9\n"
        "-------------------- end of arguments ---------------------\n",
    ),
    "golden_values": golden(),
    "mllog": lines(
        ':::MLLOG {{"namespace": "", "time_ms": 17, "event_type": "POINT_IN_TIME", "key": "tracked_stats", '
        '"value": {{"reduced_train_loss": {x:.5f}}}, "metadata": {{"step": {s}}}}}'
    ),
    "llmc": lines("step {s:4d}/{n} | loss {x:.6f} (+nanz)| norm {g:.4f} (+nanz)| lr {lr:.2e} | 100.00 ms | 5 tok/s"),
    "llmc_log": lines("s:{s} trl:{x:.4f} lr:{lr:.6f} norm:{g:.2f}"),
    "nanogpt": lines("iter {s}: loss {x:.4f}, time 100.00ms, mfu 10.00%", "step 0: train loss 10.9, val loss 10.9\n"),
    "modded": lines(
        "step:{s}/{n} train_loss:{x:.4f} train_time:100ms step_avg:10.00ms", "import os\nprint(f'{{x}}')\n"
    ),
    "torchtitan": lines(
        "[rank0]:[titan] 2025-01-01 00:00:00,000 - root - INFO - step: {s:2d}  loss: {x:8.4f}  grad_norm: {g:.4f}  "
        "memory: 10.00GiB(12.00%)  tps: 1,234  tflops: 12.34  mfu: 4.50%"
    ),
    "olmo": lines(
        "2025-01-01T00:00:00Z\thost:0\tolmo:1\tINFO\t[step={s}/{n},epoch=1]\n    optim/total grad norm={g:.4f}\n"
        "    train/CE loss={x:.4f}\n    train/PPL=100.0"
    ),
    "deepspeed": lines(
        "[2024-05-01 10:00:00,000] [INFO] [logging.py:96:log_dist] [Rank 0] step={s}, skipped=0, lr=[{lr}], "
        "mom=[(0.9, 0.95)]\nsteps: {s} loss: {x:.4f} iter time (s): 1.2 samples/sec: 34.5"
    ),
    "nanotron": lines(
        "05/01/2024 10:00:00 [INFO|DP=0|PP=0|TP=0]: iteration: {s} / {n} | consumed_tokens: 1.05M | lm_loss: {x:.3g} | "
        "lr: {lr:.3g} | grad_norm: {g:.3g} | global_batch_size: 1.02K"
    ),
    "stdout": lines("Epoch 1 | step {s}/{n} | train_loss {x:.4f} | lr {lr:.2e} | gnorm {g:.2f}"),
}
"""Format -> a small log of it."""


GROUPS = {
    "tables": ("table", "jsonl", "journal"),
    "huggingface": ("hf", "hf_stdout"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "megatron": ("megatron", "golden_values", "nanotron", "deepspeed"),
    "mlperf": ("mllog",),
    "llmc": ("llmc", "llmc_log"),
    "nanogpt": ("nanogpt", "modded"),
    "torchtitan": ("torchtitan",),
    "olmo": ("olmo",),
    "stdout": ("stdout",),
}


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Return ``data`` damaged in one to four ways."""
    for _ in range(rng.randint(1, 4)):
        n = len(data)
        a, b = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
        match rng.randrange(9):
            case 0:
                data = data[:a]
            case 1:
                data = data[:a] + data[b:]
            case 2:
                data = data[:b] + data[a:b][:4096] + data[b:]
            case 3:
                parts = data.split(b"\n")
                rng.shuffle(parts)
                data = b"\n".join(parts)
            case 4:
                data = data[:a] + rng.randbytes(rng.randint(1, 64)) + data[min(n, a + rng.randint(0, 64)) :]
            case 5:
                data = data[:a] + rng.choice(NASTY) + data[a:]
            case 6:
                damaged = bytearray(data)
                for _ in range(rng.randint(1, 20)):
                    if damaged:
                        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
                data = bytes(damaged)
            case 7:
                data = data[:a] + rng.choice(list(SAMPLES.values())) + data[a:]
            case _:
                data = data.replace(
                    *rng.choice([(b".", b","), (b"\n", b"\r"), (b" ", b""), (b":", b"="), (b"1", b"nan")])
                )
        data = data[: 1 << 16] or b"\n"
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Damaged logs for every reader.")
    parser.add_argument("--count", type=int, default=2000, help="inputs for each group (default 2000)")
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=list(GROUPS), help="these groups alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else None
    crashes = slow = 0
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "log"
        for name, count in [(name, options.count // len(GROUPS[g])) for g in options.only for name in GROUPS[g]]:
            sample = SAMPLES[name]
            path.write_bytes(sample)
            healthy = read_log(path)
            assert len(healthy.series["loss"][0]) == ROWS, f"{name}: the healthy sample is not read"
            rng = random.Random(f"{options.seed} {name}")
            outcomes: Counter[str] = Counter()
            longest, began = 0.0, time.perf_counter()
            for number in range(count):
                data = mutated(rng, sample)
                path.write_bytes(data)
                start = time.process_time()  # the processor's time: a busy machine is not the input's doing
                try:
                    log = read_log(path)
                    outcomes["read"] += 1
                    if number % 100 == 0:
                        to_json(diagnose(log).record())
                        outcomes["diagnosed"] += 1
                except UserError as error:
                    assert "\n" not in str(error), str(error)
                    outcomes["refused"] += 1
                except Exception as error:  # what this looks for
                    outcomes["CRASH"] += 1
                    kept = Path(f"crash_{name}_{number}.log")
                    kept.write_bytes(data)
                    print(f"{name} input {number}: {type(error).__name__}: {error}; kept as {kept}", flush=True)
                longest = max(longest, time.process_time() - start)
            crashes += outcomes["CRASH"]
            slow += longest > SLOW
            counts = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
            print(
                f"{name:<14} as {healthy.format:<14} {counts}; slowest {1000 * longest:.0f} ms, "
                f"mean {1000 * (time.perf_counter() - began) / max(count, 1):.2f} ms",
                flush=True,
            )
    print(f"{crashes} crashes, {slow} formats with an input slower than {SLOW:g} s")


if __name__ == "__main__":
    main()
