"""The rule on values that no other rule can use, and the cleaning that keeps the others safe. No torch."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, Final

from poise.preflight.rules.base import Rule, Verdict, rule, weak
from poise.preflight.settings import Settings

_AT_LEAST_ONE: Final = (
    "n_layers",
    "d_model",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "vocab_size",
    "max_positions",
    "batch_sequences",
    "seq_len",
    "ramp_from",
    "total_steps",
    "tokenizer_vocab",
    "devices",
)
_ABOVE_ZERO: Final = ("lr", "dataset_tokens", "step_seconds", "params")
_OTHER: Final = frozenset(("source", "format", "methods", "said", "notes"))
_KINDS: Final = {
    field.name: str(field.type).partition(" ")[0] for field in fields(Settings) if field.name not in _OTHER
}
"""Field -> ``int``, ``float``, ``bool``, or what kind of text it is, as ``Settings`` declares it."""

LARGEST: Final = 1e18
SMALLEST: Final = 1e-40
"""Outside these a number that is not 0 is a mistake."""


MOST: Final = {
    "n_layers": 1e5,
    "d_model": 1e7,
    "head_dim": 1e6,
    "n_heads": 1e6,
    "n_kv_heads": 1e6,
    "d_ff": 1e8,
    "vocab_size": 1e8,
    "tokenizer_vocab": 1e8,
    "n_experts": 1e6,
    "seq_len": 1e10,
    "batch_sequences": 1e9,
    "ramp_from": 1e9,
    "devices": 1e7,
    "params": 1e16,
    "init_std": 1e6,
    "embed_std": 1e6,
    "lr": 1e6,
}
"""Field -> the largest value that can be meant; far above every model there is."""


def problem(name: str, value: Any) -> str:
    """Return why a field's value cannot be used; nothing where it can, or is not said.

    >>> problem("lr", float("nan")), problem("n_layers", 12), problem("clip", -1)
    ('is not finite', '', 'is below 0')
    """
    kind = _KINDS.get(name)
    if value is None or kind is None:
        return ""
    if kind == "bool":
        return "" if isinstance(value, bool) else "is neither true nor false"
    if kind not in ("int", "float"):
        return "" if isinstance(value, str) else "is no text"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "is no number"
    if isinstance(value, float) and not math.isfinite(value):
        return "is not finite"
    if abs(value) > MOST.get(name, LARGEST):
        return "is far too large"
    if value < 0:
        return "is below 0"
    if kind == "int" and value != int(value):
        return "is no whole number"
    if name in _AT_LEAST_ONE + _ABOVE_ZERO and value == 0:
        return "is 0"
    if 0 < value < SMALLEST:
        return "is far too small"
    return ""


def problems(settings: Settings) -> dict[str, str]:
    """Return why fields cannot be used, by field."""
    found = {field.name: problem(field.name, getattr(settings, field.name)) for field in fields(settings)}
    return {name: text for name, text in found.items() if text}


def cleaned(settings: Settings) -> Settings:
    """Return the settings without values that cannot be used; whole numbers are ``int``, as 4096.0 is.

    fp16 that nobody wrote is not said either: the dtype of a file on disk is not that of the training.
    """
    changed: dict[str, Any] = dict.fromkeys(problems(settings))
    if settings.dtype == "fp16" and weak(settings, "dtype"):
        changed["dtype"] = None
    for name, kind in _KINDS.items():
        value = getattr(settings, name)
        if kind == "int" and isinstance(value, float) and name not in changed:
            changed[name] = int(value)
    return replace(settings, **changed) if changed else settings


def _unusable(s: Settings) -> Verdict | None:
    found = problems(s)
    if not found:
        return None
    what = "; ".join(
        f"{s.said.get(name) or f'{name} = {_brief(getattr(s, name))}'} {text}" for name, text in found.items()
    )
    return Verdict("critical", what, f"give {', '.join(found)} a usable value", also=tuple(found))


def _brief(value: Any) -> str:
    return (
        f"{float(value):g}"
        if isinstance(value, float)
        else str(value)[:40]
        if not isinstance(value, int)
        else (str(value) if abs(value) < 10**20 else "a number of more than 20 digits")
    )


UNUSABLE: Final[Rule] = rule(
    "unusable-value",
    "a value that cannot be meant",
    "critical",
    (),
    _unusable,
    source="arithmetic",
    why="Sizes, rates and intervals are finite and not negative; the other rules leave such a value out.",
)
"""The one rule that sees the settings as they are."""

RULES: Final[tuple[Rule, ...]] = (UNUSABLE,)
