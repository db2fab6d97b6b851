"""What to do about an event, and whose practice that is.

    odd batches, first-steps transients, gradient norms alone    nothing
    a spike that came back                                       nothing; prevention when it is one of several, and
                                                                 what others would have done where it took long
    a spike at the end of the log                                wait; that of its NaN where it ends in one
    what did not come back, or is not a number                   go back, except where going back cannot help:
                                                                 first steps (begin again), a restart's seam (mend the
                                                                 restart), fp16 (raise the precision, then go back),
                                                                 the schedule (wait, or change it), values that are
                                                                 not finite in the first steps or every k-th only

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

from poise.dashboard.text import plural
from poise.postmortem.event import Advice, Event
from poise.postmortem.known import BATCH_SIZE, SEQUENCE, Known
from poise.postmortem.log import Log
from poise.postmortem.nonfinite import NEAR
from poise.postmortem.readers.names import words
from poise.postmortem.steps import benign, number, of_loss

BACK: Final = 100
SKIP: Final = 200
AGAIN: Final = 1000
WAIT: Final = 100
SEVERAL: Final = 3
QUICK: Final = 200
"""Steps within which waiting is what large runs did; after them going back ``BACK`` steps had cost less."""

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
PALM_DATA = "PaLM (arXiv 2204.02311, section 5.1): the batches of a spike gave none from another checkpoint"
REWARM = "Gupta et al. (arXiv 2308.04014): the loss rises while the learning rate is warmed up again, and then falls"
EPOCHS = "fast.ai, Can LLMs learn from a single example (2023): the training loss falls in a step at each new epoch"
UNSOURCED = "no published practice known: it follows from what the log shows"
_EPOCH = (
    "Compare with the validation loss: if that does not fall as well, the model learns the data by heart. Then fewer "
    "epochs, more data, or more regularisation (weight decay, dropout)."
)
INVALID = "torchtitan pull request 3863: stop before the optimizer when the loss is not finite"


def advise(log: Log, event: Event, found: Sequence[Event], known: Known | None = None) -> Advice:
    """Return what to do about an event.

    Args:
        log: the log that it is in.
        event: with its precursors and cause.
        found: all events of the log, with their causes.
        known: ``Known(log, found)``, where there are several events.
    """
    known = Known(log, found) if known is None else known
    if event.cause.name == "epoch boundary":
        return Advice("filter_data", _EPOCH, EPOCHS)
    if benign(event):
        return _benign(event)
    if event.kind in ("logit_growth", "collapse", "plateau"):
        return _by_kind(event)
    if event.cause.name in ("set-up", "start-up", "periodic"):
        return _not_trained(event)
    lost = _lost_after(known, event)
    if lost is not None:
        return advise(log, lost, found, known)
    if event.recovery in ("never", "partly"):
        return _lasting(known, event)
    if event.recovery == "open":
        return _lasting(known, event) if event.kind == "nonfinite" else _open(known, event)
    return _returned(known, event)


def _benign(event: Event) -> Advice:
    match event.kind:
        case "data_outlier" if event.cause.name == "unknown" and event.cause.evidence:
            text = "Nothing: one step stood out and left nothing behind. The batch alone is not what made it stand out."
            return Advice("nothing", text, PALM_DATA)
        case "data_outlier":
            return Advice("nothing", "Nothing: one odd batch that left nothing behind.", OUTLIERS)
        case "early_transient":
            return Advice("nothing", "Nothing: the first steps settle. A longer warm-up makes this smaller.", MLPERF)
        case "grad_spike":
            return Advice("nothing", "Nothing: the loss did not follow the gradient norm.", GRADIENTS)
    return Advice("nothing", "Nothing: this is a remark only, and needs no reaction.", UNSOURCED)


def _by_kind(event: Event) -> Advice:
    if event.kind == "logit_growth":
        text = "Add QK-norm (or QK-Clip, where the attention does not allow it) before the loss follows."
        return Advice("qk_norm", text, QK)
    if event.kind == "collapse":
        text = (
            f"Do not trust this loss. Look at the data from step {event.start} on (repeated, broken, answers among the "
            "inputs) and at how the run was resumed, and filter or mend them before going on."
        )
        return Advice("filter_data", text, f"{BROKEN}; {RESUME}")
    text = (
        "Stop and begin again with a tenth of the learning rate; if that does not learn either, look at the "
        "labels, the mask, and whether all weights get a gradient."
    )
    return Advice("lower_lr", text, SWEEP)


def _not_trained(event: Event) -> Advice:
    """For values that say nothing of the training's course: none at all, the first ones only, every k-th."""
    if event.cause.name == "set-up":
        text = "Stop: there is nothing to go back to. Look at weights, one batch and the number format first."
        return Advice("stop", text, INVALID)
    if event.cause.name == "start-up":
        text = (
            "Nothing to go back for: the run trains. Look at what is logged in the first steps, and, in fp16, at the "
            "loss scale that it begins with: steps that overflow must be skipped."
        )
        return Advice("nothing", text, INVALID)
    every = re.search(r"every (\d+\w\w) step", " ".join(event.cause.evidence))
    step = f"every {every[1]} step" if every else "these steps"
    text = (
        f"Do not go back: the values between are finite. Look at what is done at {step} only: that batch, an "
        "evaluation, what is logged. If the steps were trained on, make sure that they were skipped."
    )
    return Advice("filter_data", text, UNSOURCED)


