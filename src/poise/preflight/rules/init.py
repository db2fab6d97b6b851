"""Rules on starting values: width, depth, the embedding against the sub-layers. No torch."""

from __future__ import annotations

import math
from typing import Final

from poise.preflight.rules.base import (
    Rule,
    Verdict,
    embedding_normalised,
    heat,
    logits_bounded,
    names,
    outputs_normalised,
    put,
    rule,
    says,
)
from poise.preflight.settings import Settings

LIMIT: Final = 3.0
"""What "much smaller" in Spike No More's conditions is taken to mean; equal to ``poise.model.bound.LIMIT``."""

_OWN_INIT: Final = frozenset(("mup", "u_mup", "wesar", "ngpt", "small_init"))
"""Our methods that choose the deviations themselves."""

_CHRONICLES: Final = "BigScience tr8-104B chronicles (bigscience-workshop/bigscience)"
_TAKASE: Final = "Takase et al. 2023, Spike No More, arXiv 2312.16903"


def small_std(d_model: int) -> float:
    """Return sqrt(2 / (5 width)).

    >>> round(small_std(11600), 5)
    0.00587
    """
    return math.sqrt(2 / (5 * d_model))


def residual_std(settings: Settings) -> float:
    """Return the deviation of matrices that write into the residual stream; with "depth" that of an average block."""
    assert settings.init_std is not None
    if settings.residual_init in ("scaled", "depth") and settings.n_layers:
        return settings.init_std / math.sqrt(2 * settings.n_layers)
    return settings.init_std


def stream_std(settings: Settings) -> float:
    """Return the standard deviation of the residual stream right after the embedding."""
    if embedding_normalised(settings):
        return 1.0
    std = settings.embed_std if settings.embed_std is not None else settings.init_std
    assert std is not None
    return std * (settings.embed_scale if settings.embed_scale is not None else 1.0)


def mlp_factor(d_model: int, d_ff: int, std_in: float, std_out: float, stream: float, gated: bool = False) -> float:
    """Return the bound of Spike No More's Eq. 15 minus 1 for the first MLP, after a norm.

    ``poise.model.bound`` has the derivation, and that of a gated MLP, where sigma_1 is 2 sqrt(D) sigma_gate sigma_up.

    >>> round(mlp_factor(1024, 4096, 0.01976, 0.002853, 0.01976), 1)
    26.3
    """
    inner = 2 * math.sqrt(d_model) * std_in**2 if gated else std_in
    return inner * std_out / stream * (math.sqrt(d_model) + math.sqrt(d_ff)) ** 2


def attention_condition(d_model: int, std_out: float, stream: float) -> float:
    """Return 2 sqrt(D) sigma_O / sigma_x, what the paper's condition for attention compares."""
    return 2 * math.sqrt(d_model) * std_out / stream


def _width(s: Settings) -> Verdict | None:
    assert s.init_std is not None and s.d_model is not None
    if _OWN_INIT & set(names(s)):
        return None
    small = small_std(s.d_model)
    ratio = s.init_std / small
    mend = f"{put(s, 'init_std', small)}, which is sqrt(2 / (5 width))"
    if s.init_std == 0.0:
        return Verdict(
            "critical",
            f"{s.say('init_std')}: all matrices start at zero",
            mend,
            "Nothing can be learnt: "
            "the gradient of every matrix of a branch is zero when the matrices around it are zero.",
        )
    what = f"{says(s, 'init_std')} at {says(s, 'd_model')} is {ratio:.2g} x sqrt(2 / (5 width)) = {small:.2g}"
    if ratio < 0.05:
        return Verdict(
            "note",
            what,
            mend,
            "Far below every published start: early gradients are tiny and Adam's eps "
            "and 16-bit rounding begin to count.",
        )
    if ratio < 2.2:
        return None
    guarded = logits_bounded(s) or outputs_normalised(s) or embedding_normalised(s)
    if guarded:
        return (
            Verdict("note" if ratio < 8 else "warning", what + ", with normalisation that holds it", mend)
            if (ratio >= 2.5)
            else None
        )
    also = ("dtype", "embed_norm", "qk_norm", "norm")
    if ratio >= 2.5 and (s.dtype == "fp16" or ratio >= 8):
        context = "in fp16, " if s.dtype == "fp16" else ""
        return Verdict(
            "critical",
            f"{what}; {context}without QK-norm or a norm after the embedding",
            f"{mend}, add a norm after the embedding, or use QK-norm and bf16",
            also=also,
        )
    return Verdict("warning" if ratio >= 2.5 else "note", what, mend, also=also)


def _depth(s: Settings) -> Verdict | None:
    assert s.n_layers is not None
    own = {
        "layer_norm_scaling",
        "deep_norm",
        "scaled_init",
        "depth_mup",
        "zero_init",
        "rezero",
        "skip_init",
        "layer_scale",
        "sub_ln",
    } | _OWN_INIT
    if s.norm != "pre" or s.residual_init != "none" or s.n_layers < 12 or own & set(names(s)) or outputs_normalised(s):
        return None
    wide = s.d_model is not None and s.init_std is not None and s.init_std > 2.5 * small_std(s.d_model)
    return Verdict(
        "warning" if s.n_layers >= 48 and wide else "note",
        f"{says(s, 'n_layers')} of Pre-LN, and matrices that write into the stream start as large as all others",
        f"divide the deviation of attention's and the MLP's output matrices by sqrt(2 n_layers) = "
        f"{math.sqrt(2 * s.n_layers):.3g}, or normalise what sub-layers add (OLMo 2, Peri-LN)",
        also=("init_std", "d_model"),
    )


