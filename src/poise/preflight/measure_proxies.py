"""Small proxies trained a few steps at several sizes and learning rates: attention logits and losses of each run.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from poise.core.errors import UserError
from poise.model.build import build
from poise.model.decoder import Decoder
from poise.model.spec import Spec
from poise.optim.build import CLIPPERS, RULES, OptimConfig
from poise.optim.chain import Chain
from poise.optim.schedules import lr_at
from poise.preflight.measure_family import Family, block_weights
from poise.preflight.measure_text import Text
from poise.preflight.settings import Settings
from poise.studies.attention_logits import largest_logits
from poise.train.optimizer import optimizer_for

SEQUENCES, POSITIONS = 8, 64
"""Of a step."""

SIZES: Final = (48, 96, 192)
"""Factors of 2: 4 times the weights of the blocks where the depth stays, 8 times where it follows the width."""

FACTORS: Final = (1.0, 3.0, 10.0, 30.0)
"""Learning rates that are run, in multiples of the configured one."""

LARGEST_LR: Final = 0.3
MOST_STEPS: Final = 300
LEAST_STEPS: Final = 20
WARMUP: Final = 0.1
"""Share of the steps over which the rate rises; then it stays."""

AROUND: Final = 8
"""Steps' worth of time that building a proxy and looking at it takes."""

NEXT: Final = 4.0
"""Time of two sizes over that of the smaller one, where only that was timed."""

SLACK: Final = 0.85
"""Share of the time that is planned for: a step takes longer than the shortest of a few."""

RISE: Final = 0.1
"""Nats above its start at which a proxy's loss counts as diverged."""


@dataclass(frozen=True, slots=True)
class Run:
    """One proxy, trained.

    Attributes:
        width, depth: its size.
        weights: of its blocks.
        lr: peak learning rate.
        seed: of starting values and data.
        logit: largest attention logit over all blocks after the last step, ``nan`` where it has none.
        start, end: loss in nats on held-out tokens before the first step and after the last.
        diverged: the loss was no number, or ended more than ``RISE`` above its start.
    """

    width: int
    depth: int
    weights: int
    lr: float
    seed: int
    logit: float
    start: float
    end: float
    diverged: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What all runs of a measurement have in common.

    Attributes:
        specs: the sizes, ascending.
        rates: the learning rates, ascending; the first is the configured one.
        seeds: one after another.
        steps: of each run.
    """

    specs: tuple[Spec, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int


def optimizer_config(settings: Settings, lr: float) -> tuple[OptimConfig, tuple[str, ...]]:
    """Return the proxies' optimizer, as the configuration has it, and what it cannot have."""
    said = (settings.optimizer or "adamw").lower().replace("-", "_")
    name = next((rule for rule in (said, said.removeprefix("fused_")) if rule in RULES), "adamw")
    left_out = [] if name == said or settings.optimizer is None else [f"optimizer {settings.optimizer}: AdamW instead"]
    clip = settings.clip if settings.clip is not None else 1.0
    values = {
        field: value
        for field in ("beta1", "beta2", "eps", "weight_decay")
        if (value := getattr(settings, field)) is not None
    }
    assert "global_norm" in CLIPPERS
    plain = OptimConfig(name=name, lr=lr, clip="global_norm" if clip else "none", clip_norm=clip)
    try:
        return replace(plain, **values), tuple(left_out)
    except UserError as error:
        return plain, (*left_out, f"settings of the optimizer that cannot be ({error})")


def rates(lr: float, bounded: bool) -> tuple[float, ...]:
    """Return the learning rates to run; with bounded logits only the configured one and one above it."""
    found = [lr * factor for factor in (FACTORS[:2] if bounded else FACTORS)]
    return tuple(rate for rate in found if rate <= LARGEST_LR) or (lr,)