# -- what stayed ---------------------------------------------------------------------------------------


def _lost_after(known: Known, event: Event) -> Event | None:
    """Return the stretch without a finite loss that a spike ended in, if it did."""
    if event.kind == "nonfinite" or event.recovery == "returned" or not of_loss(event):
        return None
    reach = max(NEAR * known.unit, 3 * known.interval)
    for other in known.nonfinite:
        own = other.cause.name in ("set-up", "start-up", "periodic")
        if other.recovery != "returned" and not own and event.start < other.start <= event.end + reach:
            return other
    return None


def _lasting(known: Known, event: Event) -> Advice:
    if event.cause.name == "restart seam":
        return Advice(
            "check_restart",
            "Compare what the restart changed before going back: data position, optimizer state, learning rate, "
            "random seeds, number of devices; then resume from the same checkpoint.",
            RESUME,
        )
    to = _target(known, event)
    before_log = known.first is not None and to < known.first
    if event.kind == "chaotic" or before_log or _begins(known, event):
        text = (
            "Begin again with a lower learning rate (half of it, to begin with) and a longer warm-up: the trouble is "
            "as old as the run, so there is no sound checkpoint to go back to."
        )
        return Advice("lower_lr", text, MLPERF)
    if event.cause.name == "schedule":
        return _scheduled(known, event, to)
    hit = _earlier_hit(known, event)
    if hit is not None and event.kind == "nonfinite" and _lost_after(known, hit) is event:
        hit = _earlier_hit(known, hit)  # the spike that ended in it is the same trouble
    skip = 2 * SKIP if hit is not None else SKIP
    go = f"Go back to a checkpoint from step {to} or before ({plural(event.start - to, 'step')} before it began)"
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


def _scheduled(known: Known, event: Event, to: int) -> Advice:
    """For what the schedule did: other data do not help, because the schedule does the same again."""
    why = "the schedule does the same again, whatever the data"
    sizes = [p for p in event.precursors if _is_size(p.signal)]
    what = "batch size or the sequence length" if sizes else "learning rate"
    if event.kind in ("slow_divergence", "nonfinite"):
        text = (
            f"Skipping data cannot help: {why}. Change the schedule first: a smaller step of the {what}, or a lower "
            f"learning rate after it; then go on from a checkpoint from step {to} or before."
        )
        return Advice("lower_lr", text, f"{REWARM}; {UNSOURCED}")
    if sizes and not any(p.signal == "lr" and p.step in known.raised for p in event.precursors):
        text = (
            f"Expected from the schedule: a change of the {what} moves the loss. Wait; going back cannot help, because "
            f"{why}. If the step is too large, change it in smaller steps."
        )
        return Advice("wait", text, UNSOURCED)
    text = (
        f"Expected from the schedule: with a higher learning rate the loss is higher until that falls. Wait; going "
        f"back cannot help, because {why}. If it is too much, make the jump smaller or warm up to it again."
    )
    return Advice("wait", text, f"{REWARM}; {UNSOURCED}")


