"""The guard: reads a step's signals, decides before the optimizer acts, and remembers exactly.

In a trainer: ``build(config)`` once, ``decide(signals)`` every step, and the host carries out the decision.
In anybody's loop::

    guard = Guard.for_run(model, optimizer)
    for batch in loader:
        loss = model(batch)
        loss.backward()
        if guard.allows(loss):
            optimizer.step()
        optimizer.zero_grad()

With fp16 and a ``GradScaler``, pass it: ``Guard.for_run(model, optimizer, scaler=scaler)``.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from poise.core.errors import UserError
from poise.core.host import Host, Rewinder
from poise.core.types import (
    Alarm,
    Clip,
    Decision,
    Halt,
    Proceed,
    QkClip,
    ResetMoments,
    Rollback,
    Signals,
    Skip,
    Verdict,
    Watch,
)
from poise.guard.cause import Causes
from poise.guard.config import GuardConfig, Mode
from poise.guard.detectors.base import Detector, Expectant
from poise.guard.detectors.standard import ON_EVIDENCE, standard
from poise.guard.policy import ABILITIES, Policy
from poise.guard.responses.dispatch import abilities

if TYPE_CHECKING:
    from torch import nn
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer

    from poise.guard.drop_in import Loop

log = logging.getLogger("poise")

STATE_FORMAT = 2

REMIND = 20
"""Steps between two lines in the log about the same thing that goes on."""

Observer = Callable[[Signals, Decision], None]
Examine = Callable[[Signals], Mapping[str, float]]
"""Takes more readings of a step that raised an alarm; called on all ranks, before the optimizer."""


class TrainingHalted(RuntimeError):  # noqa: N818 - it says what happened; it is not an error of the program
    """Going on would do harm, and there is no host to ask for better. The message is for the user."""


class Guard:
    """Detectors, causes and a policy. Not thread-safe; one per run.

    Args:
        detectors: all of them see every step; names must be unique.
        policy: turns their alarms into one decision; ``None`` lets every step through.
        observer: told about every decision after it was made; it cannot change it.
        examine: takes more readings when something critical was seen.
        mode: see ``GuardConfig``.

    Attributes:
        measured: what was measured on alarm at the last step decided; empty where nothing was.
    """

    def __init__(
        self,
        detectors: Sequence[Detector],
        policy: Policy | None,
        observer: Observer | None = None,
        *,
        examine: Examine | None = None,
        mode: Mode = "act",
    ) -> None:
        names = [detector.name for detector in detectors]
        if len(set(names)) < len(names):
            raise UserError(f"two detectors have the same name in {names}; give each its own")
        self._detectors = tuple(detectors)
        self._policy = policy
        self._causes = Causes()
        self._observer = observer
        self._examine = examine
        self._mode = mode
        self._loop: Loop | None = None
        self._decided = 0
        self._broken: set[str] = set()
        self._said = ("", 0)
        self.measured: dict[str, float] = {}

    @classmethod
    def for_run(
        cls,
        model: nn.Module,
        optimizer: Optimizer,
        config: GuardConfig | None = None,
        host: Host | None = None,
        *,
        scaler: GradScaler | None = None,
    ) -> Guard:
        """Return a guard for a loop of one's own; ask it with ``allows``.

        Args:
            model: its gradients, weights and layers are watched. Give the wrapped one (DDP, FSDP, compiled).
            optimizer: read, never written to. One with a ``measure()`` method (``poise.optim``) lends its gradient
                norm, so that the norm is computed once.
            config: the default is calibrated for ordinary runs.
            host: who can go back to a checkpoint or lower the rate (``poise.integrations.plain`` has one). Without
                one the guard skips and clips; where that is not enough it raises ``TrainingHalted`` for NaN and
                lets a spike through with a warning.
            scaler: the loop's gradient scaler. ``allows`` unscales the gradients unless ``unscale_`` was called before;
                call ``scaler.update()`` after every step, also after one that was not allowed.
        """
        from poise.guard.drop_in import Loop, check_arguments

        check_arguments(model, optimizer)
        config = config or GuardConfig()
        guard = build(config, can=frozenset() if host is None else abilities(host))
        guard._loop = Loop(model, optimizer, host, scaler, every=config.every if config.enabled else 0)
        guard._examine = guard._loop.examine
        return guard

    def decide(self, signals: Signals) -> Decision:
        """Return what to do about this step. Call it once for every step, before the optimizer.

        The alarms that led to the decision, notes included, and the verdict on their cause are in the decision;
        nothing is recorded here.
        """
        alarms = [alarm for d in self._detectors if (alarm := self._ask(d, signals)) is not None]
        self.measured = measured = {}
        if self._examine is not None and any(alarm.severity == "critical" for alarm in alarms):
            self.measured = measured = dict(self._examine(signals))
            alarms += self._second_look(signals, measured, {alarm.detector for alarm in alarms})
        self._causes.see(signals.step, alarms)
        verdict = self._causes.name(signals, measured)
        decision = self._answer(signals, alarms, verdict)
        if isinstance(decision, QkClip | ResetMoments):
            self._expect_change(decision)
        if isinstance(decision, Proceed) and any(alarm.severity == "critical" for alarm in alarms):
            self._say(signals.step, decision)  # doing nothing is never silent
        self._decided = zlib.crc32(f"{self._decided} {signals.step} {decision.action}".encode()) & 0xFFFFFF
        if self._observer is not None:
            self._observer(signals, decision)
        return decision

    def _say(self, step: int, decision: Decision) -> None:
        """Log a decision: each new one, and one that goes on every ``REMIND`` steps."""
        action, since = self._said
        if decision.action != action or not 0 <= step - since < REMIND:
            self._said = (decision.action, step)
            log.warning("guard, step %d: %s: %s", step, decision.action, decision.reason)

    def _expect_change(self, decision: QkClip | ResetMoments) -> None:
        """Tell the detectors that weights or moments of some places are about to be set on purpose."""
        for detector in self._detectors:
            if isinstance(detector, Expectant) and (detector.name == "weight_jump") == isinstance(decision, QkClip):
                detector.expect_change(decision.places)

    def _second_look(self, signals: Signals, measured: Mapping[str, float], told: Set[str]) -> list[Alarm]:
        """Let the detectors that look at weights and layers judge what was measured on alarm."""
        fresh = {name: value for name, value in measured.items() if "@" in name and name not in signals.extra}
        if not fresh:
            return []
        again = dataclasses.replace(signals, extra={**signals.extra, **fresh})
        quiet = [d for d in self._detectors if d.name in ON_EVIDENCE and d.name not in told]
        return [alarm for d in quiet if (alarm := self._ask(d, again)) is not None]

    def _ask(self, detector: Detector, signals: Signals) -> Alarm | None:
        """Ask a detector; one that fails is left out from then on, for it must not end somebody's run."""
        if detector.name in self._broken:
            return None
        try:
            return detector.update(signals)
        except Exception:
            self._broken.add(detector.name)
            log.exception("guard: detector %s failed and is not asked again", detector.name)
            return None

    def _answer(self, signals: Signals, alarms: Sequence[Alarm], verdict: Verdict | None) -> Decision:
        if self._policy is None:
            return Proceed()
        decision = self._policy.decide(signals, alarms, verdict)
        if verdict is not None:
            decision = dataclasses.replace(decision, verdict=verdict)
        if self._mode == "act" or isinstance(decision, Proceed):
            return decision
        fatal = any(alarm.kind == "nonfinite" for alarm in alarms)
        if self._mode == "halt" and (fatal or not isinstance(decision, Skip | Clip)):
            reason = f"halted at step {signals.step}, as guard.mode = halt asks: {decision.reason}"
            return Halt(reason=reason, alarms=decision.alarms, verdict=verdict)
        how = "observing" if self._mode == "observe" else "guard.mode = halt repairs nothing"
        reason = f"{how}; would {decision.action.replace('_', ' ')}: {decision.reason}"
        return Watch(would=decision, reason=reason, alarms=decision.alarms, verdict=verdict)

    @property
    def step(self) -> int:
        """Number of the last step that ``allows`` was asked about."""
        return 0 if self._loop is None else self._loop.step

    def close(self) -> None:
        """Take the hooks off the model; the guard must not be asked again."""
        if self._loop is not None:
            self._loop.close()

    @property
    def token(self) -> int:
        """A number that is the same on all ranks as long as all have decided the same, below 2**24."""
        return self._decided

    def allows(self, loss: Any) -> bool:
        """Whether to call ``optimizer.step()`` now. Ask once a step, after ``backward`` and before clipping.

        Waits for the device once. Under ``torch.distributed`` every rank asks and all get the same answer.

        Args:
            loss: a tensor (its mean counts), a number, or an output with a ``loss``; with ``None`` the gradients alone
                are judged.

        Raises:
            TrainingHalted: skipping is not enough and nobody can go back to a checkpoint.
            UserError: the guard was not made by ``for_run``, or no loss can be read.
        """
        if self._loop is None:
            raise UserError("allows() needs to know the model; make the guard with Guard.for_run(model, optimizer)")
        if self._policy is None:
            return True
        decision = self.decide(self._loop.read(loss, self._decided))
        match decision:
            case Proceed():
                if not any(alarm.severity == "critical" for alarm in decision.alarms):
                    self._loop.accept()
                return True
            case Clip(max_norm=max_norm):
                self._say(self._loop.step, decision)
                self._loop.clip(max_norm)
                return True
            case Skip():
                self._say(self._loop.step, decision)
                return False
            case Rollback() | Halt() if self._loop.host is None:
                raise TrainingHalted(decision.reason)
            case other:
                log.warning("guard, step %d: %s: %s", self._loop.step, other.action, other.reason)
                self._loop.carry_out(other)
                return False

    def investigate(
        self,
        event_step: int,
        host: Rewinder,
        *,
        observed: Sequence[tuple[int, float]],
        level: float,
        grad_norms: Sequence[tuple[int, float]] = (),
        samples: tuple[int, int] | None = None,
        deterministic: bool = True,
    ) -> Verdict:
        """Find by experiment what caused the trouble at ``event_step``: see ``poise.guard.investigate``.

        Args:
            event_step: the step at which the trouble showed.
            host: who can go back, train again on the side, and come back. All ranks call this together.
            observed: (step, loss) as they were recorded.
            level: the loss that a healthy step would have had, in nats; a spike is more than half of what
                was recorded above it.
            grad_norms: (step, gradient norm) as they were recorded.
            samples: first and last sample of the event's step.
            deterministic: whether the same work gives the same bits on this machine.
        """
        from poise.guard.investigate import investigate

        recorded = [loss for step, loss in observed if step == event_step and loss > level]
        bar = level + 0.5 * (min(recorded) - level) if recorded else 1.5 * level
        return investigate(
            event_step,
            host,
            observed=observed,
            level=bar,
            grad_norms=grad_norms,
            samples=samples,
            deterministic=deterministic,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything the guard remembers, JSON-able and exact. Call it between two steps."""
        return {
            "format": STATE_FORMAT,
            "detectors": {detector.name: detector.state_dict() for detector in self._detectors},
            "policy": None if self._policy is None else self._policy.state_dict(),
            "causes": self._causes.state_dict(),
            "decided": self._decided,
            "loop": None if self._loop is None else self._loop.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], keep_policy: bool = False) -> None:
        """Take over what ``state_dict`` returned. A detector that the state does not know starts afresh.

        Args:
            state: from ``state_dict``.
            keep_policy: true after a rollback: the detectors' windows go back with the weights, while the
                policy remembers what it has tried, so that a run cannot go round in circles.

        Raises:
            UserError: the state is not one of a guard, or of another format.
        """
        if state.get("format") != STATE_FORMAT:
            raise UserError(
                f"guard state has format {state.get('format')!r}, this version reads {STATE_FORMAT}; "
                "resume with the version of poise that saved it"
            )
        for detector in self._detectors:
            if detector.name in state["detectors"]:
                detector.load_state_dict(state["detectors"][detector.name])
        self._causes.load_state_dict(state["causes"])
        if not keep_policy:
            self._decided = state["decided"]
            if self._policy is not None and state["policy"] is not None:
                self._policy.load_state_dict(state["policy"])
        if self._loop is not None and state["loop"] is not None:
            self._loop.load_state_dict(state["loop"])
            self.resumed(self._loop.step)

    def resumed(self, step: int) -> None:
        """Say that the run was taken up again after ``step`` steps: a seam explains what comes soon after it."""
        self._causes.resumed(step)
        if self._policy is not None:
            self._policy.resumed(step)


def build(
    config: GuardConfig,
    checkpoint: Callable[[int], int | None] | None = None,
    observer: Observer | None = None,
    *,
    can: frozenset[str] = ABILITIES,
    examine: Examine | None = None,
) -> Guard:
    """Return the guard that ``config`` describes.

    Args:
        config: settings; ``enabled = False`` gives a guard that always answers ``Proceed``.
        checkpoint: the newest step of a verified checkpoint that is at most its argument, or ``None``; without it
            the host is asked when the time comes.
        observer: told about every decision.
        can: what the host can be asked for.
        examine: takes more readings when something critical was seen.
    """
    if not config.enabled:
        return Guard((), None, observer)
    policy = Policy(config.policy, checkpoint, can, observing=config.mode != "act")
    return Guard(standard(config.alarms_per_10k), policy, observer, examine=examine, mode=config.mode)
