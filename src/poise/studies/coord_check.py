"""The coordinate check: does every activation keep its size as a model grows wider (or deeper)?

A parametrisation transfers learning rates only if activations, and how far a step moves them, do not depend on the
size (Yang et al. 2022, arXiv 2203.03466; microsoft/mup coord_check). So models of several widths are trained a few
steps on one batch, mean |x| is recorded at every tap before each step, and for each tap the slope of log mean |x|
against log width is fitted: 0 is even, 0.5 grows with the root of the width. The same for the mean of
|x - x at step 0|, which tells what the steps have done apart from the start.

Logits may shrink with the width at the start (they do in muP); their change must not.

Shapes: B sequences, T positions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from poise.core.errors import UserError
from poise.core.rng import derive
from poise.model.build import apply, build
from poise.model.decoder import Decoder
from poise.model.spec import Part, Spec
from poise.optim.groups import groups
from poise.studies import arms
from poise.studies.stats import Interval, mean_interval

Axis = Literal["width", "depth"]
Verdict = Literal["even", "grows", "shrinks", "unclear", "zero", "not finite"]

TOLERANCE: Final = 0.2
"""Slopes up to here count as even: between that of an even tap, 0, and that of one that grows with a root, 0.5."""

VOCAB, SEQUENCES, POSITIONS, HEAD_DIM = 256, 4, 32, 16
"""What all models of a check have in common; heads are ``HEAD_DIM`` wide, so their number grows with the width."""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        arms: label -> methods, as recipes name them.
        axis: what grows.
        sizes: widths (multiples of ``HEAD_DIM``) or depths, ascending, at least two.
        other: number of blocks where widths are compared, width where depths are.
        steps: training steps.
        seeds: of starting values and batches.
        lr: base rate of AdamW, before the methods' shares.
        init: the house's initialisation, ``small`` or ``default``; a method may take its place.
        tied: whether the head is the embedding.
    """

    arms: Mapping[str, tuple[str, ...]]
    axis: Axis = "width"
    sizes: tuple[int, ...] = (64, 128, 256, 512)
    other: int = 2
    steps: int = 4
    seeds: int = 3
    lr: float = 1e-2
    init: str = "small"
    tied: bool = True

    def __post_init__(self) -> None:
        if len(set(self.sizes)) < 2 or list(self.sizes) != sorted(set(self.sizes)):
            raise UserError(f"{self.axis}s are {_list(self.sizes)}; give at least two in ascending order, e.g. 64,128")
        for value in self.sizes if self.axis == "width" else (self.other,):
            if value < HEAD_DIM or value % HEAD_DIM:
                raise UserError(f"width {value} is not a multiple of the head width {HEAD_DIM}; use e.g. 64")
        for name, value in (("steps", self.steps), ("seeds", self.seeds), ("depth", min(self._depths()))):
            if value < 1:
                raise UserError(f"{name} is {value}; give a whole number of at least 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr}; give a finite number above 0, e.g. 1e-2")
        if self.init not in ("small", "default"):
            raise UserError(f"init is '{self.init}'; use small or default")

    def _depths(self) -> tuple[int, ...]:
        return self.sizes if self.axis == "depth" else (self.other,)

    def spec(self, methods: Sequence[str], size: int) -> Spec:
        """Return the model of one size.

        Raises:
            UserError: a method that does not fit.
        """
        width, depth = (size, self.other) if self.axis == "width" else (self.other, size)
        heads = width // HEAD_DIM
        plain = Spec(VOCAB, POSITIONS, depth, width, heads, heads, 2 * width, tied=self.tied, init=Part.of(self.init))
        return apply(plain, *methods)


