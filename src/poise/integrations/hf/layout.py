"""Where things are in a transformers decoder: one look at the model, and a clear refusal where it is another kind."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from poise.core.errors import UserError

MODEL_TYPES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""``config.model_type`` of the models whose layout is known and tested."""

_LAYER: Final = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True, eq=False)
class Sites:
    """A causal language model and the places in it that methods act on.

    Attributes:
        model: the whole, with its head.
        body: embedding, layers and final norm.
        layers: the decoder layers, first to last.
        applied: names of methods that are in it from earlier calls.
    """

    model: Any
    body: Any
    layers: tuple[Any, ...]
    applied: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return int(self.layers[0].self_attn.head_dim)

    @property
    def eps(self) -> float:
        """The constant in the model's own norms."""
        return float(self.model.config.rms_norm_eps)


def find(model: Any) -> Sites:
    """Return the places in ``model``.

    Raises:
        UserError: not a transformers causal language model of a known kind, wrapped or sharded already, or its
            projections are not plain matrices (LoRA, quantised weights).
    """
    accepted = f"give a causal language model of transformers ({', '.join(MODEL_TYPES)})"
    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(f"methods cannot be put on a {type(model).__name__}; {accepted}, before anything wraps it")
    whole: Any = model
    kind = whole.config.model_type
    if kind not in MODEL_TYPES:
        raise UserError(f"methods cannot be put on a model of type '{kind}': its layout is not known; {accepted}")
    body = getattr(whole, "model", None)
    if body is None or whole.get_output_embeddings() is None or not hasattr(body, "layers"):
        raise UserError(f"a {type(model).__name__} has no output head over a vocabulary; {accepted}")
    for number, layer in enumerate(body.layers):
        for path in _LAYER:
            try:
                module = layer.get_submodule(path)
            except AttributeError:
                raise UserError(f"layer {number} of this '{kind}' model has no {path}; {accepted}") from None
            if path.endswith("_proj"):
                _check_matrix(module, f"layers.{number}.{path}")
    return Sites(whole, body, tuple(body.layers))


def _check_matrix(module: nn.Module, where: str) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UserError(
            f"{where} is a {type(module).__name__}, not a plain nn.Linear (LoRA and quantised models are not"
            " supported); apply the methods to the model as it is made from its config"
        )
    if hasattr(weight, "to_local"):
        raise UserError(f"{where} is sharded; apply the methods before fully_shard and tensor parallelism")


def is_trained(sites: Sites) -> bool:
    """Return whether the weights show training: gains of norms start at exactly one, biases at one value.

    May miss it: gains and biases that were frozen, or whose updates were lost in the rounding of low precision.
    """
    for module in sites.body.modules():
        gain = getattr(module, "weight", None) if type(module).__name__.endswith("Norm") else None
        if isinstance(gain, Tensor) and not gain.is_meta and not bool((gain == 1).all()):
            return True
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and not bias.is_meta and not bool((bias == bias[:1]).all()):
            return True
    return False


def own_config(model: Any) -> None:
    """Give the model a config of its own: one config object may have made several models."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
