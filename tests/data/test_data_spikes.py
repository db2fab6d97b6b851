"""The mechanism behind the repeated-n-gram rule: text that repeats itself makes gradient spikes, its mask removes them.

The measured evidence, with seeds and arms, is ``benchmarks/data/stability.py``; this is its smallest form.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import pytest
import torch

from poise.data.feed.loader import Feed, Loader
from poise.data.prepare import prepare
from poise.data.settings import Settings
from poise.data.store import Tokens, open_tokens
from poise.model.build import build
from poise.model.decoder import Decoder
from poise.optim.build import OptimConfig
from poise.train.optimizer import optimizer_for
from poise.train.recipe import ModelConfig

T, BATCH, STEPS, LR = 64, 4, 40, 1e-2
WORDS = [a + b for a in ("grad", "norm", "loss", "step", "warm", "seed") for b in ("ient", "al", "er", "ing", "ed")]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Documents of words in random order; every sixth ends with two words in turns, 20 times each."""
    folder, rng = tmp_path_factory.mktemp("tails"), random.Random(0)
    (folder / "text").mkdir()
    for number in range(120):
        words = [rng.choice(WORDS) for _ in range(rng.randint(60, 120))]
        words += rng.sample(WORDS, 2) * (20 if number % 6 == 0 else 0)
        (folder / "text" / f"{number:03}.txt").write_text(" ".join(words), encoding="utf-8")
    return open_tokens(prepare(str(folder / "text"), folder / "out", Settings(vocab_size=320, val_fraction=0.0)).dir)


def norm(model: Decoder, loader: Loader, samples: Sequence[int]) -> float:
    """Return the gradient norm of a batch."""
    model.zero_grad()
    batch = loader.gather(samples)
    model(batch.inputs, batch.targets).loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def test_a_repeating_tail_makes_a_spike_and_its_mask_none(tokens: Tokens) -> None:
    bare = Loader(tokens, T, seed=0, feed=Feed(mask_repeats=False))
    masked = Loader(tokens, T, seed=0)
    model = build(ModelConfig(n_layers=2, d_model=32, n_heads=2, methods=()).spec(tokens.vocab_size, T), seed=0)
    optimizer = optimizer_for(OptimConfig(lr=LR), model)
    optimizer.set_lr(LR)
    quiet = [sample for sample in range(bare.sequences) if not bare.repeats(sample)]
    spans = {
        sample: sum(b - a for a, b in (one["span"] for one in bare.repeats(sample))) for sample in range(bare.sequences)
    }
    held = [sample for sample, length in spans.items() if length > T // 2]
    assert len(held) >= 8 and len(quiet) >= STEPS * BATCH // 2, (len(held), len(quiet))
    clean = []
    for step in range(STEPS):
        some = [quiet[(step * BATCH + row) % len(quiet)] for row in range(BATCH)]
        clean.append(norm(model, bare, some))
        optimizer.step()
    usual = statistics.median(clean[-16:])
    # One sequence of the batch repeats itself: as it is, and as it is trained on.
    batches = [[sample, *quiet[at : at + BATCH - 1]] for at, sample in enumerate(held[:8])]
    spiking = [norm(model, bare, samples) / usual for samples in batches]
    mended = [norm(model, masked, samples) / usual for samples in batches]
    assert max(clean[-16:]) < 1.4 * usual
    assert statistics.median(spiking) > 1.5 and min(spiking) > 1.2, spiking
    assert max(mended) < 1.4 and 0.6 < statistics.median(mended) < 1.15, mended
    assert all(bad > 1.3 * good for bad, good in zip(spiking, mended, strict=True)), (spiking, mended)
