"""Published configurations: ``poise check bloom-176b`` judges one of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from poise.core.errors import UserError, nearest
from poise.preflight.presets import bigscience, dense, marin, moe, olmo, small
from poise.preflight.presets.preset import Preset

_MODULES = (olmo, marin, bigscience, dense, moe, small)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {found.name: found for module in _MODULES for found in module.PRESETS},
)
"""Name -> preset, in the order of the documentation's tables."""


def preset(name: str) -> Preset:
    """Return a published configuration.

    Raises:
        UserError: there is none of that name.

    >>> preset("bloom-176b").settings.init_std
    0.0048
    """
    if name not in PRESETS:
        raise UserError(
            f"no published configuration is called {name!r}{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}"
        )
    return PRESETS[name]
