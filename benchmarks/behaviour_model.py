"""A language model small enough to train a hundred times, for studies of how optimizers behave.

Text: the Python standard library's sources, byte-pair tokens, the last tenth held out. Model: poise's decoder
(RMSNorm, RoPE, SwiGLU, tied embedding) without methods against instability. A run is a function of its settings
and its seed, which draws the starting weights and the batches: runs of the same seed see the same data.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.data.readers import Tally
from poise.data.sources import documents, resolve
from poise.data.tokens.tokenizer import train as train_tokenizer
from poise.model.build import build
from poise.model.spec import Spec
from poise.optim.chain import Chain
from poise.optim.groups import groups

VOCABULARY = 512
TEXT_BYTES = 6_000_000
SPEC = Spec(vocab_size=VOCABULARY, seq_len=64, n_layers=2, d_model=64, n_heads=2, n_kv_heads=2, d_ff=176)
BATCH = 8
LR_WARMUP = 50
LR_END = 0.1
EVAL_BATCHES = 64
TAIL = 100
"""Steps at the end over which the training loss is averaged."""

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % points of the t distribution by number of values."""


@dataclass(frozen=True)
class Text:
    """Token ids, and the loss (nats a token) of knowing their frequencies alone."""

    train: Tensor
    held_out: Tensor
    unigram_loss: float


@dataclass(frozen=True)
class Setting:
    """What a run depends on; ``optimizer`` names the chain in full, so that a cached result belongs to it."""

    optimizer: str
    lr: float
    steps: int
    seed: int


def load_text(scratch: Path) -> Text:
    """Return the text as tokens; kept in ``scratch`` from one run of the program to the next."""
    file = scratch / f"tokens_{VOCABULARY}_{TEXT_BYTES}.npy"
    if not file.exists():
        texts, size = [], 0
        for document in documents(resolve("stdlib"), "text", Tally()):
            texts.append(document.text)
            size += len(document.text)
            if size > TEXT_BYTES:
                break
        tokenizer = train_tokenizer(texts[::4], VOCABULARY)
        end = np.array([tokenizer.end_of_text], np.uint32)
        parts = [part for ids in tokenizer.encode(texts) for part in (ids, end)]
        np.save(file, np.concatenate(parts).astype(np.uint16))
    ids = torch.from_numpy(np.load(file).astype(np.int64))
    cut = len(ids) * 9 // 10
    known, held_out = ids[:cut], ids[cut:]
    frequency = (torch.bincount(known, minlength=VOCABULARY).double() + 1) / (len(known) + VOCABULARY)
    return Text(known, held_out, float(-frequency.log()[held_out].mean()))


def batch(ids: Tensor, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (rows, T) each, from places drawn at random."""
    starts = torch.randint(len(ids) - SPEC.seq_len - 1, (rows, 1), generator=generator)
    window = ids[starts + torch.arange(SPEC.seq_len + 1)]
    return window[:, :-1], window[:, 1:]


def lr_at(step: int, peak: float, steps: int) -> float:
    """Return the rate of a step counted from 0: linear warm-up, then a cosine to a tenth of the peak."""
    if step < LR_WARMUP:
        return peak * (step + 1) / LR_WARMUP
    done = (step - LR_WARMUP) / max(1, steps - LR_WARMUP)
    return peak * (LR_END + (1 - LR_END) * 0.5 * (1 + math.cos(math.pi * done)))


def run(setting: Setting, make: Callable[[list[dict[str, Any]], float], Chain], text: Text) -> dict[str, Any]:
    """Train once. Return held-out loss, smoothed training loss, and the curves of loss and gradient norm.

    A run whose loss is no number ends there, with infinite losses.
    """
    model = build(SPEC, seed=setting.seed)
    optimizer = make(groups(model.named_parameters(), model.roles(), 0.0), setting.lr)
    generator = torch.Generator().manual_seed(10_000 + setting.seed)
    watch = SecondMoments(optimizer)
    losses, norms, finite = [], [], True
    for step in range(setting.steps):
        optimizer.set_lr(lr_at(step, setting.lr, setting.steps))
        inputs, targets = batch(text.train, generator, BATCH)
        loss = model(inputs, targets).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            finite = False
            break
        loss.backward()
        norms.append(float(optimizer.measure()))
        watch.note()
        optimizer.step()
        optimizer.zero_grad()
    held_out = evaluate(model, text) if finite else math.inf
    return {
        "held_out": held_out if math.isfinite(held_out) else math.inf,
        "train": statistics.fmean(losses[-TAIL:]) if finite else math.inf,
        "losses": [round(x, 4) for x in losses],
        "norms": [float(f"{x:.4g}") for x in norms],
        "second_moment": watch.ratio(),
    }


class SecondMoments:
    """How large the second moments are, against an exact average of the same squared gradients.

    The mean of a tensor's second moment is the moving average of its mean squared gradient, so a number per tensor
    is enough. Only where nothing is reset and nothing clipped is the ratio 1 but for rounding.
    """

    def __init__(self, optimizer: Chain, beta2: float = 0.999) -> None:
        self._optimizer, self._beta2 = optimizer, beta2
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._sizes = torch.tensor([float(p.numel()) for p in self._params], dtype=torch.float64)
        self._mean = torch.zeros(len(self._params), dtype=torch.float64)

    def note(self) -> None:
        """Take in the gradients of this step, before they are used."""
        norms = self._optimizer.measure_each()
        squares = torch.stack([norms[id(p)] for p in self._params]).double().square() / self._sizes
        self._mean.lerp_(squares, 1 - self._beta2)

    def ratio(self) -> float:
        """Return the median over tensors of the second moment by the exact average."""
        held = torch.stack([self._optimizer.state[p]["exp_avg_sq"].double().mean() for p in self._params])
        return float((held / self._mean).median())


@torch.no_grad()
def evaluate(model: torch.nn.Module, text: Text) -> float:
    """Return the mean held-out loss over the same places for every run."""
    generator = torch.Generator().manual_seed(7)
    return statistics.fmean(
        float(model(*batch(text.held_out, generator, 4 * BATCH)).loss) for _ in range(EVAL_BATCHES // 4)
    )


def cached(scratch: Path, setting: Setting, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of a setting, computed once and kept: a study that was ended goes on where it was."""
    described = {**asdict(setting), "spec": asdict(SPEC), "batch": BATCH, "warmup": LR_WARMUP, "text": TEXT_BYTES}
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=10).hexdigest()
    file = scratch / f"{digest}.json"
    if file.exists():
        return dict(json.loads(file.read_text())["result"])
    result = compute()
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps({"setting": described, "result": result}))
    partial.rename(file)
    return result


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % t-interval; infinite where a value is."""
    if not all(math.isfinite(x) for x in values):
        return math.inf, math.inf
    return statistics.fmean(values), T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
