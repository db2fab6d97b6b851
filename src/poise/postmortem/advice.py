"""What to do about an event, and whose practice that is.

    odd batches, first-steps transients, gradient norms alone    nothing
    a spike that came back                                       nothing; prevention when it is one of several
    a spike at the end of the log                                wait
    what did not come back, or is not a number                   go back, except where going back cannot help:
                                                                 first steps (begin again), a restart's seam (mend the
                                                                 restart), fp16 (raise the precision, then go back)

How far back: at least ``BACK`` steps and before the first sign of the trouble; then the next ``SKIP`` steps' data are
left out. A second trouble within ``AGAIN`` steps: to before the first one, twice the data, and a lower learning rate.

Sources: PaLM (arXiv 2204.02311, section 5.1) went back about 100 steps and skipped 200 to 500 batches; GLM-130B's
training log has 50 to 140 steps and 200; each advice names its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from poise.postmortem.event import Advice, Event
from poise.postmortem.log import Log
from poise.postmortem.precursors import BATCH_SIZE
from poise.postmortem.readers.names import words
from poise.postmortem.steps import BENIGN_KINDS, SPIKE_KINDS, curve, interval, length, number, step_size

BACK: Final = 100
SKIP: Final = 200
AGAIN: Final = 1000
WAIT: Final = 100
SEVERAL: Final = 3

PALM = (
    "PaLM (arXiv 2204.02311, section 5.1): back about 100 steps, skip 200 to 500 batches; GLM-130B's training log: "
    "50 to 140 and 200"
)
OPT = (
    "OPT-175B (arXiv 2205.01068, section 2.5, and its logbook): an earlier checkpoint with a healthy loss scale, and a "
    "learning rate 10 % lower, later two thirds of GPT-3's"
)
BLOOM = "BLOOM-176B chronicles: its spike was back in about 30 steps without intervention"
MARIN = "Marin 32B report: skipped steps, update clipping and other optimizers did not stop the spikes, QK-norm did"
GRADIENTS = "Marin issue 1368: skipping steps with large gradients did not shorten any recovery"
MLPERF = (
    "390 public MLPerf v5.1 runs of Llama-3.1-8B: rises of the evaluation loss in 0 of 170 with learning rate 4e-4 "
    "and batch 16 to 32, in 33 of 60 with 8e-4 and batch 64 or more"
)
WARMUP = "BigScience 104B chronicles: the loss went from 6.4 to 14 right after warm-up"
RESUME = "ml-engineering (Bekman): data repeated after a faulty resume fake a low loss, then a step up"
FP16 = "BigScience chronicles: the 104B run in fp16 failed with a sinking loss scale, BLOOM-176B in bf16 did not"
OUTLIERS = "modded-nanogpt records: the same single-step outliers at the same steps under four optimizers, all harmless"
QK = (
    "Kimi K2 (arXiv 2507.20534): attention logits above 1000 in a test run, QK-Clip keeps them at 100; "
    "Marin 32B report: QK-norm"
)
BROKEN = "OPT-175B logbook: an unreasonably low perplexity came from a broken data set"
SWEEP = "CS336 sweep of a 17M model on TinyStories: 1e-1 and above, 100 times the best rate, does not train"
INVALID = "torchtitan pull request 3863: stop before the optimizer when the loss is not finite"


def advise(log: Log, event: Event, found: Sequence[Event]) -> Advice:
    """Return what to do about an event.

    Args:
        log: the log that it is in.
        event: with its precursors and cause.
        found: all events of the log.
    """
    if event.kind in BENIGN_KINDS:
        return _benign(event)
    if event.kind == "logit_growth":
        text = "Add QK-norm (or QK-Clip, where the attention does not allow it) before the loss follows."
        return Advice("qk_norm", text, QK)
    if event.kind == "collapse":
        text = (
            f"Do not trust this loss. Look at the data from step {event.start} on (repeated, broken, answers among the "
            "inputs) and at how the run was resumed, and filter or mend them before going on."
        )
        return Advice("filter_data", text, f"{BROKEN}; {RESUME}")
    if event.kind == "plateau":
        text = (
            "Stop and begin again with a tenth of the learning rate; if that does not learn either, look at the "
            "labels, the mask, and whether all weights get a gradient."
        )
        return Advice("lower_lr", text, SWEEP)
    if event.cause.name == "set-up":
        text = "Stop: there is nothing to go back to. Look at weights, one batch and the number format first."
        return Advice("stop", text, INVALID)
    if event.recovery in ("never", "partly"):
        return _lasting(log, event, found)
    if event.recovery == "open":
        return _lasting(log, event, found) if event.kind == "nonfinite" else _open(log, event)
    return _returned(log, event, found)


def _benign(event: Event) -> Advice:
    match event.kind:
        case "data_outlier":
            return Advice("nothing", "Nothing: one odd batch that left nothing behind.", OUTLIERS)
        case "early_transient":
            return Advice("nothing", "Nothing: the first steps settle. A longer warm-up makes this smaller.", MLPERF)
    return Advice("nothing", "Nothing: the loss did not follow the gradient norm.", GRADIENTS)


# -- what stayed ---------------------------------------------------------------------------------------


def _lasting(log: Log, event: Event, found: Sequence[Event]) -> Advice:
    if event.cause.name == "restart seam":
        return Advice(
            "check_restart",
            "Compare what the restart changed before going back: data position, optimizer state, learning rate, "
            "random seeds, number of devices; then resume from the same checkpoint.",
            RESUME,
        )
    to, before_log = _target(log, event, found)
    if event.kind == "chaotic" or before_log or _begins(log, event):
        text = (
            "Begin again with a lower learning rate (half of it, to begin with) and a longer warm-up: the trouble is "
            "as old as the run, so there is no sound checkpoint to go back to."
        )
        return Advice("lower_lr", text, MLPERF)
    hit = _earlier_hit(log, event, found)
    skip = 2 * SKIP if hit is not None else SKIP
    go = f"Go back to a checkpoint from step {to} or before ({event.start - to} steps before it began)"
    if event.cause.name == "precision" and (event.kind == "nonfinite" or event.cause.certainty == "likely"):
        text = f"{go} and go on in bf16, or with the places that overflow in fp32; the data need not be skipped."
        return Advice("raise_precision", text, FP16)
    text = f"{go} and skip the data of the next {skip} steps."
    if hit is not None:
        text += (
            f" It is the second trouble within {AGAIN} steps (the first began at step {hit.start}), so lower the "
            "learning rate by 10 to 33 % as well."
        )
        return Advice("roll_back", text, f"{PALM}; {OPT}")
    if event.kind == "slow_divergence" or event.cause.name == "too-high LR":
        text += " Lower the learning rate by 10 to 33 %: a slow climb is not the data's."
        return Advice("roll_back", text, f"{PALM}; {OPT}")
    if event.cause.name in ("attention logits", "growing norms"):
        text += " Without QK-norm it is likely to come again."
        return Advice("roll_back", text, f"{PALM}; {MARIN}")
    return Advice("roll_back", text, PALM)


def _target(log: Log, event: Event, found: Sequence[Event]) -> tuple[int, bool]:
    """Return (the step to go back to, whether that lies before the log)."""
    unit = step_size(log)
    signs = [p.step - interval(log) for p in event.precursors if not _outside(p.signal)]
    hit = _earlier_hit(log, event, found)
    if hit is not None:
        signs.append(round(hit.start - BACK * unit))
    to = round(min([event.start - BACK * unit, *signs]))
    steps, _ = curve(log)
    return to, bool(len(steps)) and to < steps[0]


def _outside(signal: str) -> bool:
    """Whether a precursor is no state of the run: a checkpoint after it may be sound."""
    return signal in ("lr", "restart", "gap") or bool(BATCH_SIZE.search(signal))


def _begins(log: Log, event: Event) -> bool:
    """Whether an event begins where the log does, in the first tenth and within 500 steps."""
    steps, _ = curve(log)
    return bool(len(steps)) and event.start - steps[0] <= min(0.1 * length(log), 500 * step_size(log))


def _earlier_hit(log: Log, event: Event, found: Sequence[Event]) -> Event | None:
    """The first other trouble that began in the ``AGAIN`` steps before this one."""
    near = [
        other
        for other in found
        if other.kind in SPIKE_KINDS
        and other.severity != "note"
        and 0 < event.start - other.start <= AGAIN * step_size(log)
    ]
    return min(near, key=lambda other: other.start, default=None)


# -- what came back ------------------------------------------------------------------------------------


def _open(log: Log, event: Event) -> Advice:
    until = round(event.start + WAIT * step_size(log))
    text = (
        f"Wait until step {until}: most spikes of large runs are over by then. Go back only if the smoothed loss is "
        "still more than 3 % above its trend there."
    )
    return Advice("wait", text, f"{BLOOM}; {PALM}")


def _returned(log: Log, event: Event, found: Sequence[Event]) -> Advice:
    if event.cause.name == "restart seam":
        text = (
            "It came back. Before the next restart check that data position, optimizer and learning rate are resumed."
        )
        return Advice("check_restart", text, RESUME)
    if event.kind == "nonfinite":
        text = "The run went on: make sure that these steps were skipped and not taken."
        return Advice("raise_precision" if event.cause.certainty == "likely" else "wait", text, INVALID)
    if event.kind == "chaotic":
        text = "The loss came back, but these steps are lost: begin with a lower learning rate or a longer warm-up."
        return Advice("lower_lr", text, MLPERF)
    spikes = [other for other in found if other.kind in SPIKE_KINDS and other.severity != "note"]
    again = _earlier_hit(log, event, found) is not None
    back = f"It came back within {max(event.end - event.peak, interval(log))} steps of its peak: do not go back."
    if len(spikes) < SEVERAL and not again:
        return Advice("wait", f"{back} Waiting was right.", BLOOM)
    number_of = f"{back} It is one of {len(spikes)} in this log. Next time: "
    if event.cause.name == "schedule":
        return Advice("longer_warmup", f"{number_of}a longer warm-up, and no jumps of the learning rate.", WARMUP)
    if event.cause.name == "too-high LR":
        rates = log.series["lr"][1] if "lr" in log.series else np.empty(0)
        peak = f" than {number(float(np.nanmax(rates)))}" if np.isfinite(rates).any() else ""
        return Advice("lower_lr", f"{number_of}a lower peak learning rate{peak}, or QK-norm at this one.", MLPERF)
    if event.cause.name == "precision":
        return Advice("raise_precision", f"{number_of}bf16 instead of fp16.", FP16)
    if _has_qk_norm(log):
        text = f"{number_of}a lower peak learning rate, or a longer warm-up; QK-norm is on already."
        return Advice("lower_lr", text, MLPERF)
    text = f"{number_of}QK-norm, then a longer warm-up or a lower peak learning rate."
    return Advice("qk_norm", text, f"{MARIN}; {MLPERF}")


def _has_qk_norm(log: Log) -> bool:
    """Whether the log's settings say that queries and keys are normalised already."""
    said = {"_".join(words(name)): value.strip().lower() for name, value in log.settings.items()}
    return any(
        re.search(r"\bqk_?(layer)?_?norm|use_qk_norm|qk_layernorm", n) and v in ("true", "1") for n, v in said.items()
    )
