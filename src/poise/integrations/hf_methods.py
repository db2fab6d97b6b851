"""Stability methods on a transformers causal language model (Llama, Mistral, Qwen2, Qwen3), before training.

    model = poise.apply(LlamaForCausalLM(config), "qk_norm", "z_loss:coefficient=1e-5")

The model is changed in place and returned. What a method adds are ordinary submodules that work through forward hooks:
names and classes of the model's own modules stay, new parameters are in ``state_dict``, and ``generate``, gradient
checkpointing, ``Trainer``, DDP and ``fully_shard`` (afterwards) see a normal model. ``config.poise_methods`` lists
what was applied with all settings, so that it is saved with the model; the config becomes the model's own copy.

To load: make the model from its saved config, ``poise.apply(model, *model.config.poise_methods)``, load the weights;
``poise.load_hf(folder)`` does the three. Plain ``from_pretrained`` makes a model without the methods, which
transformers says (as unexpected keys) only where a method has parameters.

Not built here: what needs another decoder layer (Post-LN, Mix-LN, value residual) or computed weights (σReparam).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from poise.core.errors import Conflict, UserError, nearest
from poise.integrations.hf.layout import find, is_trained, own_config
from poise.integrations.hf.loss import ReportZLoss
from poise.integrations.hf.methods import EXCLUDES, METHODS, HfMethod
from poise.integrations.hf.parts import Seats

__all__ = ["METHODS", "RECORD", "ReportZLoss", "applied", "apply_hf", "load_hf"]

Value = str | int | float | bool
Wanted = str | tuple[str, Mapping[str, Value]]
"""A method's name, alone or with its settings."""

RECORD: Final = "poise_methods"
"""Name in the model's config of the list of what was applied, as ``poise.apply`` takes it."""

_OWN: Final = "_poise_methods"
"""Attribute of a model that methods were put on: their names and settings. A config may be that of another model."""


def apply_hf(model: PreTrainedModel, *wanted: Wanted) -> PreTrainedModel:
    """Put methods on ``model`` in place and return it. On an error nothing has been changed.

    Args:
        model: as made from its config: plain weights, not wrapped, not sharded, not trained (only ``z_loss`` and
            ``embed_detach`` go on a trained one).
        wanted: names, or pairs of a name and its settings.

    Raises:
        UserError: a model of another kind, an unknown method or setting, or a model that cannot have it.
        Conflict: two methods claim one place or exclude each other, or one is there already.
    """
    sites = find(model)
    earlier: list[tuple[str, HfMethod]] = list(getattr(model, _OWN, ()))
    new = [_made(name, settings) for name, settings in ((w, {}) if isinstance(w, str) else w for w in wanted)]
    _check_pairs(earlier, new)
    trained = is_trained(sites)
    for name, method in new:
        if trained and not method.keeps_function:
            raise UserError(
                f"this model has been trained, and '{name}' would change what it computes; apply it before training"
                " (to load a model saved with methods: poise.load_hf)"
            )
        method.check(sites)
    own_config(model)
    for name, method in sorted(new, key=lambda pair: pair[0] == "small_init"):  # it also draws what others add
        seats = Seats(name)
        method.act(dataclasses.replace(sites, applied=tuple(name for name, _ in earlier)), seats)
        model.register_forward_pre_hook(seats.look)
    setattr(model, _OWN, [*earlier, *new])
    setattr(model.config, RECORD, applied(model))
    return model


def applied(model: PreTrainedModel) -> list[str]:
    """Return what was put on ``model``, in order, with all settings: ``["qk_norm", "z_loss:coefficient=0.0001"]``."""
    return [_text(name, method) for name, method in getattr(model, _OWN, ())]


def load_hf(
    folder: str | Path, wanted: Sequence[Wanted], *, config: Any, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a model that ``save_pretrained`` wrote, with the methods it was saved with (``poise.load_hf`` reads
    them from the config).

    Args:
        folder: where it was saved.
        wanted: the methods of ``config``.
        config: the saved config.
        dtype: of the weights; as saved unless given.

    Raises:
        UserError: the weights do not fit the methods.
    """
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]

    def make(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        apply_hf(self, *wanted)

    # transformers makes the model itself, between reading the config and loading: this is the only place between
    with_methods: Any = type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})
    model, info = with_methods.from_pretrained(
        str(folder), config=config, dtype="auto" if dtype is None else dtype, output_loading_info=True
    )
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]):
        raise UserError(f"the weights in {folder} are not those of this config and its methods: {', '.join(wrong[:4])}")
    model.__class__ = kind
    return cast(PreTrainedModel, model)


def _made(name: str, settings: Mapping[str, Value]) -> tuple[str, HfMethod]:
    if name not in METHODS:
        near = nearest(name, METHODS) or f"; there are {', '.join(METHODS)}"
        raise UserError(f"there is no method '{name}' for transformers models{near}")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for key in settings:
        if key not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"method '{name}' has no setting '{key}'{nearest(key, known)}; {there_are}")
    return name, METHODS[name](**settings)


def _check_pairs(earlier: Sequence[tuple[str, HfMethod]], new: Sequence[tuple[str, HfMethod]]) -> None:
    """Raise ``Conflict`` for the first of ``new`` that does not go with what comes before it."""
    before = list(earlier)
    for name, method in new:
        for other, its in before:
            if other == name:
                raise Conflict(f"method '{name}' is on this model already; name it once")
            if shared := [slot for slot in method.slots if slot in its.slots]:
                raise Conflict(f"methods '{other}' and '{name}' both act at '{shared[0]}'; remove one")
            if reason := EXCLUDES.get((other, name)) or EXCLUDES.get((name, other)):
                raise Conflict(f"methods '{other}' and '{name}' exclude each other: {reason}; remove one")
        before.append((name, method))


def _text(name: str, method: HfMethod) -> str:
    """Write a method with its settings as a recipe does."""
    settings = dataclasses.asdict(method)  # type: ignore[call-overload]
    pairs = ",".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings.items()
        if value is not None
    )
    return f"{name}:{pairs}" if pairs else name
