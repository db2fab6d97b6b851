"""Ready-made specs, from seconds on a laptop to a billion parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from poise.core.errors import UserError, nearest
from poise.model.spec import Spec

PRESETS: Final[Mapping[str, Spec]] = MappingProxyType(
    {
        # About 5M parameters: a first run in minutes.
        "nano": Spec(vocab_size=8192, seq_len=256, n_layers=4, d_model=256, n_heads=4, n_kv_heads=4, d_ff=704),
        # GPT-shaped, the shape of the speed benchmarks.
        "7m": Spec(
            vocab_size=8192,
            seq_len=256,
            n_layers=6,
            d_model=256,
            n_heads=4,
            n_kv_heads=4,
            d_ff=1024,
            mlp="gelu",
        ),
        "30m": Spec(
            vocab_size=8192,
            seq_len=256,
            n_layers=8,
            d_model=512,
            n_heads=8,
            n_kv_heads=8,
            d_ff=2048,
            mlp="gelu",
        ),
        # Llama-shaped with grouped-query attention, about the size of 30m.
        "small": Spec(vocab_size=16384, seq_len=512, n_layers=8, d_model=512, n_heads=8, n_kv_heads=4, d_ff=1408),
        "100m": Spec(vocab_size=32768, seq_len=1024, n_layers=12, d_model=768, n_heads=12, n_kv_heads=4, d_ff=2048),
        "1b": Spec(
            vocab_size=32768,
            seq_len=2048,
            n_layers=16,
            d_model=2048,
            n_heads=32,
            n_kv_heads=8,
            d_ff=8192,
            tied=False,
            rope_theta=500000.0,
        ),
    }
)


def preset(name: str) -> Spec:
    """Return a preset by name.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"no model preset '{name}'{nearest(name, PRESETS)}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
