"""Carry out a decision through the host: the one place where decisions meet a training loop."""

from __future__ import annotations

import logging

from poise.core.errors import UserError
from poise.core.host import Curator, Host, Mender
from poise.core.types import (
    Decision,
    DropData,
    Halt,
    LowerLr,
    QkClip,
    RaisePrecision,
    ResetMoments,
    Rollback,
)

log = logging.getLogger("poise")

REWARM_FROM = 0.1
"""Share of the learning rate from which it climbs back after the moments were reset."""


def abilities(host: Host) -> frozenset[str]:
    """Return what ``host`` can be asked for; a host says what it cannot do in ``cannot``, a set of names."""
    can = {"rollback", "lower_lr", "reset_moments"} | (
        {"qk_clip", "raise_precision"} if isinstance(host, Mender) else set()
    )
    return frozenset(can) - frozenset(getattr(host, "cannot", ()))


def carry_out(decision: Decision, host: Host) -> int | None:
    """Ask ``host`` for what ``decision`` wants; return the step a rollback went to, else ``None``.

    ``Proceed``, ``Clip`` and ``Skip`` are about calling the optimizer, which the loop does itself: nothing is
    asked of the host. If a rollback finds no checkpoint, a run with a non-finite reading is halted, and any
    other goes on with a warning in the log; the guard sees from the next step's number that nothing was
    restored.
    """
    match decision:
        case Rollback():
            return _roll_back(decision, host)
        case LowerLr(factor=factor, rewarm=rewarm):
            host.scale_lr(factor, rewarm)
        case ResetMoments(places=places, rewarm=rewarm):
            host.reset_moments(places)
            if rewarm:
                host.scale_lr(REWARM_FROM, rewarm)
        case QkClip(places=places, threshold=threshold) if isinstance(host, Mender):
            _try(lambda: host.qk_clip(places, threshold), "clip the attention weights")
        case RaisePrecision(places=places) if isinstance(host, Mender):
            _try(lambda: host.raise_precision(places), "raise the precision")
        case DropData(first=first, last=last, documents=documents):
            if first <= last:
                host.drop_data(first, last)
            if documents and isinstance(host, Curator):
                _try(lambda: host.drop_documents(documents), "drop documents")
            elif documents:
                log.warning("guard wanted to drop %d documents, which this loop cannot do", len(documents))
        case Halt(reason=reason):
            host.halt(reason)
        case QkClip() | RaisePrecision():
            log.warning("guard wanted to %s, which this loop cannot do", decision.action.replace("_", " "))
        case _:
            pass
    return None


def _roll_back(decision: Rollback, host: Host) -> int | None:
    try:
        restored = host.rollback(decision.at_most, decision.drop_data)
    except UserError as error:
        if any(alarm.kind == "nonfinite" for alarm in decision.alarms):
            host.halt(f"{decision.reason}; but {error}")
        else:
            log.warning("guard wanted to go back to step %d or earlier, but %s", decision.at_most, error)
        return None
    if decision.lr_factor != 1.0:
        host.scale_lr(decision.lr_factor)
    return restored


def _try(mend: object, what: str) -> None:
    assert callable(mend)
    try:
        mend()
    except UserError as error:
        log.warning("guard wanted to %s, but %s", what, error)
