"""Rules on attention logits, output logits, kernels and the place of norms. No torch."""

from __future__ import annotations

from typing import Final

from poise.preflight.rules.base import (
    USUAL_LR_SOURCE,
    Rule,
    Verdict,
    deep_norm,
    dense_size,
    heat,
    logits_bounded,
    names,
    put,
    put_lr,
    rule,
    says,
    short,
    usual_lr,
)
from poise.preflight.settings import Settings

_WORTSMAN: Final = "Wortsman et al. 2024, arXiv 2309.14322"
_MARIN: Final = "Marin 32B retrospective (marin.readthedocs.io)"
_NO_CAP: Final = ("sdpa", "xformers", "mem_efficient", "efficient", "cudnn", "math")


def _qk_norm(s: Settings) -> Verdict | None:
    size, hot = dense_size(s), heat(s)
    if logits_bounded(s) or size is None or hot is None:
        return None
    usual = usual_lr(size)
    what = (
        f"{says(s, 'lr')} at {short(size)} weights, {hot:.2g} x the usual {usual:.2g}, and nothing bounds attention "
        f"logits ({says(s, 'qk_norm')})"
    )
    mend = f"apply qk_norm (or QK-Clip where it does not fit), or {put_lr(s, usual)}"
    if size >= 1e9 and hot >= 2:
        return Verdict("critical" if hot >= 4 else "warning", what, mend)
    if hot >= 10:
        return Verdict("warning", what, mend)
    if size >= 8e9 and hot >= 1.2:
        return Verdict("note", what, mend)
    return None


def _muon(s: Settings) -> Verdict | None:
    size = dense_size(s)
    if "muon" not in (s.optimizer or "").lower() or logits_bounded(s) or size is None or size < 1e9:
        return None
    return Verdict(
        "warning",
        f"{says(s, 'optimizer')} at {short(size)} weights, and nothing bounds attention logits ({says(s, 'qk_norm')})",
        "add QK-Clip at 100 (MuonClip) or qk_norm",
    )


def _z_loss(s: Settings) -> Verdict | None:
    hot = heat(s)
    if s.z_loss or s.logit_soft_cap or hot is None or hot < 2 or {"z_loss", "final_soft_cap"} & set(names(s)):
        return None
    size = dense_size(s)
    return Verdict(
        "warning" if size is not None and size >= 1e9 and hot >= 3 else "note",
        f"{says(s, 'lr')} is {hot:.2g} x the usual rate at this size, and {says(s, 'z_loss')}",
        f"{put(s, 'z_loss', '1e-5')} (OLMo 2) to 1e-4 (PaLM, Marin), over the full logits",
        also=("logit_soft_cap",),
    )


def _cap_kernel(s: Settings) -> Verdict | None:
    cap, kernel = s.attn_soft_cap, (s.attention_kernel or "").lower()
    if not cap:
        return None
    what = f"{says(s, 'attn_soft_cap', 'attention_kernel')}"
    if any(word in kernel for word in _NO_CAP):
        return Verdict(
            "critical", f"{what}: this kernel has no cap", "use eager or flex attention, or FlashAttention 2.6 or later"
        )
    if "flash" in kernel and "3" not in kernel and "4" not in kernel:
        return Verdict("note", what, "see that flash-attn is 2.6 or later")
    return None


def _lns(s: Settings) -> Verdict | None:
    taken = set(names(s)) & {"scaled_init", "small_init", "wesar", "depth_mup"}
    if "layer_norm_scaling" not in names(s) or not (taken or s.residual_init in ("scaled", "depth")):
        return None
    what = ", ".join(sorted(taken)) or says(s, "residual_init")
    return Verdict(
        "warning",
        f"layer_norm_scaling together with {what}",
        "start residual outputs like all other matrices (residual_init none)",
        also=("residual_init",),
    )


def _post_deep(s: Settings) -> Verdict | None:
    assert s.n_layers is not None
    if s.norm != "post" or s.n_layers < 24 or deep_norm(s):
        return None
    return Verdict("warning", f"{says(s, 'norm', 'n_layers')}", "use Pre-LN, or DeepNorm's factors for Post-LN")


