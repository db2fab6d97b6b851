"""The optimizer room's methods, one file each, and its names, imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

from poise.core.errors import nearest

METHODS = (
    "poise.optim.rules.adamw",
    "poise.optim.rules.stable_adamw",
    "poise.optim.rules.spam",
    "poise.optim.rules.stable_spam",
    "poise.optim.rules.lion",
    "poise.optim.rules.ademamix",
    "poise.optim.rules.adopt",
    "poise.optim.rules.schedule_free",
    "poise.optim.rules.adafactor",
    "poise.optim.rules.came",
    "poise.optim.rules.muon",
    "poise.optim.rules.normuon",
    "poise.optim.rules.sophia_g",
    "poise.optim.rules.frankenstein",
    "poise.optim.shape.clip_global_norm",
    "poise.optim.shape.zclip",
    "poise.optim.shape.adagc",
    "poise.optim.shape.autoclip",
    "poise.optim.shape.agc",
    "poise.optim.shape.clip_block",
    "poise.optim.shape.adaclip",
    "poise.optim.shape.adagn",
    "poise.optim.shape.clip_update_rms",
    "poise.optim.shape.clip_update_norm",
    "poise.optim.shape.clippy",
    "poise.optim.wrap.cautious",
    "poise.optim.wrap.moment_reset",
    "poise.optim.wrap.low_precision",
    "poise.optim.weights.stochastic_rounding",
    "poise.optim.weights.kahan",
    "poise.optim.weights.qk_clip",
    "poise.optim.weights.unit_rows",
)

_NAMES = {
    "Chain": "poise.optim.chain",
    "GradChain": "poise.optim.grad_chain",
    "Adapted": "poise.optim.adapt",
    "ADOPT": "poise.optim.optimizers",
    "AdEMAMix": "poise.optim.optimizers",
    "Adafactor": "poise.optim.optimizers",
    "AdamW": "poise.optim.optimizers",
    "CAME": "poise.optim.optimizers",
    "Frankenstein": "poise.optim.optimizers",
    "Lion": "poise.optim.optimizers",
    "Muon": "poise.optim.matrix_optimizers",
    "NorMuon": "poise.optim.matrix_optimizers",
    "SPAM": "poise.optim.optimizers",
    "ScheduleFreeAdamW": "poise.optim.optimizers",
    "SophiaG": "poise.optim.optimizers",
    "StableAdamW": "poise.optim.optimizers",
    "StableSPAM": "poise.optim.optimizers",
    "adamw_4bit": "poise.optim.adapt",
    "adamw_8bit": "poise.optim.adapt",
    "shampoo": "poise.optim.adapt",
    "soap": "poise.optim.adapt",
    # directions, for a chain
    "AdEMAMixRule": "poise.optim.rules.ademamix",
    "AdafactorRule": "poise.optim.rules.adafactor",
    "AdamWRule": "poise.optim.rules.adamw",
    "AdoptRule": "poise.optim.rules.adopt",
    "CameRule": "poise.optim.rules.came",
    "FrankensteinRule": "poise.optim.rules.frankenstein",
    "LionRule": "poise.optim.rules.lion",
    "MuonRule": "poise.optim.rules.muon",
    "NorMuonRule": "poise.optim.rules.normuon",
    "ScheduleFreeRule": "poise.optim.rules.schedule_free",
    "SophiaGRule": "poise.optim.rules.sophia_g",
    "SpamRule": "poise.optim.rules.spam",
    "StableAdamWRule": "poise.optim.rules.stable_adamw",
    "StableSpamRule": "poise.optim.rules.stable_spam",
    "Cautious": "poise.optim.wrap.cautious",
    "LowPrecisionStates": "poise.optim.wrap.low_precision",
    "MomentReset": "poise.optim.wrap.moment_reset",
    "AGC": "poise.optim.shape.agc",
    "AdaClip": "poise.optim.shape.adaclip",
    "AdaGC": "poise.optim.shape.adagc",
    "AdaGN": "poise.optim.shape.adagn",
    "AutoClip": "poise.optim.shape.autoclip",
    "ClipBlock": "poise.optim.shape.clip_block",
    "ClipGlobalNorm": "poise.optim.shape.clip_global_norm",
    "ClipUpdateNorm": "poise.optim.shape.clip_update_norm",
    "ClipUpdateRms": "poise.optim.shape.clip_update_rms",
    "Clippy": "poise.optim.shape.clippy",
    "ZClip": "poise.optim.shape.zclip",
    "Kahan": "poise.optim.weights.kahan",
    "QKClip": "poise.optim.weights.qk_clip",
    "StochasticRounding": "poise.optim.weights.stochastic_rounding",
    "UnitRows": "poise.optim.weights.unit_rows",
    "evaluation_weights": "poise.optim.rules.schedule_free",
    "examine": "poise.optim.doctor",
    "guarded": "poise.integrations.optimizer",
    "observe_hessian": "poise.optim.rules.sophia_g",
    "sampled_label_loss": "poise.optim.rules.sophia_g",
    "scale_lr": "poise.optim.schedules",
}
"""Public name -> module that defines it. ``guarded`` lives with the other drop-ins; users look for it here."""

__all__ = ["METHODS", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'poise.optim' has no attribute '{name}'{nearest(name, _NAMES)}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
