"""From a configuration to models of its family at other sizes, built with our decoder.

What is kept: the place and kind of norms, QK-norm, caps, z-loss, the ratios of depth, FFN and key/value heads to the
width, a tied head, and the start, as a multiple of 1 / sqrt(width): the products of all matrices have the size that
they have at full width, and so has the residual stream behind the embedding. What is scaled and what cannot be
represented is said in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from poise.core.errors import UserError
from poise.model.counts import count
from poise.model.methods import apply_methods
from poise.model.spec import Part, Spec
from poise.preflight.settings import Settings

if TYPE_CHECKING:
    from poise.train.recipe import Recipe

LARGEST: Final = 50_000_000
"""Weights up to which a recipe's own model is measured, not a smaller one."""

HEAD: Final = 32
"""Width of a proxy's heads."""

LEAST_DEPTH: Final = 2

_NORMS: Final = {"pre": (), "post": ("post_ln",), "sandwich": ("sandwich_ln",), "reordered": ("olmo2_norm",)}


@dataclass(frozen=True, slots=True)
class Family:
    """Models like the configured one.

    Attributes:
        width, depth: of the configured model.
        make: (width, depth, heads, key/value heads, vocabulary, longest sequence) -> its ``Spec``.
        shared: query heads that one key/value head serves.
        full: weights of the blocks of the configured model, as one token meets them.
        own: the configured model itself, where it is ours and small enough.
        left_out: what our decoder cannot represent, and what it has in its place.
    """

    width: int
    depth: int
    make: Callable[[int, int, int, int, int, int], Spec]
    shared: int
    full: float
    own: Spec | None
    left_out: tuple[str, ...]

    def spec(self, width: int, *, vocab_size: int, seq_len: int, depth: int | None = None) -> Spec:
        """Return the model of a width; its depth follows the width unless given, its heads are ``HEAD`` wide.

        Raises:
            UserError: methods that do not go together.
        """
        heads = max(1, width // HEAD)
        kv_heads = max(1, heads // self.shared)
        while heads % kv_heads:
            kv_heads -= 1
        depth = self.depth_of(width) if depth is None else depth
        return self.make(width, depth, heads, kv_heads, vocab_size, seq_len)

    def depth_of(self, width: int) -> int:
        """Return the number of blocks at a width: as deep for its width as the configured model."""
        return max(LEAST_DEPTH, round(self.depth * width / self.width))

    def scaled(self, spec: Spec) -> tuple[str, ...]:
        """Return in words how a model of the family differs in size from the configured one."""
        if spec == self.own:
            return ()
        said = [f"width {self.width} -> {spec.d_model}", f"blocks {self.depth} -> {spec.n_layers}"]
        aspect = spec.n_layers / spec.d_model / (self.depth / self.width)
        if not 0.8 <= aspect <= 1.25:
            said.append(f"which is {aspect:.2g} x as deep for its width")
        return (*said, f"heads {spec.head_dim} wide")


def block_weights(spec: Spec) -> int:
    """Return the weights of a model without embedding and head."""
    return count(spec).params_non_embedding


def of_settings(settings: Settings) -> Family:
    """Return the family of any configuration.

    Raises:
        UserError: its width or depth is not said.
    """
    s = settings
    if s.d_model is None or s.n_layers is None:
        missing = " and ".join(n for n in ("d_model", "n_layers") if getattr(s, n) is None)
        raise UserError(
            f"'{s.source}' does not say {missing}, so no model of its family can be built; add the model's "
            "configuration, or leave --model out"
        )
    width, depth = s.d_model, s.n_layers
    ratio = (s.d_ff / width) if s.d_ff is not None else (8 / 3 if s.gated_mlp else 4.0)
    shared = 1
    if s.n_heads and s.n_kv_heads and s.n_heads % s.n_kv_heads == 0:
        shared = s.n_heads // s.n_kv_heads
    methods, left_out = _methods(s)

    def make(d: int, n: int, heads: int, kv_heads: int, vocab_size: int, seq_len: int) -> Spec:
        plain = Spec(
            *(vocab_size, seq_len, n, d, heads, kv_heads, max(8, round(ratio * d / 8) * 8)),
            mlp="gelu" if s.gated_mlp is False else "swiglu",
            tied=bool(s.tied),
            norm=Part("layernorm") if s.norm_kind == "layernorm" else Part("rmsnorm"),
            init=_init(s, d),
        )
        factor = _embed_scale(s, d)
        return apply_methods(plain, methods + [f"embed_scale:factor={factor}"] * (factor is not None))

    # Of a mixture of experts the shape speaks of one expert; that is what one token meets, or less.
    full = replace(s, vocab_size=None, params=None).n_params
    assert full is not None
    return Family(width, depth, make, shared, full, None, tuple(left_out))


def of_recipe(recipe: Recipe) -> Family:
    """Return the family of a recipe of ours: the same methods at other sizes.

    Raises:
        UserError: methods that do not go together.
    """
    spec, model = recipe.spec(), recipe.model
    ratio = spec.d_ff / spec.d_model

    def make(d: int, n: int, heads: int, kv_heads: int, vocab_size: int, seq_len: int) -> Spec:
        inner = max(8, round(ratio * d / 8) * 8)
        small = replace(model, n_layers=n, d_model=d, n_heads=heads, n_kv_heads=kv_heads, d_ff=inner)
        return small.spec(vocab_size, seq_len)

    own = spec if count(spec).params <= LARGEST else None
    shared = spec.n_heads // spec.n_kv_heads
    return Family(spec.d_model, spec.n_layers, make, shared, float(block_weights(spec)), own, ())


# -- what other people's configurations say ----------------------------------------------------------------------


def _methods(s: Settings) -> tuple[list[str], list[str]]:
    """Return our methods for what a configuration says, and what is left out."""
    placed = _NORMS.get(s.norm or "pre", ())
    if s.norm == "post" and "deepnorm" in (s.say("norm") + s.say("residual_init")).lower().replace("_", ""):
        placed = ("deep_norm",)
    said = [
        *placed,
        *["qk_norm"] * bool(s.qk_norm),
        *[f"soft_cap:cap={s.attn_soft_cap}"] * bool(s.attn_soft_cap),
        *[f"final_soft_cap:cap={s.logit_soft_cap}"] * bool(s.logit_soft_cap),
        *[f"z_loss:coefficient={s.z_loss}"] * bool(s.z_loss),
        *["embed_norm"] * bool(s.embed_norm),
        *[f"logit_tap:threshold={s.qk_clip}"] * bool(s.qk_clip and not s.qk_norm),
    ]
    return list(s.methods) or said, _left_out(s)


def _left_out(s: Settings) -> list[str]:
    dense = "a dense FFN of the width that is said stands for the experts"
    rows: tuple[tuple[bool, str], ...] = (
        (bool(s.n_experts), f"{s.n_experts} experts and their router: {dense}"),
        (s.positions not in (None, "rope"), f"{s.positions} positions: rotary ones stand for them"),
        (s.positions is None, "positions are not said: taken as rotary"),
        (bool(s.biases), "biases"),
        (bool(s.dropout), f"dropout {s.dropout}"),
        (s.norm_kind not in (None, "rmsnorm", "layernorm"), f"{s.norm_kind} norms: RMSNorm stands for them"),
        (s.norm is None, "where norms stand is not said: taken as Pre-LN"),
        (s.gated_mlp is None, "the kind of MLP is not said: taken as SwiGLU"),
        (s.tied is None, "whether the head is tied is not said: taken as not"),
        (s.init_std is None, "the start is not said: taken as sqrt(2 / (5 width)), residual outputs scaled by depth"),
        (s.residual_init == "depth", "residual outputs that start smaller by layer: scaled by 1 / sqrt(2 layers)"),
        (s.dtype not in (None, "fp32"), f"{s.dtype}: computed in fp32"),
    )
    return [text for true, text in rows if true]


def _init(s: Settings, width: int) -> Part:
    """Return the start at a width: matrices by the root of the width, the embedding so that logits keep their size."""
    assert s.d_model is not None
    if s.init_std is None:
        return Part("small")
    root = math.sqrt(s.d_model / width)
    embed = s.embed_std if s.embed_std is not None else s.init_std
    fields: dict[str, Any] = {
        "std": s.init_std * root,
        # A tied head is the embedding: its logits have the deviation std * sqrt(width). Untied, it feeds the stream.
        "embedding_std": embed * root if s.tied else embed,
        "scale_residual": s.residual_init in ("scaled", "depth", None),
    }
    return Part.of("default", fields)


def _embed_scale(s: Settings, width: int) -> float | None:
    """Return the factor with which the residual stream starts as large as at full width; ``None`` for 1."""
    assert s.d_model is not None
    if s.embed_norm or any(name.startswith(("embed_", "peri_ln")) for name in s.methods):
        return None
    factor = 1.0 if s.embed_scale is None else s.embed_scale
    if s.tied and s.init_std is not None:
        factor *= math.sqrt(width / s.d_model)
    return None if factor == 1.0 else factor