def _router(s: Settings) -> Verdict | None:
    if not s.n_experts or s.router_z_loss:
        return None
    return Verdict(
        "note",
        f"{says(s, 'n_experts', 'router_z_loss')}",
        f"{put(s, 'router_z_loss', '1e-3')}, or watch the router's logits",
    )


def _big_without(s: Settings) -> Verdict | None:
    size = dense_size(s)
    if size is None or size < 8e9 or s.dtype != "fp16" or logits_bounded(s) or s.softmax_fp32:
        return None
    return Verdict(
        "warning",
        f"{short(size)} weights in fp16, attention logits not bounded ({says(s, 'qk_norm')}) and "
        f"{says(s, 'softmax_fp32')}",
        "compute attention's softmax in fp32, and apply qk_norm or train in bf16",
        also=("softmax_fp32", "dtype"),
    )


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "qk-norm-lr",
        "high learning rate without QK-norm",
        "critical",
        ("optimizer", "lr", "qk_norm"),
        _qk_norm,
        source=f"{_MARIN}; {_WORTSMAN}; usual rates: {USUAL_LR_SOURCE}",
        why="Without a bound attention logits grow until attention is one-hot, at a lower rate the larger the model. "
        "Marin 32B at 7e-4 spiked more and more; rebuilding the optimizer, NAdamW and Muon did not help, QK-norm did. "
        "OLMo 3 32B trains at 6e-4 with it.",
    ),
    rule(
        "muon-logits",
        "Muon without a bound on attention logits",
        "warning",
        ("optimizer", "qk_norm"),
        _muon,
        source="Kimi K2, arXiv 2507.20534",
        why="Moonshot's 53B test with Muon saw attention logits above 1000; with QK-Clip at 100 Kimi K2 reports no "
        "spike in 15.5T tokens.",
    ),
    rule(
        "z-loss-lr",
        "high learning rate without z-loss",
        "warning",
        ("optimizer", "lr", "z_loss"),
        _z_loss,
        source=f"Marin 8B retrospective; {_WORTSMAN}; PaLM (arXiv 2204.02311)",
        why="Output logits can drift together at high rates, and late in training; z-loss holds them. Marin 8B, "
        "without it, diverged late in its cooldown while the head's norm grew. Many runs at usual rates train without.",
    ),
    rule(
        "cap-kernel",
        "soft-cap with a kernel that lacks it",
        "critical",
        ("attn_soft_cap", "attention_kernel"),
        _cap_kernel,
        source="Gemma 2 (arXiv 2408.00118) and its model page's change to eager attention; torch's documentation of "
        "scaled_dot_product_attention",
        why="torch's scaled_dot_product_attention has no cap: the model trains, or runs, without it. FlashAttention "
        "has one from 2.6 on.",
    ),
    rule(
        "lns-scaled-init",
        "LayerNorm Scaling with scaled residual outputs",
        "warning",
        ("methods",),
        _lns,
        source="Sun et al. 2025, The Curse of Depth, arXiv 2502.05795, table 4",
        why="Both shrink deep branches; together perplexity is 25.80 / 20.79 instead of 25.76 / 20.35 at 130M / 250M.",
    ),
    rule(
        "post-norm-deep",
        "deep Post-LN",
        "warning",
        ("norm", "n_layers"),
        _post_deep,
        source="Sun et al. 2025, arXiv 2502.05795, table 1; Wang et al. 2022, DeepNet, arXiv 2203.00555",
        why="Post-LN starves early layers of gradient; at 24 layers (250M) it did not train at all, perplexity 1410 "
        "against 21.9 with Pre-LN.",
    ),
    rule(
        "router-z-loss",
        "mixture of experts without router z-loss",
        "note",
        ("n_experts", "router_z_loss"),
        _router,
        source="Zoph et al. 2022, ST-MoE, arXiv 2202.08906",
        why="Router logits grow and rounding turns routes over; ST-MoE's router z-loss stabilised training.",
    ),
    rule(
        "fp16-attention",
        "large fp16 model with unbounded attention logits",
        "warning",
        ("dtype", "qk_norm", "softmax_fp32"),
        _big_without,
        source="BigScience tr8-104B chronicles; GLM-130B (arXiv 2210.02414) computes the softmax in fp32",
        why="fp16 ends at 65504: attention logits can overflow, and the softmax loses its small terms.",
    ),
)
"""In the order of the file."""
