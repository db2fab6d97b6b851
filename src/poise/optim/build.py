"""From settings to an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from poise.core.errors import UserError, nearest
from poise.optim.chain import Chain
from poise.optim.groups import groups, matrix_groups
from poise.optim.optimizers import arranged, stable_spam_links
from poise.optim.rules.adafactor import AdafactorRule
from poise.optim.rules.adamw import AdamWRule, Decay
from poise.optim.rules.ademamix import AdEMAMixRule
from poise.optim.rules.adopt import AdoptRule
from poise.optim.rules.came import CameRule
from poise.optim.rules.frankenstein import FrankensteinRule
from poise.optim.rules.lion import LionRule
from poise.optim.rules.muon import MuonRule
from poise.optim.rules.normuon import NorMuonRule
from poise.optim.rules.spam import SpamRule
from poise.optim.rules.stable_adamw import StableAdamWRule
from poise.optim.schedules import ScheduleConfig
from poise.optim.shape.adagc import AdaGC
from poise.optim.shape.agc import AGC
from poise.optim.shape.autoclip import AutoClip
from poise.optim.shape.clip_block import ClipBlock
from poise.optim.shape.clip_global_norm import ClipGlobalNorm
from poise.optim.shape.zclip import ZClip
from poise.optim.transform import Link
from poise.optim.wrap.moment_reset import MomentReset


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of a run. The numbers are those usual for language models, whatever the rule: its paper's own
    defaults are those of the class in ``poise.optim``.

    Attributes:
        name: the rule. ``muon`` and ``normuon`` take the hidden matrices and leave the rest to AdamW.
        lr: what the schedule multiplies.
        beta1: first averaging coefficient; Muon's momentum is its own.
        beta2: second averaging coefficient.
        eps: added to the root of the second moment.
        weight_decay: on matrices alone.
        decay: ``decoupled``, ``independent`` of the learning rate, or ``coupled``; AdamW only.
        clip: what shapes the gradient: ``global_norm``, ``zclip``, ``adagc``, ``autoclip``, ``agc``, ``block`` or
            ``none``.
        clip_norm: the bound of ``global_norm`` and of ``block``, and of ``zclip`` besides its own; 0 does not clip.
        reset_every: steps from one reset of the moments to the next; 0 for none. SPAM and Stable-SPAM bring
            their own.
        schedule: the learning rate over the run.
    """

    name: str = "adamw"
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Decay = "decoupled"
    clip: str = "global_norm"
    clip_norm: float = 1.0
    reset_every: int = 0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        if self.name in ELSEWHERE:
            raise UserError(f"optim.name is {self.name!r}, which {ELSEWHERE[self.name]}; use one of {', '.join(RULES)}")
        if self.name not in RULES:
            raise UserError(f"optim.name is {self.name!r}{nearest(self.name, RULES)}; use one of {', '.join(RULES)}")
        if self.clip not in CLIPPERS:
            raise UserError(
                f"optim.clip is {self.clip!r}{nearest(self.clip, CLIPPERS)}; use one of {', '.join(CLIPPERS)}"
            )
        if not (math.isfinite(self.lr) and self.lr > 0.0):
            raise UserError(f"optim.lr is {self.lr}; use a finite number above 0, e.g. 3e-3")
        if not (math.isfinite(self.clip_norm) and self.clip_norm >= 0.0):
            raise UserError(f"optim.clip_norm is {self.clip_norm}; use a finite number above 0, or 0 not to clip")
        if self.decay != "decoupled" and self.name != "adamw":
            raise UserError(f"optim.decay is {self.decay!r}, which only adamw has; use decoupled with {self.name}")
        if self.reset_every and self.name in ("spam", "stable_spam"):
            raise UserError(f"optim.reset_every is {self.reset_every}, but {self.name} resets by itself; use 0")
        _ = self.links  # their own checks

    @property
    def rest(self) -> AdamWRule:
        """The rule of what Muon does not take; ``adamw`` itself."""
        return AdamWRule(self.beta1, self.beta2, self.eps, self.weight_decay, self.decay)

    @property
    def links(self) -> list[Link]:
        """The chain of most parameters."""
        own = RULES[self.name](self)
        if self.reset_every:
            own = [*own[:-1], MomentReset(own[-1], self.reset_every)]
        return arranged(own, CLIPPERS[self.clip](self))


