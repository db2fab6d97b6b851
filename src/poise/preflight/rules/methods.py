"""Rules on the names of our methods: unknown ones, and those that do not go together. No torch.

``poise.model.methods`` knows this from the methods' files, which import torch; here it is a table. A test compares it
with the methods themselves, all pairs of them.
"""

from __future__ import annotations

from itertools import combinations
from typing import Final

from poise.core.errors import nearest
from poise.preflight.rules.base import Rule, Verdict, names, rule
from poise.preflight.settings import Settings

_PLACEMENTS: Final = (
    *("pre_ln", "post_ln", "peri_ln", "sandwich_ln", "olmo2_norm", "mix_ln", "hybrid_norm", "deep_norm"),
    *("layer_norm_scaling", "rezero", "ngpt", "qkv_norm"),
)
SHARED_SLOTS: Final = {
    "qk": ("qk_norm", "qkv_norm", "qk_fc_norm", "hybrid_norm", "ngpt"),
    "values": ("qkv_norm", "value_residual", "hybrid_norm"),
    "branch_in": _PLACEMENTS,
    "branch_out": ("qk_fc_norm", "peri_ln", "sandwich_ln", "olmo2_norm", "ngpt"),
    "attn_scale": ("soft_temp", "mup", "u_mup", "ngpt"),
    "scores": ("soft_cap", "soft_clip", "attention_sink"),
    "linear": ("mlra", "wesar", "sigma_reparam", "u_mup", "ngpt"),
    "residual": (
        *("post_ln", "mix_ln", "hybrid_norm", "deep_norm", "layer_scale", "rezero", "skip_init", "depth_mup"),
        *("u_mup", "ngpt"),
    ),
    "embed_out": ("peri_ln", "embed_scale", "embed_norm"),
    "init": ("deep_norm", "sub_ln", "small_init", "wesar", "mup", "u_mup", "ngpt"),
    "residual_init": (
        *("deep_norm", "sub_ln", "layer_norm_scaling", "zero_init", "small_init", "scaled_init", "wesar"),
        "depth_mup",
    ),
    "head_in": ("wesar", "mup", "u_mup"),
    "head": ("output_centering", "ngpt"),
    "activation": ("swiglu_clamp", "ngpt"),
}
"""Slot of the model -> methods that take it; a slot has room for one."""

EXCLUDED: Final = {
    "dyt": ("ngpt", "qk_norm", "qkv_norm", "qk_fc_norm", "hybrid_norm"),
    "embed_scale": ("embed_std", "ngpt", "mup", "u_mup"),
    "embed_std": ("ngpt", "u_mup", "wesar"),
    "locater": ("hybrid_norm", "ngpt", "qk_norm", "qkv_norm", "qk_fc_norm"),
    "logit_tap": (
        *("hybrid_norm", "mlra", "ngpt", "sigma_reparam", "wesar"),
        *("qk_norm", "qkv_norm", "qk_fc_norm"),
    ),
    "qk_fc_norm": ("layer_norm_scaling",),
    "scaled_init": ("ngpt", "u_mup"),
    "zero_init": (
        *("ngpt", "sigma_reparam", "olmo2_norm", "peri_ln", "sandwich_ln", "qk_fc_norm", "rezero", "skip_init"),
    ),
}
"""Method -> methods that it does not go with for a reason of their own; either order."""


def conflict(one: str, other: str) -> str:
    """Return why two methods cannot hold together; nothing where they can.

    >>> conflict("soft_cap", "soft_clip"), conflict("qk_norm", "z_loss")
    ('both take the slot scores', '')
    """
    if one == other:
        return "it is named twice"
    for slot, takers in SHARED_SLOTS.items():
        if one in takers and other in takers:
            return f"both take the slot {slot}"
    if other in EXCLUDED.get(one, ()) or one in EXCLUDED.get(other, ()):
        return "they exclude each other"
    return ""


def _conflicts(s: Settings) -> Verdict | None:
    given = names(s)[:100]
    found = [(one, other, why) for one, other in combinations(given, 2) if (why := conflict(one, other))]
    if not found:
        return None
    what = "; ".join(f"methods {one} and {other}: {why}" for one, other, why in found[:3])
    more = f"; and {len(found) - 3} more pairs" if len(found) > 3 else ""
    return Verdict("critical", what + more, f"remove {found[0][0]} or {found[0][1]}")


def _unknown(s: Settings) -> Verdict | None:
    given = names(s)
    if not given:
        return None
    from poise.model.methods import METHODS  # a table of names; no torch

    odd = [name for name in given if name not in METHODS]
    if not odd:
        return None
    return Verdict(
        "warning",
        f"no method '{odd[0][:40]}'{nearest(odd[0][:40], METHODS)}" + (f", and {len(odd) - 1} more" if odd[1:] else ""),
        "see poise methods",
    )


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "method-conflict",
        "methods that do not go together",
        "critical",
        ("methods",),
        _conflicts,
        source="poise methods: slots and exclusions, each with its paper's reason",
        why="A slot of the model has room for one method, and some methods undo each other; building the model fails.",
    ),
    rule(
        "method-unknown",
        "unknown methods",
        "warning",
        ("methods",),
        _unknown,
        source="poise methods",
        why="A misspelt method is not applied.",
    ),
)
"""In the order of the file."""
