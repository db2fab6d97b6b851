"""Rules on the model's shape: typing errors, sizes that do not fit, sizes that kernels dislike. No torch."""

from __future__ import annotations

from typing import Final

from poise.preflight.rules.base import Rule, Verdict, rule, says
from poise.preflight.settings import Settings

WIDTHS: Final = (1024, 2048, 2560, 4096, 5120, 6656, 7168, 8192, 11600, 12288, 14336, 16384)
"""Widths of well-known models, to name the one whose FFN was left behind."""

_CHRONICLES: Final = "BigScience tr8-104B chronicles, experiment 6 (bigscience-workshop/bigscience)"


def _ffn(s: Settings) -> Verdict | None:
    assert s.d_ff is not None and s.d_model is not None
    if s.n_experts:
        return None  # an expert's width may be anything
    ratio = s.d_ff / s.d_model
    usual = round(8 * s.d_model / 3 / 64) * 64 if s.gated_mlp else 4 * s.d_model
    if 2.0 <= ratio <= (8.0 if s.gated_mlp else 6.0):
        if s.gated_mlp is False and not 3.0 <= ratio <= 5.0:
            return Verdict("note", f"{says(s, 'd_ff', 'd_model')}: {ratio:.3g} times the width", f"4 x width = {usual}")
        return None
    other = [w for w in WIDTHS if w != s.d_model and s.d_ff in (4 * w, round(8 * w / 3))]
    hint = f"; it is {s.d_ff / other[0]:.3g} x {other[0]}, another model's width" if other else ""
    return Verdict(
        "warning",
        f"{says(s, 'd_ff', 'd_model')}: the FFN is {ratio:.3g} times the width{hint}",
        f"set it to {usual} ({'8/3' if s.gated_mlp else '4'} x width), or leave it out if the framework computes it",
    )


def _heads(s: Settings) -> Verdict | None:
    assert s.d_model is not None and s.n_heads is not None
    if s.head_dim is None:
        if s.d_model % s.n_heads == 0:
            return None
        lower = (
            next((n for n in range(min(s.n_heads, s.d_model), 0, -1) if s.d_model % n == 0), 1)
            if (s.d_model < 1_000_000)
            else 1
        )
        return Verdict(
            "critical",
            f"{says(s, 'd_model', 'n_heads')}: the width is no multiple of the heads",
            f"e.g. n_heads = {lower}",
        )
    inner = s.n_heads * s.head_dim
    if inner == s.d_model:
        return None
    return Verdict(
        "warning" if not 0.25 <= inner / s.d_model <= 4.0 else "note",
        f"{says(s, 'n_heads', 'head_dim')}: heads x head_dim = {inner}, and {says(s, 'd_model')}",
        f"head_dim = {s.d_model / s.n_heads:g} makes them equal",
        "Some models choose it (Qwen 3, Gemma, multi-head latent attention); where it was not chosen, a number was "
        "left from another model.",
        also=("head_dim",),
    )


def _kv(s: Settings) -> Verdict | None:
    assert s.n_heads is not None and s.n_kv_heads is not None
    if s.n_heads % s.n_kv_heads == 0:
        return None
    fit = max(n for n in range(1, 129) if s.n_heads % n == 0 and n <= max(s.n_kv_heads, 1))
    return Verdict(
        "critical",
        f"{says(s, 'n_heads', 'n_kv_heads')}: query heads cannot be shared out evenly",
        f"n_kv_heads = {fit}",
    )


def _head_dim(s: Settings) -> Verdict | None:
    assert s.d_model is not None and s.n_heads is not None
    width = s.head_dim if s.head_dim is not None else s.d_model / s.n_heads
    if s.positions == "rope" and width % 2:
        return Verdict(
            "critical",
            f"the head width is {width:g}, and rotary positions turn pairs",
            "choose an even head width",
            "Rotary positions need an even head width.",
            also=("head_dim", "positions"),
        )
    if s.d_model < 512 or 32 <= width <= 256:
        return None
    return Verdict("note", f"the head width is {width:g}", "64 or 128 is usual", also=("head_dim",))