def _target(known: Known, event: Event) -> int:
    """Return the step to go back to."""
    signs = [p.step - known.interval for p in event.precursors if not _outside(p.signal)]
    hit = _earlier_hit(known, event)
    if hit is not None:
        signs.append(round(hit.start - BACK * known.unit))
    return round(min([event.start - BACK * known.unit, *signs]))


def _outside(signal: str) -> bool:
    """Whether a precursor is no state of the run: a checkpoint after it may be sound."""
    return signal in ("lr", "restart", "gap") or _is_size(signal)


def _is_size(signal: str) -> bool:
    spoken = " ".join(words(signal))
    return bool(BATCH_SIZE.search(spoken) or SEQUENCE.search(spoken))


def _begins(known: Known, event: Event) -> bool:
    """Whether an event begins where the log does, in the first tenth and within 500 steps."""
    return known.first is not None and event.start - known.first <= min(0.1 * known.length, 500 * known.unit)


def _earlier_hit(known: Known, event: Event) -> Event | None:
    """The first other trouble that began in the ``AGAIN`` steps before this one."""
    first = int(np.searchsorted(known.starts, event.start - AGAIN * known.unit))
    near = known.troubles[first : first + 1]
    return near[0] if near and near[0].start < event.start else None


# -- what came back ------------------------------------------------------------------------------------


def _open(known: Known, event: Event) -> Advice:
    last = event.end if known.last is None else known.last
    goes = "Go back only if the smoothed loss is still more than 3 % above its trend there."
    until = round(event.start + WAIT * known.unit)
    if until > last:
        text = f"Wait until step {until}: most spikes of large runs are over by then. {goes}"
        return Advice("wait", text, f"{BLOOM}; {PALM}")
    until = round(event.end + WAIT * known.unit)
    if until > last:
        text = f"Look again at step {until}: the log ends at step {last}, too soon after it to tell. {goes}"
        return Advice("wait", text, f"{BLOOM}; {PALM}")
    text = (
        f"Whether it came back cannot be told, although the log goes on to step {last}: compare the loss after step "
        f"{event.end} with what it was before step {event.start}, on a validation set if there is one."
    )
    return Advice("nothing", text, UNSOURCED)


def _returned(known: Known, event: Event) -> Advice:
    log = known.log
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
    again = _earlier_hit(known, event) is not None
    long = event.end - event.start > QUICK * known.unit
    if event.cause.name == "schedule" and (long or (len(known.troubles) < SEVERAL and not again)):
        text = "Expected from the schedule, and it came back. Next time: a smaller jump, or a longer warm-up to it."
        return Advice("wait", text, f"{REWARM}; {UNSOURCED}")
    took = plural(max(event.end - event.peak, known.interval), "step")
    back = f"It came back within {took} of its peak: do not go back."
    if long:
        back = f"It came back by itself, {plural(event.end - event.start, 'step')} after it began: leave it."
    if len(known.troubles) < SEVERAL and not again:
        if not long:
            return Advice("wait", f"{back} Waiting was right.", BLOOM)
        if event.cause.name not in ("unknown", "optimizer", "data", "attention logits", "growing norms"):
            return Advice("wait", back, BLOOM)
        text = (
            f"{back} Next time: if the loss has not turned {BACK} steps after it left its trend, a checkpoint from "
            f"about {BACK} steps before it and other data cost less than waiting did."
        )
        return Advice("wait", text, PALM)
    number_of = f"{back} It is one of {len(known.troubles)} in this log. Next time: "
    if event.cause.name == "schedule":
        return Advice("longer_warmup", f"{number_of}a longer warm-up, and no jumps of the learning rate.", WARMUP)
    if event.cause.name == "too-high LR":
        peak = f" than {number(known.rates.peak)}" if known.rates is not None else ""
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
