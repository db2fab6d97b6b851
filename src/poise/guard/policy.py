"""From alarms to a decision: patience, cool-down, budget and escalation.

What is seen, in the order in which it is looked at, and what is done:

    loss or gradient not finite       Skip; after ``skip_patience`` in a row Rollback, one further, then Halt
    a rate ten times its course       Skip; if it stays LowerLr, taken back when the jump is over
    every step replaces the weights   LowerLr; in a young run Rollback to its start with the lower rate
    batch that was just trained on    Skip
    weights changed, not by a step    Rollback to before it
    attention logits run away         QkClip of that layer; if they come straight back, Rollback with half the rate
    second moment does not fit        ResetMoments of that layer
    loss spike, batch to blame        Skip where its gradient is odd as well, or from the second in a row on
    loss spike, gradient odd          Clip: the step is taken at its usual length
    loss spike, anything else         Watch: most recover by themselves within some 40 to 80 steps
    the rate jumped, and then this    Rollback (else LowerLr) with the rate it had before
    still up after ``watch_steps``    Rollback, ResetMoments, LowerLr: each once, the likeliest for the cause first
    odd for one step, then gone       nothing

Waiting is preferred as long as the loss is on its way down and would be back sooner than a rollback would make
up for. Every action is judged after ``check_steps``; one that did not help is not done again for this trouble.
After a rollback the same trouble within ``cool_down`` steps goes to the checkpoint before, with half the rate.
A host that cannot do a thing is not asked for it. What is left when nothing is left: not finite halts, and a
spike is let through, loudly.

Sources: waiting, rollback distance and time scales: PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1),
BLOOM and GLM-130B chronicles; QK-Clip: Kimi K2 (arXiv 2507.20534); moment reset: SPAM (arXiv 2501.06842).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from poise.core.types import (
    Alarm,
    Clip,
    Decision,
    Halt,
    LowerLr,
    Proceed,
    QkClip,
    RaisePrecision,
    ResetMoments,
    Rollback,
    Signals,
    Skip,
    Verdict,
    Watch,
)
from poise.guard.episode import Episode
from poise.guard.ladder import ORDER, advice
from poise.guard.ledger import MAX_TRIES, Ledger, PolicyConfig, count
from poise.guard.now import LOSS_KINDS, Now
from poise.guard.rate import Rate

ABILITIES = frozenset({"rollback", "lower_lr", "reset_moments", "qk_clip", "raise_precision"})
"""What a host may be asked for."""

HALF = 0.5
CHAOS_FACTOR = 0.1
"""Share of the learning rate to go on with where the loss was chaotic: the rate was far off, not a little."""

MAX_CLIPS = 5
"""QK-clips of one layer within a cool-down while the loss is sound; what grows on is clipped again."""

BLIND_SKIPS = 2
"""Odd steps in a row that are skipped when nobody can tell an odd batch from odd weights."""

ODD_IN_A_ROW = 2
"""One odd batch is left alone; so many in a row, with sound weights, are bad data and are left out."""

EARLY = 0.4
"""Share of ``watch_steps`` that even a loss which looks hopeless is watched first: most spikes have turned by then."""

FOLLOWS = 100
"""Steps after a jump of the learning rate in which a trouble of the loss is its work."""


class Policy:
    """Turns the alarms of each step into one decision.

    Args:
        config: patience, cool-down and budgets.
        checkpoint: newest step of a verified checkpoint that is at most its argument, or ``None``. Without it the
            host is asked when the time comes: a host that could not go back is known by the next step's number.
        can: what the host can do, out of ``ABILITIES``.
        observing: nothing is carried out, so one advice for a trouble is enough.
    """

    def __init__(
        self,
        config: PolicyConfig,
        checkpoint: Callable[[int], int | None] | None = None,
        can: frozenset[str] = ABILITIES,
        *,
        observing: bool = False,
    ) -> None:
        self.config = config
        self.can = can
        self._checkpoint = checkpoint
        self._observing = observing
        self._ledger = Ledger()
        self._rate = Rate()
        self._episode: Episode | None = None

    def resumed(self, step: int) -> None:
        """The run was taken up again after ``step`` steps: a new rate right then is what somebody wanted."""
        self._rate.seam = step

    def decide(self, signals: Signals, alarms: Sequence[Alarm], verdict: Verdict | None = None) -> Decision:
        """Return what to do about a step, given the alarms it raised. Call it once for every step."""
        now = Now(signals, tuple(alarms), verdict)
        self._ledger.done += 1
        if self._ledger.learn_outcome(now.step):
            self._episode = None
        back = self._rate.see(now.step, signals.lr, now.alarms)
        if back is not None:
            why = "the learning rate fell: its jump is over, so the cut that answered it is taken back"
            return LowerLr(factor=back, reason=why, alarms=now.alarms)
        self._ledger.see_loss(signals.loss, flagged=now.find("nonfinite", *LOSS_KINDS) is not None)
        news = [self._end_cool_down(now.step), self._end_streak(now)]
        for answer in self._answers(now):
            decision = answer(now)
            if decision is not None:
                return decision
        return Proceed(reason="; ".join(r for r in [*news, now.messages] if r), alarms=now.alarms)

    def _answers(self, now: Now) -> tuple[Callable[[Now], Decision | None], ...]:
        """The lines of the table in their order."""
        weights = (self._damaged, self._runaway)
        if now.find(*LOSS_KINDS) is None and self._episode is None:
            weights = (self._runaway, self._damaged)  # nothing is lost yet: the milder answer first
        rest = (self._stale, self._loss)
        return (self._nonfinite, self._wild_rate, self._too_large, self._repeated, *weights, *rest)

    # -- one line of the table each --------------------------------------------------------------------

    def _nonfinite(self, now: Now) -> Decision | None:
        alarm, ledger, config = now.find("nonfinite"), self._ledger, self.config
        if alarm is None:
            return None
        scale = now.signals.extra.get("loss_scale", 1.0)
        if scale > 1.0 and math.isfinite(now.signals.loss):
            return Skip(reason=f"{alarm.message} under loss scale {scale:g}: the scaler lowers it", alarms=now.alarms)
        ledger.streak += 1
        if ledger.onset is None:
            ledger.onset = now.step
        if ledger.streak <= config.skip_patience:
            if ledger.skips_left(config) <= 0:
                often = f"{config.max_skips} steps were skipped within {config.budget_steps}"
                return self._halt(now, alarm.message, ledger.onset, often)
            row = f"({ledger.streak} in a row, patience {config.skip_patience})"
            return self._skip(now, f"{alarm.message}; skipped {row}")
        place = "" if now.verdict is None else now.verdict.place
        # bf16 has the range of fp32; only fp16, which comes with a loss scale, overflows in one place
        overflow = place and math.isfinite(now.signals.loss) and "loss_scale" in now.signals.extra
        if (
            overflow
            and "raise_precision" in self.can
            and ledger.last_mend(alarm, now.step, config.budget_steps, place) is None
        ):
            ledger.note_mend(alarm, now.step, place)
            why = f"{alarm.message}; only the gradient of {place} leaves its range, so it is computed in fp32"
            return RaisePrecision(places=(place,), reason=why, alarms=now.alarms)
        return self._go_back(now, ledger.onset, alarm.message, fatal=True)

    def _wild_rate(self, now: Now) -> Decision | None:
        lr, rate = now.signals.lr, self._rate
        if not rate.wild(now.step, lr):
            return None
        began, before, after = int(rate.jump[0]), rate.jump[1], rate.jump[2]
        why = f"the learning rate went from {before:.3g} to {after:.3g} at step {began}"
        if now.step - began < self.config.skip_patience and self._ledger.skips_left(self.config) > 0:
            return self._skip(now, f"{why}: no step is taken with it")
        if "lower_lr" not in self.can:
            return Watch(reason=f"{why}, and nobody can lower it here", alarms=now.alarms)
        return LowerLr(factor=rate.cut_back(lr), reason=f"{why} and stays; cut back", alarms=now.alarms)

    def _too_large(self, now: Now) -> Decision | None:
        alarm = now.find("large_updates")
        if alarm is None or "lower_lr" not in self.can:
            return None
        factor = min(max(alarm.expected / alarm.value, CHAOS_FACTOR**2), HALF)
        if now.step <= self.config.watch_steps and self._target(1) is not None:  # so young that a new start is cheap
            return self._go_back(now, 1, alarm.message, fatal=False, lr_factor=factor)
        return LowerLr(factor=factor, reason=alarm.message, alarms=now.alarms)

    def _repeated(self, now: Now) -> Decision | None:
        alarm = now.find("repeated_data")
        if alarm is None:
            return None
        if self._ledger.skips_left(self.config) <= 0:
            return Watch(reason=f"{alarm.message}; no skip is left in the budget", alarms=now.alarms)
        return self._skip(now, f"{alarm.message}; not trained on again", again=True)

    def _damaged(self, now: Now) -> Decision | None:
        alarm, ledger = now.find("weight_jump"), self._ledger
        if alarm is None or now.cause in ("schedule", "architecture"):
            return None  # a wrong rate moves weights far, and what scales queries and keys shows as logits
        before = ledger.last_mend(alarm, now.step, self.config.cool_down)
        times = 0 if before is None else before[2]
        if times >= MAX_TRIES:
            return None
        ledger.note_mend(alarm, now.step)
        small = 0.5 < alarm.value / alarm.expected < 2.0 if alarm.expected > 0 else False
        if small and times == 0 and self._episode is None and now.find(*LOSS_KINDS) is None:
            return Watch(reason=f"{alarm.message}; the loss is sound, so it is watched", alarms=now.alarms)
        onset = max(now.step - self.config.measured_every, 1)
        if self._episode is not None:
            onset = min(onset, self._episode.onset)
        return self._go_back(now, onset, alarm.message, fatal=False)

    def _runaway(self, now: Now) -> Decision | None:
        alarm, ledger, config = now.find("logit_growth"), self._ledger, self.config
        if alarm is None:
            return None
        before = ledger.last_mend(alarm, now.step, config.cool_down)
        lost = self._episode is not None or now.find(*LOSS_KINDS) is not None
        useless = before is not None and alarm.value >= before[1] and (lost or before[2] >= MAX_CLIPS)
        if not useless and "qk_clip" in self.can:
            ledger.note_mend(alarm, now.step)
            healthy = 2.0 * alarm.expected if math.isfinite(alarm.expected) else config.qk_threshold
            threshold = min(max(healthy, 10.0), config.qk_threshold)
            places = tuple(dict.fromkeys(a.place for a in now.alarms if a.kind == "logit_growth" and a.place))
            return QkClip(places=places, threshold=threshold, reason=alarm.message, alarms=now.alarms)
        if ledger.last_mend(alarm, now.step, config.cool_down, "again ") is not None:
            return None
        ledger.note_mend(alarm, now.step, "again ")
        if useless:
            onset = max(now.step - 2 * config.measured_every, 1)
            why = f"{alarm.message}; a QK-clip did not help"
            return self._go_back(now, onset, why, fatal=False, lr_factor=HALF)
        why = "nobody can clip its weights here; use QK-norm or a lower learning rate"
        return Watch(reason=f"{alarm.message}; {why}", alarms=now.alarms)

    def _stale(self, now: Now) -> Decision | None:
        alarm, ledger = now.find("stale_moment"), self._ledger
        if alarm is None or "reset_moments" not in self.can:
            return None
        if ledger.last_mend(alarm, now.step, self.config.cool_down) is not None:
            return None
        ledger.note_mend(alarm, now.step)
        places = (alarm.place,) if alarm.place else ()
        return ResetMoments(places=places, reason=alarm.message, alarms=now.alarms)

    # -- the loss --------------------------------------------------------------------------------------

    def _loss(self, now: Now) -> Decision | None:
        alarm = now.find(*LOSS_KINDS)
        if self._episode is not None and now.step < self._episode.onset:
            self._episode = None  # somebody else went back
        if self._episode is None:
            if alarm is None:
                return None
            level = alarm.expected if math.isfinite(alarm.expected) and alarm.expected > 0 else now.signals.loss
            self._episode = Episode(onset=now.step, level=self._ledger.level(level))
        episode = self._episode
        episode.see(now.step, now.signals.loss, flagged=alarm is not None)
        if episode.over(self.config.lasting):
            self._episode = None
            done = f"after {episode.acted[-1].replace('_', ' ')}" if episode.acted else "nothing had to be done"
            after = f"{now.step - episode.onset} steps after step {episode.onset}"
            return Proceed(reason=f"the loss is back {after}; {done}", alarms=now.alarms)
        as_odd = episode.odd > 0 and now.signals.loss > 0.5 * (episode.level + episode.odd)
        if alarm is None and as_odd and self._ledger.skips_left(self.config) > 0:
            return self._skip(now, f"loss {now.signals.loss:.4g}: as odd as the batch before it", again=True)
        due = self._action_due(now, episode)
        if due:
            return self._act(now, episode, due)
        return None if alarm is None else self._bear(now, episode, alarm)

    def _bear(self, now: Now, episode: Episode, alarm: Alarm) -> Decision:
        """Answer one flagged step while waiting: keep an odd gradient out or small, otherwise just watch."""
        odd, sound = now.odd_gradient, now.verdict is not None and now.verdict.weights == "sound"
        if sound and episode.flagged >= ODD_IN_A_ROW and self._ledger.skips_left(self.config) > 0:
            episode.odd = now.signals.loss
            reason = f"{alarm.message}; odd batch {episode.flagged} in a row for sound weights"
            return self._skip(now, reason, again=True)
        if odd is not None and self._ledger.skips_left(self.config) > 0:
            if sound:
                return self._skip(now, f"{alarm.message}; the weights are sound, so the batch is left out", again=True)
            if not now.told_apart and episode.flagged <= BLIND_SKIPS:
                return self._skip(now, f"{alarm.message} and {odd.message}; skipped in case the batch is to blame")
        if odd is not None and math.isfinite(odd.expected) and odd.expected > 0:
            reason = f"{alarm.message}; step taken with its gradient clipped to the usual {odd.expected:.3g}"
            return Clip(max_norm=odd.expected, reason=reason, alarms=now.alarms)
        return Watch(reason=f"{alarm.message}; watched since step {episode.onset}", alarms=now.alarms)

    def _action_due(self, now: Now, episode: Episode) -> str:
        """Say why waiting is over; empty while it is not."""
        config, waited = self.config, now.step - episode.onset
        if episode.check_at is not None:
            good = episode.excess <= config.lasting or episode.falling()
            if now.step < episode.check_at or good:
                return ""
            return f"{episode.acted[-1].replace('_', ' ')} did not help" if episode.acted else "the loss is still up"
        restart = self._rate.restart
        if restart >= 0 and 0 <= episode.onset - restart <= FOLLOWS:
            return ""  # raised by a restart of the schedule, which somebody wanted
        hopeless, sound = now.find("slow_divergence", "chaotic"), now.verdict and now.verdict.weights == "sound"
        turned = hopeless is not None and hopeless.kind == "slow_divergence" and episode.falling()
        if hopeless is not None and not (sound or turned) and waited >= EARLY * config.watch_steps:
            return hopeless.message
        before = self._rate.before_jump(now.step, now.signals.lr, FOLLOWS)
        if now.cause == "schedule" and before is not None:
            return f"{now.messages}; the learning rate had been {before:.3g} and is {now.signals.lr:.3g}"
        if episode.excess <= config.lasting:
            return ""
        damage = f"{episode.excess:+.1%} against its level {episode.level:.4g} after {waited} steps"
        if waited >= config.watch_steps:
            return "" if self._worth_waiting(now, episode) else f"the loss is still {damage}"
        climbing = not episode.falling() and episode.excess > 0.2 and len(episode.losses) >= 16
        if waited >= EARLY * config.watch_steps and climbing:
            return f"the loss is {damage} and not on its way back"
        return ""

    def _worth_waiting(self, now: Now, episode: Episode) -> bool:
        """Whether the loss will be back before a rollback would have made up its own cost."""
        checkpoint = self._target(episode.onset)
        cost = self.config.watch_steps if checkpoint is None else now.step - checkpoint
        waited = now.step - episode.onset
        return waited < 3 * self.config.watch_steps and episode.steps_to_level() < cost

    def _act(self, now: Now, episode: Episode, why: str) -> Decision:
        """Do the first thing that fits the cause, that the host can do, and that has not failed before."""
        episode.check_at = now.step + self.config.check_steps
        if self._observing and episode.acted:
            return Watch(reason=f"{why}; advised: {episode.acted[-1].replace('_', ' ')}", alarms=now.alarms)
        factor = self._lr_factor(now)
        for name in ORDER[now.cause]:
            if name in episode.acted or name not in self.can:
                continue
            if name == "rollback" and self._target(episode.onset) is None:
                continue
            episode.acted.append(name)
            if name == "rollback":
                return self._go_back(now, episode.onset, why, fatal=False, lr_factor=factor)
            if name == "reset_moments":
                return ResetMoments(rewarm=self.config.check_steps, reason=why, alarms=now.alarms)
            return LowerLr(factor=factor if factor < 1 else HALF, reason=why, alarms=now.alarms)
        episode.check_at = now.step + self.config.watch_steps  # say it again after a while
        if self._ledger.tried and episode.excess > 0.5:
            return self._halt(now, why, episode.onset, "it came back each time")
        return Watch(reason=f"{why}; nothing is left to try, so it is let through", alarms=now.alarms)

    def _lr_factor(self, now: Now) -> float:
        """Share of the rate to go on with: what it was before a jump, half where going back did not help before."""
        before = self._rate.before_jump(now.step, now.signals.lr, FOLLOWS)
        if before is not None:
            return before / now.signals.lr
        if now.find("chaotic") is not None:
            return CHAOS_FACTOR
        return HALF if self._ledger.tried else 1.0

    # -- going back, and giving up ---------------------------------------------------------------------

    def _target(self, onset: int) -> int | None:
        return self._ledger.target(onset, self.config, self._checkpoint) if "rollback" in self.can else None

    def _go_back(self, now: Now, onset: int, why: str, *, fatal: bool, lr_factor: float = 1.0) -> Decision:
        ledger = self._ledger
        if self._target(onset) is None:
            if not fatal:
                return Watch(reason=f"{why}; there is no checkpoint to go back to", alarms=now.alarms)
            left = "no rollback is left in the budget" if ledger.no_rollback_left(self.config) else ""
            left = "it came back each time" if len(ledger.tried) >= MAX_TRIES else left
            return self._halt(now, why, onset, left or "there is no checkpoint before it")
        at_most = ledger.at_most(onset)
        if ledger.tried:
            lr_factor = min(lr_factor, HALF)
        ledger.note_rollback(now.step, at_most, self.config)
        rate = "" if lr_factor == 1 else f" and {lr_factor:.3g} of the learning rate"
        reason = f"{why}; going back to a checkpoint at or before step {at_most}, with new data{rate}"
        return Rollback(at_most=at_most, lr_factor=lr_factor, reason=reason, alarms=now.alarms)

    def _skip(self, now: Now, reason: str, *, again: bool = False) -> Skip:
        self._ledger.skips.append(self._ledger.done)
        return Skip(again=again, reason=reason, alarms=now.alarms)

    def _end_cool_down(self, step: int) -> str:
        ledger = self._ledger
        if not ledger.tried or step <= ledger.cool_until or self._episode is not None:
            return ""
        gone, ledger.tried = ledger.tried[-1], []
        return f"the rollback to step {gone} helped: {self.config.cool_down} steps without the trouble"

    def _end_streak(self, now: Now) -> str:
        ledger = self._ledger
        if now.find("nonfinite") is not None:
            return ""
        ended = f"over after {count(ledger.streak, 'non-finite step')}" if ledger.streak else ""
        ledger.streak, ledger.onset = 0, None
        if self._episode is None:
            ledger.refused = False
        return ended

    def _halt(self, now: Now, what: str, onset: int, why: str) -> Halt:
        fatal = now.find("nonfinite") is not None
        reason = (
            f"halted at step {now.step}: {what}, bad since step {onset}. "
            f"Tried: {self._ledger.history()}; {why}. Mend: {advice(fatal, bool(self._ledger.tried))}."
        )
        return Halt(reason=reason, alarms=now.alarms)

    def state_dict(self) -> dict[str, Any]:
        """Return everything the policy remembers, JSON-able and exact."""
        episode = None if self._episode is None else self._episode.state()
        return {"ledger": self._ledger.state(), "rate": self._rate.state(), "episode": episode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._ledger = Ledger.of(state["ledger"])
        seam = self._rate.seam
        self._rate = Rate.of(state["rate"])
        self._rate.seam = seam
        self._episode = None if state["episode"] is None else Episode.of(state["episode"])