class Proxy:
    """A small model and its optimizer, stepped by hand."""

    def __init__(self, spec: Spec, config: OptimConfig, steps: int, seed: int, device: torch.device) -> None:
        self._model: Decoder = build(spec, seed=seed, device=device)
        self._optimizer: Chain = optimizer_for(config, self._model)
        # Always linear and then constant: the logits of an early step do not know how long the run will be.
        self._schedule = replace(config.schedule, kind="constant", warmup_steps=max(1, round(WARMUP * steps)))
        self._config, self._steps, self._seed, self._device = config, steps, seed, device

    def step(self, text: Text, number: int) -> bool:
        """Do one step; return false where loss or gradient are no numbers."""
        inputs_BT, targets_BT = text.batch(self._seed, number, SEQUENCES, POSITIONS)
        self._optimizer.set_lr(self._config.lr * lr_at(number, self._steps, self._schedule))
        out = self._model(inputs_BT.to(self._device), targets_BT.to(self._device))
        out.loss.backward()
        norm = self._optimizer.measure()
        if not math.isfinite(float(out.ce.detach())) or not math.isfinite(float(norm)):
            return False
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return True

    @torch.no_grad()
    def look(self, text: Text) -> tuple[float, float]:
        """Return the loss and the largest attention logit on a batch that no step is taken on."""
        inputs_BT, targets_BT = (part.to(self._device) for part in text.batch(-1 - self._seed, 0, SEQUENCES, POSITIONS))
        self._model.eval()
        loss = float(self._model(inputs_BT, targets_BT).ce)
        self._model.train()
        logits = largest_logits(self._model, inputs_BT)
        return loss, math.nan if not logits or any(map(math.isnan, logits)) else max(logits)


def train(
    spec: Spec, config: OptimConfig, steps: int, seed: int, text: Text, device: torch.device, until: float
) -> Run | None:
    """Train one proxy; ``None`` where time was up before its last step."""
    proxy = Proxy(spec, config, steps, seed, device)
    start, _ = proxy.look(text)
    sound = math.isfinite(start)
    for number in range(1, steps + 1) if sound else ():
        if time.perf_counter() >= until:
            return None
        if not proxy.step(text, number):
            sound = False
            break
    end, logit = proxy.look(text)
    diverged = not sound or not math.isfinite(end) or end > start + RISE
    return Run(spec.d_model, spec.n_layers, block_weights(spec), config.lr, seed, logit, start, end, diverged)


def step_seconds(spec: Spec, config: OptimConfig, text: Text, device: torch.device, tries: int = 4) -> float:
    """Return the shortest time of a step; the first ones also set things up."""
    proxy = Proxy(spec, config, tries, 0, device)
    times = []
    for number in range(1, tries + 1):
        began = time.perf_counter()
        proxy.step(text, number)
        times.append(time.perf_counter() - began)
    return min(times)


def plan(
    family: Family,
    config: OptimConfig,
    text: Text,
    device: torch.device,
    seconds: float,
    bounded: bool,
    sizes: Sequence[int] = SIZES,
) -> Batch | float:
    """Return what fits into a time; where nothing does, the seconds that the least with a forecast would take.

    Fewer seeds come before fewer steps, and two sizes stay; at last the configured rate alone, which says whether it
    diverges and carries no forecast.
    """
    specs = [family.spec(size, vocab_size=text.vocab_size, seq_len=POSITIONS) for size in sizes]
    grid = rates(config.lr, bounded)
    costs: list[float] = []
    for spec in specs:
        if sum(costs) * 10 > seconds:  # timing alone would take too long: the sizes so far do
            break
        costs.append(step_seconds(spec, config, text, device))
    for seeds, least, run in ((3, 150, grid), (2, 60, grid), (1, LEAST_STEPS, grid), (1, LEAST_STEPS, grid[:1])):
        for n in range(len(costs), 1, -1):
            steps = int(SLACK * seconds / (len(run) * seeds * sum(costs[:n])) - AROUND)
            if steps >= least:
                return Batch(tuple(specs[:n]), run, tuple(range(seeds)), min(steps, MOST_STEPS))
    two = sum(costs[:2]) if len(costs) > 1 else NEXT * sum(costs)
    return len(grid) * two * (LEAST_STEPS + AROUND + 1) / SLACK


def runs(
    batch: Batch,
    config: OptimConfig,
    text: Text,
    device: torch.device,
    until: float,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Run]:
    """Yield runs, a seed at a time, small sizes first, until time is up."""
    total, done = len(batch.seeds) * len(batch.specs) * len(batch.rates), 0
    for seed in batch.seeds:
        for spec in batch.specs:
            for rate in batch.rates:
                run = train(spec, replace(config, lr=rate), batch.steps, seed, text, device, until)
                if run is None:
                    return
                done += 1
                if done % max(1, total // 6) == 0:
                    say(f"proxies: {done} of {total} runs of {batch.steps} steps")
                yield run