def _embedding(s: Settings) -> Verdict | None:
    assert s.d_model is not None and s.init_std is not None
    if s.norm != "pre" or outputs_normalised(s) or _OWN_INIT & set(names(s)):
        return None
    stream, d_ff = stream_std(s), s.d_ff or 4 * s.d_model
    if stream <= 0.0 or s.init_std <= 0.0:
        return None
    out = residual_std(s)
    mlp = mlp_factor(s.d_model, d_ff, s.init_std, out, stream, bool(s.gated_mlp))
    attention = attention_condition(s.d_model, out, stream)
    if max(mlp, attention) <= LIMIT:
        return None
    hot = heat(s) or 0.0
    return Verdict(
        "warning" if s.dtype == "fp16" or (hot >= 4 and not logits_bounded(s)) else "note",
        f"the residual stream starts with a standard deviation of {stream:.2g} beside sub-layers that can enlarge a "
        f"gradient {mlp:.3g}-fold (first MLP) and by 2 sqrt(D) sigma_O / sigma_x = {attention:.3g} (first attention)",
        "bring the embedding's output to a standard deviation of about 1: embed_scale (times sqrt(width)), a norm "
        "after the embedding, or an untied embedding with std 1 and no weight decay on it"
        if stream < 0.7
        else "start the sub-layers smaller: output projections divided by sqrt(2 n_layers), or a smaller init_std",
        f"Conditions of Spike No More are that both are much smaller than 1 (here: above {LIMIT:g} is reported); its "
        "1.7B and 13B models that broke them spiked or diverged at rates where those that held them did not.",
        also=("embed_std", "embed_scale", "embed_norm", "residual_init", "d_ff"),
    )


def _tied(s: Settings) -> Verdict | None:
    assert s.d_model is not None
    std = s.embed_std if s.embed_std is not None else s.init_std
    if not s.tied or std is None or names(s).count("ngpt"):
        return None
    logit = std * math.sqrt(s.d_model)
    if logit <= 4.0:
        return None
    return Verdict(
        "critical" if logit > 30 else "warning",
        f"{says(s, 'tied')}, and the embedding starts with {std:.3g}: output logits start with a standard deviation of "
        f"{logit:.3g}",
        f"{put(s, 'embed_std', small_std(s.d_model))} and scale its output instead, or untie the head",
        also=("embed_std", "init_std"),
    )


def _decay(s: Settings) -> Verdict | None:
    if not s.decay_embeddings or not s.weight_decay:
        return None
    hot = (heat(s) or 0.0) >= 2 and not embedding_normalised(s)
    return Verdict(
        "warning" if hot else "note",
        f"weight decay ({says(s, 'weight_decay')}) acts on the embedding too",
        "leave the embedding out of weight decay",
        also=("lr", "embed_norm"),
    )


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "init-std-width",
        "starting deviation too large for the width",
        "critical",
        ("init_std", "d_model"),
        _width,
        source=f"{_CHRONICLES}, experiments to 12; BLOOM (arXiv 2211.05100); Nguyen and Salazar 2019, arXiv "
        "1910.05895; OLMo 2 (arXiv 2501.00656)",
        why="BigScience's 104B run (std 0.02 at widths 11600 and 16384, 3.4 and 4 times this) diverged again and again "
        "in fp16; std 0.006 and a norm after the embedding helped, and BLOOM used sqrt(1 / (3 width)). OLMo 2 32B "
        "trains with 0.02 at width 5120 (2.3 times), with QK-norm and normalised outputs.",
    ),
    rule(
        "init-depth",
        "residual outputs not scaled with depth",
        "warning",
        ("n_layers", "norm", "residual_init"),
        _depth,
        source=f"GPT-2 (Radford et al. 2019); {_TAKASE}, appendix B; against it OLMo 2 (arXiv 2501.00656)",
        why="The stream's variance grows with every unscaled sub-layer; Spike No More saw worse loss and spikes "
        "without 1/sqrt(2 n_layers). It is contested: OLMo 2 spikes less without an "
        "initialisation that shrinks with depth.",
    ),
    rule(
        "embed-std",
        "embedding too small beside the sub-layers (Spike No More)",
        "warning",
        ("d_model", "init_std", "n_layers", "norm"),
        _embedding,
        source=_TAKASE,
        why="A small stream beside large sub-layers multiplies gradients at every layer.",
    ),
    rule(
        "tied-embed-std",
        "tied head with a large embedding",
        "critical",
        ("tied", "d_model"),
        _tied,
        source=f"arithmetic: standard deviation = embedding's x sqrt(width) after the last norm; {_TAKASE} scales the "
        "lookup only",
        why="The head is the embedding, so the loss starts far above ln(vocabulary) and the first gradients are large.",
    ),
    rule(
        "embed-decay",
        "weight decay on the embedding",
        "warning",
        ("decay_embeddings", "weight_decay"),
        _decay,
        source="OLMo 2 (arXiv 2501.00656); Marin 8B retrospective; Megatron-LM's option embedding_init_method_std",
        why="It shrinks the stream that early layers' gradients are divided by; OLMo 2, OLMo 3 and Marin leave the "
        "embedding out, and OLMo 2 reports fewer gradient spikes for it.",
    ),
)
"""In the order of the file."""
