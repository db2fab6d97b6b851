"""Where a part is built: what a builder may know about its surroundings."""

from __future__ import annotations

from dataclasses import dataclass

from poise.model.spec import Spec


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one module in the model.

    Attributes:
        spec: the whole model.
        layer: 1-based number of the block (papers count so); 0 outside the blocks.
        branch: ``attn``, ``mlp``, or empty outside the branches.
    """

    spec: Spec
    layer: int = 0
    branch: str = ""
