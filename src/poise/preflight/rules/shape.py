"""Rules on the model's shape: typing errors, sizes that do not fit, sizes that kernels dislike. No torch."""

from __future__ import annotations

import math
from typing import Final

from poise.preflight.rules.base import Rule, Verdict, put, rule, says
from poise.preflight.settings import Settings

WIDTHS: Final = (1024, 2048, 2560, 4096, 5120, 6656, 7168, 8192, 11600, 12288, 14336, 16384)
"""Widths of well-known models, to name the one whose FFN was left behind."""

FFNS: Final = {
    11008: ((4096, 2048), "Llama 7B's"),
    13824: ((5120,), "Llama 13B's"),
    14336: ((4096, 3584, 5120), "Llama 3 8B's"),
    17920: ((6656, 5120), "Llama 33B's"),
    18944: ((3584,), "Qwen2.5 7B's"),
    22016: ((8192,), "Llama 65B's"),
    27648: ((5120,), "OLMo 2 32B's"),
    28672: ((8192, 12288), "Llama 3 70B's"),
    29568: ((8192,), "Qwen2.5 72B's"),
    53248: ((16384,), "Llama 3 405B's"),
}
"""FFN width of a well-known gated model -> (widths at which published models have it, whose it is)."""

_CHRONICLES: Final = "BigScience tr8-104B chronicles, experiment 6 (bigscience-workshop/bigscience)"


