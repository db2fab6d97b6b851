"""Stability methods of the model, one file each, and the functions that apply them to a ``Spec``.

To add a method: write its file (copy the shape of ``z_loss.py``), and add its name to ``METHODS``.
"""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from poise.core.errors import Conflict, UserError, nearest
from poise.core.registry import Card
from poise.model.settings import checked, split
from poise.model.spec import Spec, Value

METHODS: Final[Mapping[str, str]] = {
    "qk_norm": "attention",
    "qkv_norm": "attention",
    "qk_fc_norm": "attention",
    "soft_temp": "attention",
    "soft_cap": "attention",
    "soft_clip": "attention",
    "attention_sink": "attention",
    "gated_attention": "attention",
    "value_residual": "attention",
    "logit_tap": "attention",
    "locater": "attention",
    "mlra": "attention",
    "pre_ln": "placement",
    "post_ln": "placement",
    "peri_ln": "placement",
    "sandwich_ln": "placement",
    "olmo2_norm": "placement",
    "mix_ln": "placement",
    "hybrid_norm": "placement",
    "deep_norm": "placement",
    "sub_ln": "placement",
    "layer_norm_scaling": "placement",
    "layer_scale": "residual",
    "rezero": "residual",
    "skip_init": "residual",
    "zero_init": "residual",
    "small_init": "initialisation",
    "scaled_init": "initialisation",
    "wesar": "initialisation",
    "sigma_reparam": "initialisation",
    "mup": "initialisation",
    "depth_mup": "initialisation",
    "u_mup": "initialisation",
    "embed_scale": "embedding",
    "embed_norm": "embedding",
    "embed_std": "embedding",
    "embed_detach": "embedding",
    "z_loss": "output",
    "final_soft_cap": "output",
    "output_centering": "output",
    "dyt": "elsewhere",
    "ngpt": "elsewhere",
    "swiglu_clamp": "elsewhere",
}
"""Name in recipes, which is the name of the file -> topic."""


class Method(Protocol):
    """What the file of a method holds."""

    CARD: Card
    EXCLUDES: Mapping[str, str]
    """Name of another method -> why the two do not go together."""
    PARTS: Mapping[str, Mapping[str, Callable[..., Any]]]
    """Slot -> part name -> builder."""
    apply: Callable[..., Spec]
    """``apply(spec, *, setting=default, ...) -> Spec``: claims slots, touches nothing else."""


def load(name: str) -> Method:
    """Return the module of a method.

    Raises:
        UserError: no method of this name.
    """
    if name not in METHODS:
        near = nearest(name, METHODS)
        raise UserError(
            f"no model method '{name}'{near + ' see poise methods' if near else '; there are ' + ', '.join(METHODS)}"
        )
    return typing.cast(Method, importlib.import_module(f"{__name__}.{name}"))


def cards() -> list[Card]:
    """Return the cards of all methods, by name."""
    return [load(name).CARD for name in sorted(METHODS)]


def apply_methods(spec: Spec, wanted: Iterable[str] | Mapping[str, Mapping[str, Value]]) -> Spec:
    """Return ``spec`` with methods applied in order.

    Args:
        spec: the model without them.
        wanted: ``["qk_norm", "z_loss:coefficient=1e-5"]`` (settings after a colon, separated by commas), or
            a mapping ``{"z_loss": {"coefficient": 1e-5}}``.

    Raises:
        UserError: an unknown method or setting, or a value that does not fit.
        Conflict: two methods claim one slot, one excludes the other, or one is named twice.
    """
    pairs = wanted.items() if isinstance(wanted, Mapping) else [split(text) for text in wanted]
    for name, given in pairs:
        method = load(name)
        for earlier in spec.methods:
            reason = method.EXCLUDES.get(earlier) or load(earlier).EXCLUDES.get(name)
            if reason:
                raise Conflict(f"methods '{earlier}' and '{name}' exclude each other: {reason}; remove one")
        spec = method.apply(spec, **checked(name, method.apply, given))
    return spec