@dataclass(frozen=True)
class Tap:
    """What was found at one tap of one arm.

    Attributes:
        values: size of the model -> mean |x| by seed and step, (seeds, steps + 1).
        changes: the same of |x - x at step 0|.
        start: slope of log mean |x| before the first step.
        slope: after the last step.
        change: slope of log mean |x - x at step 0| after the last step.
        verdict: on ``slope``.
        change_verdict: on ``change``.
    """

    values: Mapping[int, list[list[float]]]
    changes: Mapping[int, list[list[float]]]
    start: Interval | None = field(init=False)
    slope: Interval | None = field(init=False)
    change: Interval | None = field(init=False)
    verdict: Verdict = field(init=False)
    change_verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        start, _ = judged(self.values, 0)
        slope, verdict = judged(self.values, -1)
        change, change_verdict = judged(self.changes, -1)
        for name, value in {
            "start": start,
            "slope": slope,
            "change": change,
            "verdict": verdict,
            "change_verdict": change_verdict,
        }.items():
            object.__setattr__(self, name, value)


def judged(values: Mapping[int, list[list[float]]], step: int) -> tuple[Interval | None, Verdict]:
    """Return the slope of log value against log size at a step, over seeds, and what it means.

    Even: the whole interval lies within ``TOLERANCE``. Grows (shrinks): the mean is beyond it and the interval does
    not reach 0. With one seed there is no interval, and the mean decides.
    """
    sizes = sorted(values)
    table = np.array([[seed[step] for seed in values[size]] for size in sizes])
    if not np.isfinite(table).all():
        return None, "not finite"
    if (table <= 0).any():
        return None, "zero"
    x = np.log(np.array(sizes, dtype=np.float64))
    slopes = [float(np.polyfit(x, np.log(column), 1)[0]) for column in table.T]
    interval = mean_interval(slopes)
    assert interval is not None
    low = interval.mean if interval.low is None else interval.low
    high = interval.mean if interval.high is None else interval.high
    if low >= -TOLERANCE and high <= TOLERANCE:
        return interval, "even"
    if interval.mean > TOLERANCE and low > 0:
        return interval, "grows"
    if interval.mean < -TOLERANCE and high < 0:
        return interval, "shrinks"
    return interval, "unclear"


def check(plan: Plan, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, dict[str, Tap]]:
    """Train all models of a plan; return what was found by arm and tap.

    Where depths are compared, a place in the blocks is averaged over the blocks (``block.attn_out``), and
    ``block.last.residual`` is the stream behind the last one.
    """
    specs = {label: {size: plan.spec(methods, size) for size in plan.sizes} for label, methods in plan.arms.items()}
    total, done, found = len(plan.arms) * len(plan.sizes) * plan.seeds, 0, {}
    for label, by_size in specs.items():
        values: dict[str, dict[int, list[list[float]]]] = {}
        changes: dict[str, dict[int, list[list[float]]]] = {}
        for size, spec in by_size.items():
            for seed in range(plan.seeds):
                for tap, rows in trace(spec, plan, seed).items():
                    for table, column in ((values, 0), (changes, 1)):
                        table.setdefault(tap, {}).setdefault(size, []).append([row[column] for row in rows])
                done += 1
                progress(done, total)
        found[label] = {tap: Tap(values[tap], changes[tap]) for tap in values}
    return found


