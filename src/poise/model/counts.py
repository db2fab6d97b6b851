"""How large and how costly a model is, from its ``Spec`` alone: parameters, FLOPs, bytes.

The parameters are those of the model built on the meta device, so every method's are included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from poise.core.errors import UserError
from poise.model.attention import use_matmul
from poise.model.build import build
from poise.model.losses import CHUNK_BYTES, chunk_rows
from poise.model.spec import Spec

ComputeName = Literal["float32", "bfloat16"]
WIDTH = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one training process that shards nothing.

    Attributes:
        params: fp32 weights.
        grads: fp32 gradients.
        optimizer: two fp32 moments a parameter (AdamW).
        activations: estimate of what the forward pass keeps for the backward pass.
        logits: buffers of the chunked head: one chunk of logits, and the gradient of the head.
    """

    params: int
    grads: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all; the allocator and temporary tensors come on top."""
        return self.params + self.grads + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of a spec.

    Attributes:
        spec: the model counted.
        params: all parameters; a tied head counts once.
        params_non_embedding: without the embedding and without an untied head.
        matmul_params: parameters that multiply every token: all matrices and the head, not the lookup.
        by_role: parameters by role.
    """

    spec: Spec
    params: int
    params_non_embedding: int
    matmul_params: int
    by_role: tuple[tuple[str, int], ...]

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs a token, forward and backward: ``6 · matmul_params + 12 · N · D · T``.

        The attention term counts the full T × T square, as PaLM does (Chowdhery et al. 2022,
        arXiv 2204.02311, appendix B); a kernel that skips the future does half of it.
        """
        attention = 12 * self.spec.n_layers * self.spec.d_model * self.spec.seq_len
        return 6 * self.matmul_params + attention

    def memory(self, batch: int, compute: ComputeName = "bfloat16", device: str = "cpu") -> Memory:
        """Estimate the bytes of a training step with ``batch`` sequences of ``seq_len``.

        Without activation checkpointing, methods' own activations left out. Attention is taken as the fused
        kernel where the model would use it.

        Raises:
            UserError: a batch below 1 or an unknown compute dtype.
        """
        if batch < 1:
            raise UserError(f"batch is {batch}; give at least 1 sequence")
        if compute not in WIDTH:
            raise UserError(f"compute dtype is '{compute}'; use one of {', '.join(WIDTH)}")
        spec, rows = self.spec, batch * self.spec.seq_len
        chunk = min(rows, chunk_rows(spec.vocab_size, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])))
        wide = 4 + (WIDTH[compute] if WIDTH[compute] < 4 else 0)
        head = spec.vocab_size * spec.d_model * wide
        return Memory(
            params=4 * self.params,
            grads=4 * self.params,
            optimizer=8 * self.params,
            activations=_activations(spec, batch, compute, device) + self._cast_weights(compute),
            logits=chunk * spec.vocab_size * wide + head,
        )

    def _cast_weights(self, compute: ComputeName) -> int:
        """Bytes of the block matrices cast to a narrower compute dtype, kept from forward to backward."""
        vocab = self.spec.vocab_size * self.spec.d_model
        return 0 if compute == "float32" else WIDTH[compute] * (self.matmul_params - vocab)


def count(spec: Spec) -> Counts:
    """Count a spec without allocating its weights.

    >>> from poise.model.presets import PRESETS
    >>> count(PRESETS["7m"]).params
    6819072
    """
    model = build(spec, seed=0, device="meta")
    roles = model.roles()
    by_role: dict[str, int] = {}
    matrices = 0
    for name, param in model.named_parameters():
        by_role[roles[name]] = by_role.get(roles[name], 0) + param.numel()
        if param.ndim == 2 and roles[name] != "embedding":
            matrices += param.numel()
    if spec.tied:
        matrices += by_role["embedding"]
    params = sum(by_role.values())
    outside = by_role["embedding"] + by_role.get("head", 0)
    return Counts(spec, params, params - outside, matrices, tuple(sorted(by_role.items())))


def _activations(spec: Spec, batch: int, compute: ComputeName, device: str) -> int:
    """Bytes kept for the backward pass: inputs of every matrix product, norm, softmax and nonlinearity."""
    rows = batch * spec.seq_len
    kv = 2 * spec.n_kv_heads * spec.head_dim
    # Attention: the stream (kept by the norm), its normalised copy, q and k after RoPE, v, and the mix.
    attention = 2 * spec.d_model + spec.d_model + kv + spec.d_model
    # MLP: the stream, its normalised copy, then for SwiGLU gate, up, silu(gate) and their product,
    # for GELU its input and output.
    hidden = {"swiglu": 4, "gelu": 2}[spec.mlp] * spec.d_ff
    per_row = attention + 2 * spec.d_model + hidden
    square = 0
    if use_matmul(spec.seq_len, getattr(torch, compute), device):
        square = batch * spec.n_heads * spec.seq_len**2
    else:
        # The fused kernel keeps its own output beside the reordered copy, and v as a view, which keeps the
        # whole output of the qkv product alive.
        per_row += 2 * spec.d_model + kv // 2
    ends = 3 * rows * spec.d_model  # final norm's input, its output, and the gradient made in the forward pass
    return WIDTH[compute] * (spec.n_layers * (rows * per_row + square) + ends)
