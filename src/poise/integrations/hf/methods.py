"""The methods for transformers models: settings, the places they claim, and what they put there.

Each is a frozen dataclass of its settings. Formulas and sources are those of the method of the same name in
``poise methods``; where a method differs here, its class says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Protocol

import torch
from torch import nn

from poise.core.errors import UserError
from poise.integrations.hf.layout import Sites
from poise.integrations.hf.loss import ZLoss
from poise.integrations.hf.parts import (
    Capping,
    Gain,
    Gating,
    GradientShare,
    PoiseRMSNorm,
    Scale,
    Seats,
    SoftCap,
    check_softcap,
)


class HfMethod(Protocol):
    """A method with its settings; a frozen dataclass.

    Attributes:
        keeps_function: whether a trained model still computes the same with it.
    """

    keeps_function: ClassVar[bool]

    @property
    def slots(self) -> tuple[str, ...]:
        """The places that it claims, named like those of ``Spec``."""
        ...

    def check(self, sites: Sites) -> None:
        """Raise ``UserError`` where this model cannot have it; nothing has been changed yet."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Put it into the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QkNorm:
    """RMSNorm of each head's queries and keys before RoPE, gains shared by the heads (a Llama becomes a Qwen3)."""

    slots: ClassVar = ("qk",)
    keeps_function: ClassVar = False

    def check(self, sites: Sites) -> None:
        """Refuse a model that has it."""
        if hasattr(sites.layers[0].self_attn, "q_norm"):
            kind = sites.model.config.model_type
            raise UserError(
                f"a '{kind}' model normalises queries and keys by itself; leave qk_norm out,"
                " and take peri_ln for qk_fc_norm"
            )

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``self_attn.q_norm`` and ``self_attn.k_norm``."""
        for layer in sites.layers:
            attention = layer.self_attn
            for name in "qk":
                norm = PoiseRMSNorm(sites.head_width, sites.eps, attention.q_proj.weight)
                attention.add_module(f"{name}_norm", norm)
                seats.put(attention, f"{name}_proj", norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputNorms:
    """RMSNorm of what attention and MLP add to the stream (Sandwich-LN), behind the model's own pre-norms."""

    slots: ClassVar = ("branch_out",)
    keeps_function: ClassVar = False

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``attn_out_norm`` and ``mlp_out_norm`` to each layer."""
        for layer in sites.layers:
            for name, parent, child in _branches(layer):
                norm = PoiseRMSNorm(sites.width, sites.eps, parent.get_submodule(child).weight)
                layer.add_module(f"{name}_out_norm", norm)
                seats.put(parent, child, norm, first=True)  # a gain of layer_scale comes after it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeriLn:
    """Output norms, and with ``embed`` a norm of the embedding's output; the pre-norms are the model's own."""

    embed: bool = True

    keeps_function: ClassVar = False

    @property
    def slots(self) -> tuple[str, ...]:
        """The embedding's output only with ``embed``."""
        return ("branch_out", "embed_out") if self.embed else ("branch_out",)

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """What ``sandwich_ln`` and ``embed_norm`` add."""
        OutputNorms().act(sites, seats)
        if self.embed:
            EmbedNorm().act(sites, seats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QkFcNorm:
    """QK-norm, and output norms on both branches."""

    slots: ClassVar = ("qk", "branch_out")
    keeps_function: ClassVar = False

    def check(self, sites: Sites) -> None:
        """Refuse a model that has QK-norm."""
        QkNorm().check(sites)

    def act(self, sites: Sites, seats: Seats) -> None:
        """Both."""
        QkNorm().act(sites, seats)
        OutputNorms().act(sites, seats)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormScaling:
    """Outputs of both pre-norms of layer l times 1 / sqrt(l), l from 1; the final norm is left alone."""

    slots: ClassVar = ("branch_in",)
    keeps_function: ClassVar = False

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``attn_in_scale`` and ``mlp_in_scale``, without parameters."""
        for number, layer in enumerate(sites.layers, start=1):
            for name, norm in (("attn", "input_layernorm"), ("mlp", "post_attention_layernorm")):
                scale = Scale(1 / math.sqrt(number))
                layer.add_module(f"{name}_in_scale", scale)
                seats.put(layer, norm, scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerScale:
    """What each branch adds, times a learnable gain a channel; after an output norm, where there is one.

    Args:
        init: the gain at the start; unless given 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond (CaiT's rule,
            from memory: not checked against the paper).
    """

    init: float | None = None

    slots: ClassVar = ("residual",)
    keeps_function: ClassVar = False

    def __post_init__(self) -> None:
        if self.init is not None and not math.isfinite(self.init):
            raise UserError(f"layer_scale init is {self.init}; give a finite number, e.g. 0.1")

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``attn_layer_scale`` and ``mlp_layer_scale`` to each layer."""
        depth = len(sites.layers)
        rule = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        for layer in sites.layers:
            for name, parent, child in _branches(layer):
                initial = rule if self.init is None else self.init
                gain = Gain(sites.width, initial, parent.get_submodule(child).weight)
                layer.add_module(f"{name}_layer_scale", gain)
                seats.put(parent, child, gain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedNorm:
    """RMSNorm of the embedding's output. A tied head is not normalised."""

    slots: ClassVar = ("embed_out",)
    keeps_function: ClassVar = False

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``model.embed_norm``."""
        norm = PoiseRMSNorm(sites.width, sites.eps, sites.body.embed_tokens.weight)
        sites.body.add_module("embed_norm", norm)
        seats.put(sites.body, "embed_tokens", norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedScale:
    """The embedding's output times ``factor``, sqrt(D) unless given; never the head, tied or not."""

    factor: float | None = None

    slots: ClassVar = ("embed_out",)
    keeps_function: ClassVar = False

    def __post_init__(self) -> None:
        if self.factor is not None and not (self.factor > 0 and math.isfinite(self.factor)):
            raise UserError(
                f"embed_scale factor is {self.factor}; give a finite number above 0, or leave it out for sqrt(D)"
            )

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``model.embed_scale``, without parameters."""
        scale = Scale(math.sqrt(sites.width) if self.factor is None else self.factor)
        sites.body.add_module("embed_scale", scale)
        seats.put(sites.body, "embed_tokens", scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedDetach:
    """The embedding's gradient times ``gamma``, its output unchanged; with a tied head the head's share stays whole."""

    gamma: float = 0.1

    slots: ClassVar = ("embed_grad",)
    keeps_function: ClassVar = True

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UserError(f"embed_detach gamma is {self.gamma}; give a number from 0 to 1, e.g. 0.1")

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``model.embed_detach``, without parameters."""
        share = GradientShare(self.gamma)
        sites.body.add_module("embed_detach", share)
        seats.put(sites.body, "embed_tokens", share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLossTerm:
    """``coefficient · mean(log² Z)`` in the training loss; acts where the model computes the loss from ``labels``."""

    coefficient: float = 1e-4

    slots: ClassVar = ("loss_terms",)
    keeps_function: ClassVar = True

    def __post_init__(self) -> None:
        if not (self.coefficient >= 0 and math.isfinite(self.coefficient)):
            raise UserError(f"z_loss coefficient is {self.coefficient}; give 0 or more, e.g. 1e-4")

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Put it around ``model.loss_function``."""
        sites.model.loss_function = ZLoss(sites.model.loss_function, self.coefficient)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalSoftCap:
    """Output logits through ``cap · tanh(x / cap)``, for the loss, the z-loss and ``generate`` alike."""

    cap: float = 30.0

    slots: ClassVar = ("logits",)
    keeps_function: ClassVar = False

    def __post_init__(self) -> None:
        _check_cap("final_soft_cap", self.cap)

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``final_soft_cap``, without parameters."""
        cap = SoftCap(self.cap)
        sites.model.add_module("final_soft_cap", cap)
        seats.put(sites.model, "lm_head", cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSoftCap:
    """Attention logits through ``cap · tanh(x / cap)``, done by the attention implementation in use, if it can."""

    cap: float = 50.0

    slots: ClassVar = ("scores",)
    keeps_function: ClassVar = False

    def __post_init__(self) -> None:
        _check_cap("soft_cap", self.cap)

    def check(self, sites: Sites) -> None:
        """Refuse an attention implementation that would refuse or ignore the cap."""
        check_softcap(sites.layers[0].self_attn)

    def act(self, sites: Sites, seats: Seats) -> None:
        """Pass the cap to every attention; nothing is added to the model."""
        for layer in sites.layers:
            seats.put_before(layer, "self_attn", Capping(self.cap), with_kwargs=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedAttention:
    """Attention output, before its output matrix, times a sigmoid gate of the attention's normed input (G1).

    The gate matrix has no bias and starts as the model's other matrices do, so gates start near 1/2.

    Args:
        score: ``elementwise`` (one gate a channel of each head) or ``headwise``.
    """

    score: str = "elementwise"

    slots: ClassVar = ("attn_gate",)
    keeps_function: ClassVar = False

    def __post_init__(self) -> None:
        if self.score not in ("elementwise", "headwise"):
            raise UserError(f"gated_attention score is '{self.score}'; give elementwise or headwise")

    def check(self, sites: Sites) -> None:
        """Any model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Add ``self_attn.attn_gate``."""
        std = _small_std(sites) if "small_init" in sites.applied else sites.model.config.initializer_range
        for layer in sites.layers:
            attention, like = layer.self_attn, layer.self_attn.o_proj.weight
            gates = like.shape[1] // (1 if self.score == "elementwise" else sites.head_width)
            part = nn.Linear(sites.width, gates, bias=False, dtype=like.dtype, device=like.device)
            nn.init.normal_(part.weight, std=std)
            attention.add_module("attn_gate", part)
            gating = Gating(part)
            seats.put_before(layer, "self_attn", gating.hear, with_kwargs=True)
            seats.put_before(attention, "o_proj", gating.gate, with_kwargs=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallInit:
    """Draws ALL matrices anew: std sqrt(2 / (5 D)); those that write into the stream also divided by sqrt(2 N).

    Only for a model that has just been made from its config: what it had learnt would be gone. Biases become 0, and
    torch's global generator is used, as transformers does. Last of the methods of a call, so that it draws gates too.
    """

    slots: ClassVar = ("init",)
    keeps_function: ClassVar = False

    def check(self, sites: Sites) -> None:
        """Any fresh model can have it."""

    def act(self, sites: Sites, seats: Seats) -> None:
        """Fill the weights."""
        std, residual = _small_std(sites), 1 / math.sqrt(2 * len(sites.layers))
        outputs = {id(parent.get_submodule(child)) for layer in sites.layers for _, parent, child in _branches(layer)}
        drawn = set[int]()  # a tied head is the embedding
        for module in sites.model.modules():
            if not isinstance(module, nn.Linear | nn.Embedding) or id(module.weight) in drawn:
                continue
            drawn.add(id(module.weight))
            nn.init.normal_(module.weight, std=std * (residual if id(module) in outputs else 1))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()


def _branches(layer: Any) -> tuple[tuple[str, Any, str], ...]:
    """Return (name, parent, child) of the matrices that write into the residual stream."""
    return ("attn", layer.self_attn, "o_proj"), ("mlp", layer.mlp, "down_proj")


def _small_std(sites: Sites) -> float:
    return math.sqrt(2 / (5 * sites.width))


def _check_cap(name: str, cap: float) -> None:
    if not (cap > 0 and math.isfinite(cap)):
        raise UserError(f"{name} cap is {cap}; give a finite number above 0")


METHODS: Final[Mapping[str, type[Any]]] = {
    "qk_norm": QkNorm,
    "qk_fc_norm": QkFcNorm,
    "peri_ln": PeriLn,
    "sandwich_ln": OutputNorms,
    "layer_norm_scaling": LayerNormScaling,
    "layer_scale": LayerScale,
    "embed_norm": EmbedNorm,
    "embed_scale": EmbedScale,
    "embed_detach": EmbedDetach,
    "gated_attention": GatedAttention,
    "soft_cap": AttentionSoftCap,
    "final_soft_cap": FinalSoftCap,
    "z_loss": ZLossTerm,
    "small_init": SmallInit,
}
"""Name -> method, in the order of a reader's way through the model."""

EXCLUDES: Final[Mapping[tuple[str, str], str]] = {
    ("layer_norm_scaling", "small_init"): "scaled residual initialisation cancels what the scaling gains"
    " (arXiv 2502.05795, table 4: 25.76 alone, 25.80 with it)",
}
"""Two names -> why they do not go together."""