def _multiples(s: Settings) -> Verdict | None:
    assert s.d_model is not None
    if s.d_model < 512:
        return None
    odd = [
        name
        for name in ("d_model", "d_ff", "head_dim")
        if (value := getattr(s, name)) and value % (8 if name == "head_dim" else 64)
    ]
    if not odd:
        return None
    up = ", ".join(f"{name} = {-(-getattr(s, name) // 64) * 64}" for name in odd)
    return Verdict("note", f"{says(s, *odd)}: not a multiple of 64 (head_dim: 8)", up, also=("d_ff", "head_dim"))


def _vocab_padding(s: Settings) -> Verdict | None:
    assert s.vocab_size is not None
    if s.vocab_size % 64 == 0 or s.vocab_size < 8192 or s.format == "megatron":
        return None  # Megatron pads by itself
    return Verdict(
        "note",
        f"{says(s, 'vocab_size')} is no multiple of 64",
        f"pad the table to {-(-s.vocab_size // 128) * 128}; ids above the tokenizer's are never a target",
    )


def _width_depth(s: Settings) -> Verdict | None:
    assert s.d_model is not None and s.n_layers is not None
    ratio = s.d_model / s.n_layers
    if s.d_model < 2048 or ratio <= 300:
        return None
    return Verdict(
        "note",
        f"{says(s, 'd_model', 'n_layers')}: width / depth is {ratio:.0f}",
        f"about {round(s.d_model / 130)} layers would be usual at this width",
    )


RULES: Final[tuple[Rule, ...]] = (
    rule(
        "ffn-width",
        "FFN width of another model",
        "warning",
        ("d_ff", "d_model"),
        _ffn,
        source=_CHRONICLES,
        why="BigScience's 104B run kept the 13B model's FFN width (20480 at width 16384) through five experiments: it "
        "was a lopsided 58B model all along.",
    ),
    rule(
        "heads-width",
        "heads and width do not fit",
        "critical",
        ("d_model", "n_heads"),
        _heads,
        source="arithmetic of multi-head attention",
        why="The width is split into heads; what does not divide fails when the model is built.",
    ),
    rule(
        "kv-heads",
        "key/value heads do not divide the query heads",
        "critical",
        ("n_heads", "n_kv_heads"),
        _kv,
        source="Ainslie et al. 2023, grouped-query attention, arXiv 2305.13245",
        why="Every key/value head serves the same number of query heads.",
    ),
    rule(
        "head-dim",
        "unusual head width",
        "critical",
        ("d_model", "n_heads"),
        _head_dim,
        source="Su et al. 2021, arXiv 2104.09864; flash-attention's limit of 256",
        why="Flash kernels take head widths up to 256, and very narrow heads waste them.",
    ),
    rule(
        "size-multiples",
        "sizes that matrix kernels dislike",
        "note",
        ("d_model",),
        _multiples,
        source="NVIDIA, matrix multiplication background user's guide",
        why="Tensor cores work on blocks; other sizes are padded inside and run slower. Only speed.",
    ),
    rule(
        "vocab-padding",
        "vocabulary not padded",
        "note",
        ("vocab_size",),
        _vocab_padding,
        source="Megatron-LM's make-vocab-size-divisible-by; nanoGPT pads 50257 to 50304",
        why="The output matrix is the largest product; a padded one is faster. Only speed.",
    ),
    rule(
        "width-depth",
        "very wide for its depth",
        "note",
        ("d_model", "n_layers"),
        _width_depth,
        source="BigScience tr8-104B chronicles, experiment 7",
        why="The first 104B shape had 512; going to 180 did not cure it, but published models lie between 60 and 210.",
    ),
)
"""In the order of the file."""
