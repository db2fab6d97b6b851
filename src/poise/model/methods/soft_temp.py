"""Soft temperature: attention logits times a fixed factor below one, so that the softmax stays soft for longer.

Citation: Rybakov et al. 2024, "Methods of improving LLM training stability", arXiv 2410.16682.
Formula: p = softmax(beta q kᵀ / sqrt(K)), beta = 0.5.
Differs from the paper in: the value is the paper's; that beta multiplies the logits, and that the 1 / sqrt(K) stays, is
    our interpretation.
Cost: none; one number in the scale of the attention kernel.
Acts: in every block, every step, on the attention logits. The queries' and keys' gradients start beta times as large.
Off: leave `soft_temp` out of the methods, or beta = 1.
Numerics: a factor of the attention kernel's own scale, applied where the kernel scales.

Shapes: K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from poise.core.errors import UserError
from poise.core.registry import Card
from poise.model.attention import root_scale
from poise.model.place import Place
from poise.model.spec import Part, Spec

CARD: Final = Card(
    name="soft_temp",
    kind="model",
    title="Multiplies attention logits by a factor below one, so that the softmax stays soft for longer",
    citation="Rybakov et al. 2024, arXiv 2410.16682",
    formula="p = softmax(beta q k^T / sqrt(K)), beta = 0.5",
    acts="in every block, every step, on the attention logits",
    cost="none: one number in the scale of the attention kernel",
    off="leave `soft_temp` out of the methods, or beta = 1",
    differs="that beta multiplies the logits and 1 / sqrt(K) stays is our interpretation; the value is the paper's",
)

EXCLUDES: Final[Mapping[str, str]] = {}

KERNEL: Final = "the kernel of plain attention: the temperature is in its scale"


def tempered(place: Place, beta: float) -> float:
    """beta / √K."""
    return beta * root_scale(place)


PARTS: Final[Mapping[str, Mapping[str, Callable[..., Any]]]] = {"attn_scale": {"soft_temp": tempered}}


def apply(spec: Spec, *, beta: float = 0.5) -> Spec:
    """Return ``spec`` with attention logits multiplied by ``beta``.

    Raises:
        UserError: a factor that is not above 0.
    """
    if not 0 < beta <= 1e15:
        raise UserError(f"soft_temp beta is {beta}; give a finite number above 0, up to 1e15, e.g. 0.5")
    return spec.claim("attn_scale", Part.of("soft_temp", {"beta": beta}), "soft_temp")
