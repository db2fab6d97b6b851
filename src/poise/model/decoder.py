"""The decoder: embedding, trunk of blocks, head and loss. It builds what the spec says and knows no method.

Shapes: B batch, T positions, D width, V vocabulary, N = B·T rows.
"""

from __future__ import annotations

import math
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise.core.errors import UserError
from poise.model.attention import Rope
from poise.model.blocks import Block, Carry
from poise.model.documents import checked
from poise.model.layers import Embedding, Head
from poise.model.losses import LossOutput, chunked_cross_entropy
from poise.model.place import Place
from poise.model.slots import LrScale, make, make_part
from poise.model.spec import Spec
from poise.model.starts import roles_of

PENALTY: Final = "penalty"
"""Name under which the blocks' penalties are reported among the parts of the loss."""


class Trunk(nn.Module):
    """Blocks and the final norm: embedded tokens in, final hidden states out, both (B, T, D); and the sum of the
    blocks' penalties, where a method has any.

    Attributes:
        recompute: whether a block's activations are forgotten after the forward pass and computed again in the backward
            pass (activation checkpointing, Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        place = Place(spec)
        self.rope = Rope(place)
        self.blocks = nn.ModuleList(Block(Place(spec, layer)) for layer in range(1, spec.n_layers + 1))
        self.norm = make("final_norm", place)
        self.recompute = False

    def forward(self, x_BTD: Tensor, documents_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        carry = Carry()
        documents = None if documents_BT is None else self.rope.documents(documents_BT)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTD, carry = checkpoint(block, x_BTD, self.rope, carry, documents, use_reentrant=False)
            else:
                x_BTD, carry = block(x_BTD, self.rope, carry, documents)
        return self.norm(x_BTD), carry.penalty


class Decoder(nn.Module):
    """A decoder-only language model built from a ``Spec``. Make one with ``poise.model.build.build``.

    Attributes:
        spec: what it was built from.
        compute_dtype: dtype of the residual stream and of every matrix product; parameters stay fp32.
        trunk: the blocks and the final norm.
    """

    def __init__(self, spec: Spec, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        place = Place(spec)
        self.spec, self.compute_dtype = spec, compute_dtype
        self.embedding = Embedding(spec.vocab_size, spec.d_model)
        self.embed_grad, self.embed_out = make("embed_grad", place), make("embed_out", place)
        self.trunk = Trunk(spec)
        self.head = None if spec.tied else Head(spec.vocab_size, spec.d_model)
        self.head_in, self.head_map = make("head_in", place), make("head", place)
        self.transform = make("logits", place)
        self.terms = nn.ModuleDict({p.name: make_part("loss_terms", p, place) for p in spec.loss_terms})
        self._taps = nn.ModuleDict({"embed": nn.Identity(), "final": nn.Identity()})

    def forward(
        self, inputs_BT: Tensor, targets_BT: Tensor, *, documents_BT: Tensor | None = None, token_loss: bool = False
    ) -> LossOutput:
        """Return the training loss; the head is used in here, so the model can be an FSDP2 root.

        Args:
            inputs_BT: token ids, int64.
            targets_BT: the token after each, int64; ``IGNORE`` where it does not count.
            documents_BT: a number for the document of each position, int32 or int64: neighbours of equal number are of
                one document. Attention then stays within a document, and positions count from its first token. Without
                it a row is one document. Targets are not changed: the one at a document's last token is the caller's.
            token_loss: also return the cross-entropy of each position.

        Raises:
            UserError: sequences longer than ``spec.seq_len``; documents of another shape, or not integers.
        """
        hidden_BTD, penalty = self._hidden(inputs_BT, documents_BT)
        loss, ce, log_z, means, token_N = chunked_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.head_weight,
            targets_BT.flatten(),
            terms=tuple(self.terms.values()),
            transform=self.transform,
        )
        parts = dict(zip(self.terms, means, strict=True))
        if penalty is not None:
            loss = loss + penalty
            parts[PENALTY] = penalty.detach()
        return LossOutput(loss, ce, log_z, parts, token_N.view_as(targets_BT) if token_loss else None)

    def hidden(self, inputs_BT: Tensor, *, documents_BT: Tensor | None = None) -> Tensor:
        """Return the input of the output head, (B, T, D), in the compute dtype."""
        return self._hidden(inputs_BT, documents_BT)[0]

    def _hidden(self, inputs_BT: Tensor, documents_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        T = inputs_BT.shape[1]
        if self.spec.seq_len < T:
            raise UserError(f"a sequence of {T} tokens is longer than the model's seq_len {self.spec.seq_len}")
        x_BTD = self.embed_out(self.embed_grad(self.embedding(inputs_BT))).to(self.compute_dtype)
        x_BTD = self._taps["embed"](x_BTD)
        packed = () if documents_BT is None else (checked(documents_BT, inputs_BT),)
        final_BTD, penalty = self.trunk(x_BTD, *packed)
        return self.head_in(self._taps["final"](final_BTD)), penalty

    def logits(self, inputs_BT: Tensor, *, documents_BT: Tensor | None = None) -> Tensor:
        """Return the output logits (B, T, V) in fp32; for evaluation and generation, not for training."""
        hidden_BTD = self.hidden(inputs_BT, documents_BT=documents_BT)
        raw_BTV = F.linear(hidden_BTD, self.head_weight.to(hidden_BTD.dtype))
        out: Tensor = self.transform(raw_BTV.to(torch.promote_types(raw_BTV.dtype, torch.float32)))
        return out

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) output matrix; the embedding itself when tied."""
        weight_VD: Tensor = self.head_map(self.embedding.weight if self.head is None else self.head.weight)
        return weight_VD

    def roles(self) -> dict[str, str]:
        """Return the role of every parameter by name: ``embedding``, ``norm``, ``qkv``, ``attn_out``, ..."""
        return roles_of(self)

    def lr_multipliers(self) -> dict[str, float]:
        """Return each role's share of the learning rate, for Adam and its kin; empty where no method says anything."""
        scales = self._lr_scales()
        roles = sorted(set(self.roles().values())) if scales else []
        return {role: math.prod(scale.of(role) for scale in scales) for role in roles}

    @property
    def fixed_decay(self) -> bool:
        """Whether a parameter's learning rate times its weight decay is to stay what it is without multipliers."""
        return any(scale.fixed_decay for scale in self._lr_scales())

    def _lr_scales(self) -> list[LrScale]:
        return [make_part("lr_scales", part, Place(self.spec)) for part in self.spec.lr_scales]

    def taps(self) -> dict[str, nn.Module]:
        """Return the places to listen to, by name: identity modules to put a forward hook on.

        Names are ``embed``, ``block.<0-based number>.<place>`` and ``final``; ``docs/model.md`` lists them.
        """
        found = {"embed": self._taps["embed"]}
        for number, block in enumerate(cast(list[Any], self.trunk.blocks)):
            for owner in (block.attn, block.mlp, block):
                found |= {f"block.{number}.{name}": tap for name, tap in owner.taps.items()}
        return found | {"final": self._taps["final"]}

    def recompute_blocks(self, wanted: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the rest again: less memory, more time."""
        self.trunk.recompute = wanted

    def compile_trunk(self) -> None:
        """Compile the trunk in place; names of parameters do not change. Hook taps before, not after."""
        self.trunk.compile(fullgraph=True, dynamic=False)