def trace(spec: Spec, plan: Plan, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Train one model; return (mean |x|, mean |x - x at step 0|) before each step and after the last, by tap."""
    model = build(spec, seed=seed)
    generator = torch.Generator().manual_seed(derive(seed, "coord_check"))
    ids_BT = torch.randint(0, VOCAB, (SEQUENCES, POSITIONS + 1), generator=generator)
    inputs_BT, targets_BT = ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()
    # Adam's eps would stop wide models, whose gradients are small, sooner than narrow ones.
    own = groups(
        model.named_parameters(), model.roles(), 0.0, multipliers=model.lr_multipliers(), lr=plan.lr
    )  # each with its own rate
    optimizer = torch.optim.AdamW(own, betas=(0.9, 0.95), eps=1e-14)
    first, rows = {}, dict[str, list[tuple[float, float]]]()
    for step in range(plan.steps + 1):
        seen = activations(model, inputs_BT, by_place=plan.axis == "depth")
        first = first or seen
        for tap, tensors in seen.items():
            size = sum(x.abs().mean().item() for x in tensors) / len(tensors)
            moved = sum((x - y).abs().mean().item() for x, y in zip(tensors, first[tap], strict=True)) / len(tensors)
            rows.setdefault(tap, []).append((size, moved))
        if step < plan.steps:
            optimizer.zero_grad()
            model(inputs_BT, targets_BT).loss.backward()
            optimizer.step()
    return rows


@torch.no_grad()
def activations(model: Decoder, inputs_BT: Tensor, by_place: bool) -> dict[str, list[Tensor]]:
    """Return what goes through every tap, and the logits; by place (over all blocks) or by tap."""
    seen: dict[str, list[Tensor]] = {}
    last = f"block.{model.spec.n_layers - 1}.residual"

    def listener(name: str) -> Callable[[Any, Any, Tensor], None]:
        parts = name.split(".")
        place = f"block.{parts[-1]}" if by_place and len(parts) == 3 else name

        def listen(module: Any, args: Any, out: Tensor) -> None:
            seen.setdefault(place, []).append(out.float())
            if by_place and name == last:
                seen["block.last.residual"] = [out.float()]

        return listen

    handles = [tap.register_forward_hook(listener(name)) for name, tap in model.taps().items()]
    model.eval()
    seen["logits"] = [model.logits(inputs_BT)]
    model.train()
    for handle in handles:
        handle.remove()
    return seen


# -- the command -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(words: Sequence[str]) -> int:
    """``poise study coord-check``: print, and with ``--out`` write, the slopes of every arm, the baseline first.

    Raises:
        UserError: words or sizes that do not fit.
    """
    arguments = _parser().parse_args(list(words))
    plan = _plan(arguments)
    began = time.perf_counter()
    found = check(plan, _on_terminal(began))
    facts = {**_facts(plan), "seconds": round(time.perf_counter() - began, 1)}
    as_json = json.dumps({**facts, "arms": {arm: _plain(taps) for arm, taps in found.items()}}, indent=2)
    text = table(plan, found)
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "coord_check.json").write_text(as_json + "\n", encoding="utf-8")
        (folder / "coord_check.txt").write_text(text, encoding="utf-8")
    sys.stdout.write(as_json + "\n" if arguments.json else text)
    return 0


def table(plan: Plan, found: Mapping[str, Mapping[str, Tap]]) -> str:
    """Return the slopes of every arm as text; of the blocks, the one whose slope is farthest from even."""
    end = f"after {plan.steps} steps"
    other = "blocks" if plan.axis == "width" else "wide"
    head = "tied" if plan.tied else "untied"
    lines = [
        f"slope of log mean|x| against log {plan.axis} ({_list(plan.sizes)}; {plan.other} {other}), "
        f"{plan.seeds} seeds, lr {plan.lr:g}, init {plan.init}, {head} head; even: within ±{TOLERANCE:g}",
    ]
    for arm, taps in found.items():
        chosen: dict[str, tuple[str, Tap]] = {}
        for name, tap in taps.items():
            place = name.rsplit(".", 1)[-1] if name != "block.last.residual" else name
            if place not in chosen or _far(tap) > _far(chosen[place][1]):
                chosen[place] = (name, tap)
        lines += ["", arm, f"  {'tap':<20}{'start':>7}  {end:<30}{'moved since the start'}"]
        for name, tap in chosen.values():
            start = "-" if tap.start is None else f"{tap.start.mean:+.2f}"
            lines.append(
                f"  {name:<20}{start:>7}  {_shown(tap.slope, tap.verdict):<30}{_shown(tap.change, tap.change_verdict)}"
            )
        grows = f"{_count(taps, 'verdict')}; in what was moved: {_count(taps, 'change_verdict')}"
        lines.append(f"  taps that grow: {grows}")
    return "\n".join(lines) + "\n"


def _count(taps: Mapping[str, Tap], which: str) -> str:
    verdicts = [getattr(tap, which) for tap in taps.values()]
    return f"{sum(verdict in ('grows', 'not finite') for verdict in verdicts)} of {len(verdicts)}"


def _far(tap: Tap) -> float:
    """How far from even: the larger of both slopes; what has no slope comes first."""
    return max(math.inf if slope is None else abs(slope.mean) for slope in (tap.slope, tap.change))


def _shown(slope: Interval | None, verdict: str) -> str:
    if slope is None:
        return verdict
    if slope.low is None or slope.high is None:
        return f"{slope.mean:+.2f} {verdict}"
    return f"{slope.mean:+.2f} [{slope.low:+.2f}, {slope.high:+.2f}] {verdict}"


def _parser() -> _Parser:
    parser = _Parser(
        prog="poise study coord-check",
        description="Train a few steps at several widths (or depths); tell which activations do not keep their size.",
        epilog="example:\n  poise study coord-check --methods mup:base_width=64 --widths 64,128,256,512 --steps 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--methods", metavar="ARMS", action="append", default=[], help="arms, as in lr-sensitivity")
    parser.add_argument("--widths", metavar="LIST", help="widths to compare (default 64,128,256,512)")
    parser.add_argument("--depths", metavar="LIST", help="compare depths instead, e.g. 2,4,8")
    parser.add_argument("--width", metavar="D", default="64", help="width where depths are compared (default 64)")
    parser.add_argument("--layers", metavar="N", default="2", help="blocks where widths are compared (default 2)")
    parser.add_argument("--steps", metavar="N", default="4", help="training steps (default 4)")
    parser.add_argument("--seeds", metavar="N", default="3", help="seeds 0 to N - 1 (default 3)")
    parser.add_argument("--lr", metavar="RATE", default="1e-2", help="base learning rate (default 1e-2)")
    parser.add_argument("--init", default="small", help="small or default, as model.init (default small)")
    parser.add_argument("--untied", action="store_true", help="give the head a matrix of its own")
    parser.add_argument("--json", action="store_true", help="print JSON, with every tap and step")
    parser.add_argument("--out", metavar="DIR", help="also write coord_check.json and coord_check.txt there")
    return parser


def _plan(arguments: argparse.Namespace) -> Plan:
    if arguments.widths and arguments.depths:
        raise UserError("--widths and --depths are two different checks; give one of them")
    named = arms.parse_all(["baseline", *(arm for arm in arms.split(arguments.methods) if arm != "baseline")])
    for arm in named:
        if arm.over:
            raise UserError(
                f"arm '{arm.label}' sets recipe values, but coord-check knows only methods; leave out the @"
            )
    by_depth = bool(arguments.depths)
    return Plan(
        arms={arm.label: arm.methods for arm in named},
        axis="depth" if by_depth else "width",
        sizes=_whole_list(arguments.depths or arguments.widths or "64,128,256,512"),
        other=_number(arguments.width if by_depth else arguments.layers, int, "--width" if by_depth else "--layers"),
        steps=_number(arguments.steps, int, "--steps"),
        seeds=_number(arguments.seeds, int, "--seeds"),
        lr=_number(arguments.lr, float, "--lr"),
        init=arguments.init,
        tied=not arguments.untied,
    )


def _whole_list(text: str) -> tuple[int, ...]:
    return tuple(_number(part, int, "a size") for part in text.split(","))


def _number(text: str, kind: type, name: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{name} is '{text}'; give a {'whole ' if kind is int else ''}number") from None


def _list(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def _facts(plan: Plan) -> dict[str, Any]:
    named = {arm: list(methods) for arm, methods in plan.arms.items()}
    rest = {name: getattr(plan, name) for name in ("axis", "sizes", "other", "steps", "seeds", "lr", "init", "tied")}
    return {"methods": named, **rest, "tolerance": TOLERANCE}


def _plain(taps: Mapping[str, Tap]) -> dict[str, Any]:
    return {
        name: {
            "verdict": tap.verdict,
            "change_verdict": tap.change_verdict,
            **{which: _ends(getattr(tap, which)) for which in ("start", "slope", "change")},
            "values": tap.values,
            "changes": tap.changes,
        }
        for name, tap in taps.items()
    }


def _ends(slope: Interval | None) -> dict[str, float | None] | None:
    return None if slope is None else {"mean": slope.mean, "low": slope.low, "high": slope.high}


def _on_terminal(began: float) -> Callable[[int, int], None]:
    """Show how many models are done on a terminal, and nothing elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            left = (time.perf_counter() - began) / done * (total - done)
            sys.stderr.write(f"\r{done} of {total} models, {left:.0f} s left   {chr(10) if done == total else ''}")
            sys.stderr.flush()

    return show
