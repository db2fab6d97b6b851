"""What the four twin tests know of a method. Files in ``twins/`` hold a table ``TWINS``: method name -> ``Twin``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Twin:
    """What is special about a method.

    Attributes:
        reference: a subclass of ``reference_decoder.Reference`` that transcribes the paper's formulas.
        settings: words of the method as the tests use it, e.g. ``("soft_cap:cap=1",)`` so that it acts on a tiny
            model; by default the bare name.
        identity: words with which it does nothing, bit for bit; empty where there are none.
        sizes: fields of the ``Spec`` that differ from the tests' usual ones, e.g. ``{"tied": False}``.
        replaces: parameters of the plain model (by ending) that the method takes away or gives other starting
            values, with the reason. All others must be there with the same values.
        still: parameters (by ending) that need not move in three steps of AdamW, with the reason.
        outside: endings of parameters that are not moved away from their start in the parity test, e.g. because the
            formula needs them consistent.
        tolerance: relative tolerance of parity.
    """

    reference: type
    settings: tuple[str, ...] = ()
    identity: tuple[str, ...] = ()
    sizes: Mapping[str, object] = field(default_factory=dict)
    replaces: Mapping[str, str] = field(default_factory=dict)
    still: Mapping[str, str] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    tolerance: float = 1e-11


def all_twins() -> dict[str, Twin]:
    """Return the twins of all files in ``twins/``."""
    found: dict[str, Twin] = {}
    for path in sorted((HERE / "twins").glob("*.py")):
        for name, twin in importlib.import_module(f"tests.model.twins.{path.stem}").TWINS.items():
            assert name not in found, f"two twins for '{name}'"
            found[name] = twin
    return found
