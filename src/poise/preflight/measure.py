"""``poise check --model``: about two minutes of measurement of a model of a configuration's family, on this machine.

In this order, each while there is time: the start by layer and one backward pass; a coordinate check over three widths
(Yang et al. 2022, arXiv 2203.03466); proxies at several sizes and learning rates, whose attention logits are
extrapolated (``measure_forecast``). What was scaled, left out or not done is said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch

from poise.core.errors import UserError
from poise.dashboard.text import count, number, plural
from poise.model.counts import count as counted
from poise.model.spec import Spec
from poise.optim.build import OptimConfig
from poise.preflight import measure_proxies as proxies
from poise.preflight.check import Report
from poise.preflight.measure_family import LARGEST, Family, of_recipe, of_settings
from poise.preflight.measure_forecast import NEAR, THRESHOLD, Forecast, forecast
from poise.preflight.measure_judge import judge
from poise.preflight.measure_start import Start, start
from poise.preflight.measure_text import Text, tokens
from poise.preflight.measure_widths import Widths, widths
from poise.preflight.rules.base import RANK, dense_size, is_adam, logits_bounded, usual_lr
from poise.preflight.settings import Finding, Settings

VOCAB: Final = 512
"""Of the proxies: small, so that time goes into their blocks."""

START_WIDTH: Final = 64
"""Of the model whose start is measured when the configured one is too large; it has the configured depth."""

DEEPEST: Final = 128
WIDTHS_UNTIL, PROXIES_UNTIL = 0.3, 0.92
"""Shares of the budget at which a part has to stop."""

WIDTHS_FROM: Final = 12.0
"""Seconds of budget from which widths are compared; a shorter one belongs to the proxies, which say more."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured.

    Attributes:
        model: what was built for the start, in words.
        left_out: what our decoder does not represent of the configuration.
        text: the tokens.
        start, widths, forecast: ``None`` where not done.
        not_done: what there was no time for, or why it could not be done.
        seconds: all of it.
        findings: what is wrong with it.
    """

    model: str
    left_out: tuple[str, ...]
    text: str
    start: Start | None
    widths: Widths | None
    forecast: Forecast | None
    not_done: tuple[str, ...]
    seconds: float
    findings: tuple[Finding, ...]

    def added_to(self, report: Report) -> Report:
        """Return the report with these findings in it."""
        both = sorted((*report.findings, *self.findings), key=lambda found: RANK[found.severity])
        return replace(report, findings=tuple(both))

    def record(self) -> dict[str, Any]:
        """Return everything for JSON; of the widths the slopes, not every activation."""
        taps: dict[str, dict[str, Any]] = {}
        if self.widths is not None:
            for name, tap in self.widths.taps.items():
                slopes = {which: getattr(tap, which) for which in ("start", "slope", "change")}
                taps[name] = {which: None if one is None else asdict(one) for which, one in slopes.items()}
                taps[name] |= {"verdict": tap.verdict, "change_verdict": tap.change_verdict}
        shown = None
        if self.widths is not None:
            w = self.widths
            shown = {"widths": list(w.widths), "lr": w.lr, "steps": w.steps, "seeds": w.seeds, "taps": taps}
        return {
            "model": self.model,
            "left_out": list(self.left_out),
            "text": self.text,
            "start": None if self.start is None else asdict(self.start) | {"profile": self.start.profile},
            "widths": shown,
            "forecast": None if self.forecast is None else asdict(self.forecast),
            "not_done": list(self.not_done),
            "seconds": round(self.seconds, 1),
        }

    def lines(self, everything: bool = False) -> list[str]:
        """Return what was measured as lines for the terminal."""
        out = [f"measured in {self.seconds:.0f} s on {self.model}; {self.text}"]
        if self.left_out:
            out.append(f"  not represented: {'; '.join(self.left_out)}")
        if self.start is not None:
            out += _start_lines(self.start, everything)
        if self.widths is not None:
            out += _width_lines(self.widths, everything)
        if self.forecast is not None:
            out += _forecast_lines(self.forecast, everything)
        return out + [f"  not done: {text}" for text in self.not_done]


def measure(
    settings: Settings,
    *,
    minutes: float = 2.0,
    say: Say = lambda text: None,
    sizes: tuple[int, ...] = proxies.SIZES,
    seed: int = 0,
) -> Measurement:
    """Measure a model of the configuration's family; stop when time is up and say what was not done.

    Args:
        settings: the configuration. That of a recipe of ours is loaded again, to build the very model.
        minutes: budget. A part that has begun may overrun it by about a step.
        say: told how far it is, a line at a time.
        sizes: widths of the proxies, ascending multiples of 16.
        seed: of starting values and batches.

    Raises:
        UserError: width or depth are not said, or methods that do not go together.
    """
    began = time.perf_counter()
    seconds = 60.0 * minutes
    until = began + PROXIES_UNTIL * seconds
    family = _family(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usual = usual_lr(dense_size(settings) or family.full)
    lr = settings.lr if settings.lr is not None else usual
    config, odd = proxies.optimizer_config(settings, lr)
    say("tokens")
    text, _ = tokens(VOCAB, seconds)
    not_done: list[str] = []

    spec, model = _measured(family, seconds, text)
    say(f"the start of {model}")
    length = min(spec.seq_len, proxies.POSITIONS)
    begun = start(spec, text.batch(seed, 0, 4, length), seed, device)

    short, slow = seconds < WIDTHS_FROM, time.perf_counter() - began > WIDTHS_UNTIL * seconds
    if not short:
        say("three widths")
    # The check is that of Adam: another optimizer's rate would mean something else.
    adam_lr = lr if is_adam(settings) or settings.optimizer is None else usual
    compared = None if short or slow else widths(family, adam_lr, began + WIDTHS_UNTIL * seconds)
    if short:
        not_done.append(f"three widths: from --minutes {WIDTHS_FROM / 60:g} on; the proxies had the time")
    elif compared is None:
        not_done.append("three widths: no time; give more --minutes")

    bounded = logits_bounded(settings)
    foretold = _forecast(family, config, text, device, until, bounded, sizes, say, not_done)
    found = judge(settings, begun, compared, foretold, lr, ", ".join(family.scaled(spec)))
    if settings.lr is None:
        odd = (*odd, f"the learning rate is not said: {lr:.2g}, the usual one at this size, is taken")
    return Measurement(
        model,
        (*family.left_out, *odd),
        text.what,
        begun,
        compared,
        foretold,
        tuple(not_done),
        time.perf_counter() - began,
        tuple(found),
    )


def _family(settings: Settings) -> Family:
    if settings.format != "recipe":
        return of_settings(settings)
    from poise.train.recipe import load

    try:
        return of_recipe(load(settings.source))
    except UserError:  # several files read as one run: the recipe is one of them
        return of_settings(settings)


def _measured(family: Family, seconds: float, text: Text) -> tuple[Spec, str]:
    """Return the model whose start is measured, and what it is in words."""
    own = family.own
    if own is not None and own.vocab_size >= text.vocab_size:
        weights = counted(own).params
        if weights <= LARGEST * min(1.0, seconds / 30.0):
            return own, f"the recipe's own model, {count(weights)} weights"
    width = min(START_WIDTH, family.width // 32 * 32 or 32)
    depth = min(family.depth, DEEPEST)
    spec = family.spec(width, vocab_size=text.vocab_size, seq_len=proxies.POSITIONS, depth=depth)
    return spec, f"a model of its family ({', '.join(family.scaled(spec))})"


def _forecast(
    family: Family,
    config: OptimConfig,
    text: Text,
    device: torch.device,
    until: float,
    bounded: bool,
    sizes: tuple[int, ...],
    say: Say,
    not_done: list[str],
) -> Forecast | None:
    fitting = [size for size in sizes if size <= family.width] if len(sizes) > 1 else list(sizes)
    left = until - time.perf_counter()
    say("timing the proxies")
    batch = proxies.plan(family, config, text, device, max(left, 0.0), bounded, fitting) if fitting else 0.0
    if not isinstance(batch, proxies.Batch):
        more = math.ceil(10 * (batch - left) / PROXIES_UNTIL / 60) / 10
        not_done.append(
            f"attention logits over sizes and rates: no time; about {more:g} more --minutes would do"
            if fitting
            else f"attention logits over sizes and rates: the model is narrower than {min(sizes)}"
        )
        return None
    if len(batch.rates) == 1 and len(proxies.rates(config.lr, bounded)) > 1:
        not_done.append("forecast of attention logits: time for the configured rate alone; give more --minutes")
    say(f"proxies: {len(batch.specs)} sizes x {len(batch.rates)} rates x {len(batch.seeds)} seeds, {batch.steps} steps")
    done = list(proxies.runs(batch, config, text, device, until, say))
    wanted = len(batch.specs) * len(batch.rates) * len(batch.seeds)
    if len(done) < wanted:
        not_done.append(f"{wanted - len(done)} of {wanted} proxy runs: time was up")
    return forecast(done, family.full, batch.steps) if done else None


# -- in words ----------------------------------------------------------------------------------------------------


def _start_lines(s: Start, everything: bool) -> list[str]:
    first, last = s.layers[0], s.layers[-1]
    logit = max((layer.logit for layer in s.layers), default=float("nan"))
    out = [
        f"  start: loss {s.loss:.2f} (ln V is {s.nothing:.2f}), output logits of deviation {number(s.logits)}, largest "
        f"attention logit {number(logit)}, residual stream {number(s.embedded)} -> {number(last.stream)}, first "
        f"block's branches {number(first.attn)} and {number(first.mlp)}",
        f"  gradient: norm {number(s.gradient)}, first block / last block {number(s.profile)}, the embedding and the "
        f"head have {100 * s.embedding:.0f} % of its square",
    ]
    if everything:
        for layer in s.layers:
            weights = ", ".join(f"{role} {value:.3g}" for role, value in layer.weights.items())
            out.append(
                f"    block {layer.number}: stream {number(layer.stream)}, attention {number(layer.attn)}, MLP "
                f"{number(layer.mlp)}, logit {number(layer.logit)}, gradient {number(layer.gradient)}; {weights}"
            )
    return out


def _width_lines(w: Widths, everything: bool) -> list[str]:
    growing, total = w.growing("change_verdict"), len(w.taps)
    steepest = w.steepest("change")
    text = f"  widths {', '.join(map(str, w.widths))} at lr {w.lr:g}: what {plural(w.steps, 'step')} moved grows with "
    text += f"the width at {len(growing)} of {total} places"
    if steepest is not None and growing:
        text += f", most at {steepest[0]} (slope {steepest[1].mean:+.2f})"
    out = [text + ("; the best rate is then lower at a larger width" if growing else "")]
    if everything:
        for name, tap in w.taps.items():
            slopes = [one.mean if one is not None else None for one in (tap.start, tap.slope, tap.change)]
            first, after, moved = (number(value) for value in slopes)
            out.append(f"    {name}: slope {first} at the start, {after} after, moved {moved} ({tap.change_verdict})")
    return out


def _forecast_lines(f: Forecast, everything: bool) -> list[str]:
    bad = [(rate, *f.diverged(rate)) for rate in sorted({run.lr for run in f.runs})]
    rows = ", ".join(f"{rate:.2g}: {n} of {total}" for rate, n, total in bad if n)
    widths_ = sorted({run.width for run in f.runs})
    out = [
        f"  proxies {', '.join(map(str, widths_))} wide, {plural(len(f.runs), 'run')} of {f.steps} steps: "
        + (f"diverged at lr {rows}" if rows else f"none diverged up to lr {bad[-1][0]:.2g}")
    ]
    if not f.points:
        return [*out, f"  forecast of attention logits: none; {f.reason}"]
    here = f.points[0]
    reach = f"{f.decades:.1f} decades beyond the largest proxy" if f.decades > 0 else "within the proxies' sizes"
    text = (
        f"  forecast at {count(f.weights)} block weights, lr {here.lr:.2g}, after {f.steps} steps: largest attention "
        f"logit {_short(here.logit)} [{_short(here.low)}, {_short(here.high)}], {reach}; a left-out cell is missed by "
        f"{f.left_out_error:.2f} decades"
    )
    if f.largest_error == f.largest_error:
        text += f", the largest size by {f.largest_error:+.2f}"
    if not f.informative:
        few = f.largest_error != f.largest_error and f.decades > NEAR
        text += (
            f". {'Two sizes are too few to say anything so far away' if few else 'That is too wide to say anything'}"
        )
    out.append(text)
    if f.crossing is not None and f.informative:
        out.append(f"  forecast to pass {THRESHOLD:g} from lr {f.crossing:.2g} on, of the rates that were run")
    if everything:
        for point in f.points:
            interval = f"[{_short(point.low)}, {_short(point.high)}]"
            out.append(f"    lr {point.lr:.2g}: forecast {_short(point.logit)} {interval}")
    return out


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 1e3 else f"{value:.1e}"
