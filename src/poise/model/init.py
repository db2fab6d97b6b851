"""Initialisations: the standard deviation that each matrix starts with, by its role.

Besides the roles of parameters (``Decoder.roles``) there are names for the rows of the two matrices that several
projections share: ``q``, ``k`` and ``v`` for ``qkv``, and with SwiGLU ``mlp_gate`` and ``mlp_up`` for ``mlp_in``.
``starts`` fills a model by them.
"""

from __future__ import annotations

import math
from typing import Final, Protocol

from poise.core.errors import UserError
from poise.model.place import Place
from poise.model.spec import Spec

RESIDUAL_ROLES: Final = ("attn_out", "mlp_out")
"""Matrices whose output is added to the residual stream."""


class Init(Protocol):
    """What an ``init`` slot builds.

    Attributes:
        residual: what the deviation of matrices that write into the residual stream is multiplied by, unless the slot
            ``residual_init`` says otherwise.
    """

    residual: float

    def std(self, role: str) -> float:
        """Return the standard deviation of the rows with this role, before ``residual``."""
        ...


class DefaultInit:
    """``std`` everywhere; residual outputs times ``1 / sqrt(2 N)`` (GPT-2, Radford et al. 2019).

    Args:
        place: outside the blocks.
        std: of every matrix, the untied head included.
        embedding_std: of the embedding; a tied head is the embedding.
        scale_residual: whether ``attn_out`` and ``mlp_out`` are divided by sqrt(2 N).
    """

    def __init__(
        self, place: Place, std: float = 0.02, embedding_std: float = 0.02, scale_residual: bool = True
    ) -> None:
        for name, value in (("std", std), ("embedding_std", embedding_std)):
            if isinstance(value, bool | str) or not 0 < value < math.inf:
                raise UserError(f"init {name} is {value!r}; give a finite number above 0")
        if not isinstance(scale_residual, bool):
            raise UserError(f"init scale_residual is {scale_residual!r}; give true or false")
        self._std, self._embedding_std = std, embedding_std
        self.residual = scaled_residual(place) if scale_residual else 1.0

    def std(self, role: str) -> float:
        return self._embedding_std if role == "embedding" else self._std


class SmallInit:
    """``sqrt(2 / (5 D))`` everywhere, residual outputs times ``1 / sqrt(2 N)``.

    Nguyen and Salazar 2019 (arXiv 1910.05895); the vanilla initialisation of Takase et al.
    (arXiv 2312.16903).
    """

    def __init__(self, place: Place) -> None:
        self._std = math.sqrt(2 / (5 * place.spec.d_model))
        self.residual = scaled_residual(place)

    def std(self, role: str) -> float:
        return self._std


def as_init_says(place: Place) -> None:
    """The empty ``residual_init`` and ``embed_std``: what the initialisation says by itself."""
    return


def scaled_residual(place: Place) -> float:
    """1 / sqrt(2 N) (GPT-2, Radford et al. 2019): the sum of 2 N branches is as large as one."""
    return 1 / math.sqrt(2 * place.spec.n_layers)


def plain_residual(place: Place) -> float:
    """1: matrices that write into the residual stream start like all others."""
    return 1.0


def zero_residual(place: Place) -> float:
    """0: every branch adds nothing at first."""
    return 0.0


def shares(spec: Spec, role: str) -> list[tuple[str, int]]:
    """Return the projections that share the rows of a parameter with this role: (their role, number of rows).

    A role that is no shared matrix is its own only share, with -1 for all rows.
    """
    if role == "qkv":
        rows = {"q": spec.n_heads, "k": spec.n_kv_heads, "v": spec.n_kv_heads}
        return [(name, heads * spec.head_dim) for name, heads in rows.items()]
    if role == "mlp_in" and spec.mlp == "swiglu":
        return [("mlp_gate", spec.d_ff), ("mlp_up", spec.d_ff)]
    return [(role, -1)]
