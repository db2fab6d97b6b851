"""A model in memory: our ``Spec`` and ``Decoder``, a Hugging Face model, or any ``torch.nn.Module``.

Nothing here imports torch; whoever has a model has imported it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from poise.core.errors import UserError
from poise.model.spec import Spec
from poise.preflight.readers.draft import Draft, Found
from poise.preflight.readers.hf import read_model_config
from poise.preflight.settings import Settings

FORMAT = "model"
LOOKS_FOR = "a poise Spec or Decoder, a Hugging Face model, or a torch.nn.Module"


def sniff(thing: object) -> float:
    """Return how sure it is that ``thing`` is a model."""
    if isinstance(thing, Spec) or isinstance(getattr(thing, "spec", None), Spec):
        return 1.0
    return 0.9 if callable(getattr(thing, "named_parameters", None)) else 0.0


def read(thing: object) -> Settings:
    """Return what a model says of itself.

    Raises:
        UserError: it is none of those that are looked for.
    """
    if isinstance(thing, Spec):
        return read_spec(thing)
    if isinstance(spec := getattr(thing, "spec", None), Spec):
        return _counted(read_spec(spec, type(thing).__name__), thing)
    if not callable(getattr(thing, "named_parameters", None)):
        raise UserError(f"a {type(thing).__name__} is no model; give {LOOKS_FOR}")
    config = getattr(thing, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        data = dict(to_dict())
        kernel = getattr(config, "_attn_implementation", None)
        if isinstance(kernel, str):
            data["_attn_implementation"] = kernel
        inner = data.get("text_config")
        if isinstance(inner, Mapping) and "hidden_size" not in data:
            data = dict(inner)
        return _counted(read_model_config(data, type(thing).__name__, FORMAT), thing)
    draft = Draft(type(thing).__name__, FORMAT)
    draft.notes.append("a plain module: only its number of weights is known")
    return _counted(draft.settings(), thing)


def read_spec(spec: Spec, source: str = "Spec") -> Settings:
    """Return what a ``Spec`` says; slots are named in ``said``."""
    draft = Draft(source, FORMAT)
    for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "tied"):
        draft.put(name, Found(getattr(spec, name), f"{name} = {getattr(spec, name)}"))
    draft.put("max_positions", Found(spec.seq_len, f"seq_len = {spec.seq_len}"))
    draft.put("gated_mlp", Found(spec.mlp == "swiglu", f"mlp = {spec.mlp}"))
    of_decoder = "poise's decoder"
    for name, value in (("positions", "rope"), ("biases", False), ("n_experts", 0), ("dropout", 0.0)):
        draft.put(name, Found(value, of_decoder))
    _norms(spec, draft)
    _bounds(spec, draft)
    _start(spec, draft)
    if spec.methods:
        draft.values["methods"] = spec.methods
    return draft.settings()


def _norms(spec: Spec, draft: Draft) -> None:
    before, after = spec.branch_in.name, spec.branch_out.name
    said = f"branch_in = {before}, branch_out = {after}, residual = {spec.residual.name}"
    placed = {
        ("norm", "none"): "pre",
        ("layer_norm_scaling", "none"): "pre",
        ("norm", "norm"): "sandwich",
        ("none", "norm"): "reordered",
    }.get((before, after))
    if spec.residual.name in ("post_ln", "deep_norm"):
        placed = "post"
    draft.put("norm", Found(placed, said) if placed else None)
    draft.put("norm_kind", Found(spec.norm.name, f"norm = {spec.norm.name}"))
    embed = spec.embed_out
    draft.put("embed_norm", Found(embed.name == "embed_norm", f"embed_out = {embed.name}"))
    if embed.name == "embed_scale":
        factor = dict(embed.fields).get("factor", math.sqrt(spec.d_model))
        draft.put("embed_scale", Found(factor, f"embed_out = embed_scale, {factor:.4g}"))
    draft.put("qk_norm", Found(spec.qk.name in ("qk_norm", "ngpt"), f"qk = {spec.qk.name}"))


def _bounds(spec: Spec, draft: Draft) -> None:
    for name, slot, part in (
        ("attn_soft_cap", spec.scores, "soft_cap"),
        ("logit_soft_cap", spec.logits, "final_soft_cap"),
    ):
        cap = dict(slot.fields).get("cap") if slot.name == part else 0.0
        draft.put(name, Found(cap, f"{slot.name} with cap = {cap}" if cap else f"{part} is not applied"))
    z_losses = [dict(part.fields).get("coefficient") for part in spec.loss_terms if part.name == "z_loss"]
    said = f"z_loss with coefficient = {z_losses[0]}" if z_losses else "z_loss is not applied"
    draft.put("z_loss", Found(z_losses[0] if z_losses else 0.0, said))


def _start(spec: Spec, draft: Draft) -> None:
    """The start of matrices, for the house's own initialisations; methods that bring theirs are not judged."""
    fields: Mapping[str, Any] = dict(spec.init.fields)
    if spec.init.name == "small":
        std = math.sqrt(2 / (5 * spec.d_model))
        draft.put("init_std", Found(std, f"init = small, sqrt(2 / (5 d_model)) = {std:.4g}"))
    elif spec.init.name == "default":
        std = fields.get("std", 0.02)
        draft.put("init_std", Found(std, f"init = default, std = {std}"))
        draft.put("embed_std", Found(fields.get("embedding_std", 0.02), "init = default"))
    else:
        draft.notes.append(f"init = {spec.init.name}: the method starts matrices in its own way")
    if spec.embed_std.name == "embed_std":
        own = dict(spec.embed_std.fields)["std"]
        draft.put("embed_std", Found(own, f"embed_std with std = {own}"))
    kind = {"scaled": "scaled", "plain": "none"}.get(spec.residual_init.name)
    if spec.residual_init.name == "init" and spec.init.name in ("default", "small"):
        kind = "scaled" if fields.get("scale_residual", True) else "none"
    said = f"residual_init = {spec.residual_init.name}"
    draft.put("residual_init", Found(kind, said) if kind and "init_std" in draft.values else None)


def _counted(settings: Settings, model: Any) -> Settings:
    """Add the number of weights; those that two names share count once."""
    from dataclasses import replace

    params = sum(parameter.numel() for parameter in model.parameters())
    return replace(settings, params=float(params), said={**settings.said, "params": f"{params} weights in the model"})