RULES: Mapping[str, Callable[[OptimConfig], Sequence[Link]]] = {
    "adamw": lambda c: [c.rest],
    "stable_adamw": lambda c: [StableAdamWRule(c.beta1, c.beta2, c.eps, c.weight_decay)],
    "spam": lambda c: [SpamRule(c.beta1, c.beta2, c.eps, c.weight_decay)],
    "stable_spam": lambda c: stable_spam_links(
        (c.beta1, c.beta2), c.eps, c.weight_decay, (0.7, 0.9, 0.999), 1000, None, 0.5, "global"
    ),
    "lion": lambda c: [LionRule(c.beta1, c.beta2, c.weight_decay)],
    "ademamix": lambda c: [AdEMAMixRule(c.beta1, c.beta2, eps=c.eps, weight_decay=c.weight_decay)],
    "adopt": lambda c: [AdoptRule(c.beta1, c.beta2, c.eps, weight_decay=c.weight_decay)],
    "adafactor": lambda c: [AdafactorRule(weight_decay=c.weight_decay)],
    "came": lambda c: [CameRule(c.beta1, c.beta2, weight_decay=c.weight_decay)],
    "muon": lambda c: [MuonRule(adjust_lr_fn="match_rms_adamw", weight_decay=c.weight_decay)],
    "normuon": lambda c: [NorMuonRule(weight_decay=c.weight_decay)],
    "frankenstein": lambda c: [FrankensteinRule(eps=c.eps, weight_decay=c.weight_decay)],
}

ELSEWHERE = {
    "schedule_free": "changes weights for every evaluation; use poise.optim.ScheduleFreeAdamW in a loop of your own",
    "sophia_g": "needs a second loss every few steps; use poise.optim.SophiaG in a loop of your own",
}

CLIPPERS: Mapping[str, Callable[[OptimConfig], Sequence[Link]]] = {
    "global_norm": lambda c: [ClipGlobalNorm(c.clip_norm)] if c.clip_norm else [],
    "zclip": lambda c: [ZClip(max_grad_norm=c.clip_norm or None)],
    "adagc": lambda c: [AdaGC()],
    "autoclip": lambda c: [AutoClip()],
    "agc": lambda c: [AGC()],
    "block": lambda c: [ClipBlock(c.clip_norm)] if c.clip_norm else [],
    "none": lambda c: [],
}

SPLIT = frozenset({"muon", "normuon"})
"""Rules for hidden matrices alone."""

SCALABLE = frozenset({"adamw", "stable_adamw", "spam", "stable_spam", "lion", "ademamix", "adopt", "came"})
"""Rules whose step does not depend on the size of gradients and weights, since they divide by a second moment or take
signs: what muP's shares for Adam are derived for. Adafactor multiplies by the size of the weights, which depends on the
width by itself."""


def build(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, Tensor]],
    roles: Mapping[str, str] | None = None,
    *,
    multipliers: Mapping[str, float] | None = None,
    fixed_decay: bool = False,
) -> Chain:
    """Return the optimizer that ``config`` describes, with decay only where it belongs.

    Args:
        config: settings.
        named_parameters: e.g. ``model.named_parameters()``, after sharding.
        roles: name to role; see ``poise.optim.groups``. Muon and its kin cannot do without.
        multipliers: role to share of the learning rate, for optimizers that divide by a second moment; see ``groups``.
        fixed_decay: as of ``groups``; decay that is independent of the rate stays as it is anyway.

    Raises:
        UserError: multipliers with a rule that they are not meant for.
    """
    if multipliers and config.name not in SCALABLE:
        raise UserError(
            f"optim.name is {config.name!r}, but the model's learning-rate multipliers are Adam's; use "
            f"{', '.join(rule for rule in RULES if rule in SCALABLE)}, or leave out the methods that bring "
            "multipliers, such as mup, depth_mup and u_mup"
        )
    links = config.links
    fixed_decay = fixed_decay and config.decay != "independent"
    if config.name not in SPLIT:
        found = groups(
            named_parameters, roles, config.weight_decay, multipliers=multipliers or None, fixed_decay=fixed_decay
        )
        return Chain(found, *links, lr=config.lr)
    hidden, others = matrix_groups(named_parameters, roles, config.weight_decay)
    clippers = [link for link in links if link.stage == "gradient"]
    rest: Link = MomentReset(config.rest, config.reset_every) if config.reset_every else config.rest
    for group in others:
        group["links"] = [*clippers, rest]
    return Chain([*hidden, *others], *links, lr=config.lr)