def _ffn(s: Settings) -> Verdict | None:
    assert s.d_ff is not None and s.d_model is not None
    if s.n_experts:
        return None  # an expert's width may be anything
    ratio = s.d_ff / s.d_model
    block = 256 if s.d_model >= 1024 else 64 if s.d_model >= 256 else 8
    usual = max(block, -(-8 * s.d_model // (3 * block)) * block) if s.gated_mlp else 4 * s.d_model
    mend = (
        f"{put(s, 'd_ff', usual)} ({'8/3' if s.gated_mlp else '4'} x width), or leave it out if the framework "
        "computes it"
    )
    if s.d_ff != usual and 2.0 <= ratio <= 8.0 and (whose := _another_ffn(s.d_ff, s.d_model, s.gated_mlp)):
        what = f"{says(s, 'd_ff', 'd_model')}: the FFN is {ratio:.3g} times the width; it is {whose}"
        return Verdict("warning", what, f"{mend}; nothing if it was chosen", also=("gated_mlp",))
    if 2.0 <= ratio <= (8.0 if s.gated_mlp else 6.0):
        if s.gated_mlp is False and not 3.0 <= ratio <= 5.0:
            return Verdict("note", f"{says(s, 'd_ff', 'd_model')}: {ratio:.3g} times the width", mend)
        return None
    other = [w for w in WIDTHS if w != s.d_model and s.d_ff in (4 * w, round(8 * w / 3))]
    whose = _another_ffn(s.d_ff, s.d_model, s.gated_mlp)
    hint = f"; it is {s.d_ff / other[0]:.3g} x {other[0]}, another model's width" if other else ""
    hint = hint or (f"; it is {whose}" if whose else "")
    return Verdict(
        "warning",
        f"{says(s, 'd_ff', 'd_model')}: the FFN is {ratio:.3g} times the width{hint}",
        mend,
    )


def _another_ffn(d_ff: int, d_model: int, gated: bool | None) -> str:
    """Return whose FFN width it is, where no model of this width that we know has it; else nothing."""
    widths, whose = FFNS.get(d_ff, ((), ""))
    if widths and d_model not in widths:
        return f"{whose}, whose width is {widths[0]}"
    if gated is False and d_ff // 4 in WIDTHS and d_ff % 4 == 0 and d_ff >= 16384 and d_ff != 4 * d_model:
        return f"4 x {d_ff // 4}, another model's width"
    return ""


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def fitting_heads(s: Settings) -> int:
    """Return the number of heads that divides the width and is nearest to what is said.

    Heads are 32 to 256 wide where that can be; of two equally near ones those 64 or 128 wide are taken.
    """
    assert s.d_model is not None and s.n_heads is not None
    heads, width = s.n_heads, s.d_model
    if s.head_dim is not None or width % heads == 0:
        return heads
    found = divisors(width)
    if s.positions == "rope":  # which turns pairs
        found = [n for n in found if width // n % 2 == 0] or found
    found = [n for n in found if 32 <= width // n <= 256] or found
    return min(found, key=lambda n: (abs(n - heads), width // n not in (64, 128), n))


def fitting_kv_heads(s: Settings, heads: int) -> int:
    """Return the number of key/value heads that divides ``heads`` and is nearest to what is said."""
    assert s.n_kv_heads is not None
    said = s.n_kv_heads
    return min(divisors(heads), key=lambda n: (abs(n - said), n))


def _heads_mend(s: Settings) -> str:
    """Return what to write for heads and key/value heads so that both fit."""
    heads = fitting_heads(s) if s.d_model is not None else s.n_heads
    assert heads is not None
    out = [put(s, "n_heads", heads)] if heads != s.n_heads else []
    if s.n_kv_heads is not None:
        kv = fitting_kv_heads(s, heads)
        out += [put(s, "n_kv_heads", kv)] if kv != s.n_kv_heads else []
    return ", ".join(out)


def _heads(s: Settings) -> Verdict | None:
    assert s.d_model is not None and s.n_heads is not None
    if s.head_dim is not None or s.d_model % s.n_heads == 0:
        return None
    return Verdict(
        "critical",
        f"{says(s, 'd_model', 'n_heads')}: the width is no multiple of the heads, and head_dim is not said",
        _heads_mend(s),
        also=("head_dim", "n_kv_heads"),
    )


def _inner(s: Settings) -> Verdict | None:
    assert s.d_model is not None and s.n_heads is not None and s.head_dim is not None
    inner = s.n_heads * s.head_dim
    if inner == s.d_model:
        return None
    return Verdict(
        "note",
        f"{says(s, 'n_heads', 'head_dim')}: heads x head_dim = {inner}, and {says(s, 'd_model')}",
        "nothing if it is meant; else see which of the three is another model's",
    )


def _kv(s: Settings) -> Verdict | None:
    assert s.n_heads is not None and s.n_kv_heads is not None
    if s.n_heads % s.n_kv_heads == 0:
        return None
    return Verdict(
        "critical",
        f"{says(s, 'n_heads', 'n_kv_heads')}: query heads cannot be shared out evenly",
        _heads_mend(s),
        also=("d_model",),
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
    up = [_up(s, name) for name in odd]
    return Verdict(
        "note",
        f"{says(s, *odd)}: not a multiple of 64 (head_dim: 8)",
        ", ".join(up) if all(up) else "multiples of 64, and a width that the heads divide",
        also=("d_ff", "head_dim", "n_heads"),
    )


def _up(s: Settings, name: str) -> str:
    """Return the next size that kernels like and heads divide; nothing where that is far away."""
    value, of = getattr(s, name), 8 if name == "head_dim" else 64
    if name == "d_model" and s.n_heads and s.head_dim is None:
        of = math.lcm(64, s.n_heads * (2 if s.positions == "rope" else 1))
    larger = -(-value // of) * of
    return put(s, name, larger) if larger <= 1.25 * value else ""


def _vocab_padding(s: Settings) -> Verdict | None:
    assert s.vocab_size is not None
    if s.vocab_size % 64 == 0 or s.vocab_size < 8192 or s.format == "megatron":
        return None  # Megatron pads by itself
    return Verdict(
        "note",
        f"{says(s, 'vocab_size')} is no multiple of 64",
        f"{put(s, 'vocab_size', -(-s.vocab_size // 128) * 128)}; ids above the tokenizer's are never a target",
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
        "heads-inner",
        "heads times head width is not the width: meant?",
        "note",
        ("d_model", "n_heads", "head_dim"),
        _inner,
        source="published shapes of Qwen 3, Gemma and DeepSeek-V3",
        why="Qwen 3, Gemma and models with latent attention choose it; where it was not chosen, a number was left from "
        "another model.",
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
