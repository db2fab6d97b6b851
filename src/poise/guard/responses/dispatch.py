"""Carry out a decision through the host: the one place where decisions meet a training loop."""

from __future__ import annotations

import logging

from poise.core.errors import UserError
from poise.core.host import Host
from poise.core.types import Decision, DropData, Halt, LowerLr, ResetMoments, Rollback

log = logging.getLogger("poise")


def carry_out(decision: Decision, host: Host) -> int | None:
    """Ask ``host`` for what ``decision`` wants; return the step a rollback went to, else ``None``.

    ``Proceed``, ``Clip`` and ``Skip`` are about calling the optimizer, which the loop does itself: nothing is
    asked of the host. If a rollback finds no checkpoint, a run with a non-finite reading is halted, and any
    other goes on with a warning in the log; the guard sees from the next step's number that nothing was
    restored.
    """
    match decision:
        case Rollback(at_most=at_most, drop_data=drop_data):
            try:
                return host.rollback(at_most, drop_data)
            except UserError as error:
                if any(alarm.kind == "nonfinite" for alarm in decision.alarms):
                    host.halt(f"{decision.reason}; but {error}")
                else:
                    log.warning("guard wanted to go back to step %d or earlier, but %s", at_most, error)
        case LowerLr(factor=factor):
            host.scale_lr(factor)
        case ResetMoments():
            host.reset_moments()
        case DropData(first=first, last=last):
            host.drop_data(first, last)
        case Halt(reason=reason):
            host.halt(reason)
        case _:
            pass
    return None
