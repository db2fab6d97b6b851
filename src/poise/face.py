"""Where a public name serves two rooms: methods on our own description of a model, or on a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from poise.core.errors import UserError
from poise.model.spec import Spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

T = TypeVar("T")


def apply(model_or_spec: T, *names: str) -> T:
    """Apply stability methods in order: ``apply(spec, "qk_norm", "z_loss:coefficient=1e-5")``.

    Args:
        model_or_spec: a ``Spec``, of which a changed copy is returned, or a transformers causal language model before
            training, which is changed in place and returned.
        names: methods, with settings after a colon, separated by commas.

    Raises:
        UserError: something else, a method that is no name, an unknown method or setting, or a model that cannot have
            it.
        Conflict: two methods that cannot hold together.
    """
    if isinstance(model_or_spec, Spec):
        from poise.model import build

        return cast(T, build.apply(model_or_spec, *names))
    if not _is_module(model_or_spec):
        raise UserError(
            f"poise.apply takes a Spec or a causal language model of transformers, not a {type(model_or_spec).__name__}"
        )
    if type(model_or_spec).__module__.startswith("poise.model."):
        raise UserError("this model is built already; apply the methods to its Spec, then build it")
    try:
        from poise.integrations.hf_methods import METHODS, apply_hf
    except ModuleNotFoundError as error:
        raise UserError(
            f"poise.apply on a {type(model_or_spec).__name__} needs {error.name}; pip install transformers"
        ) from None
    return cast(T, apply_hf(cast(Any, model_or_spec), *_with_settings(names, METHODS)))


def load_hf(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a transformers model that ``save_pretrained`` wrote, with the methods it was saved with.

    Args:
        folder: where it was saved.
        dtype: of the weights; as saved unless given.

    Raises:
        UserError: no folder, or weights that do not fit the config and its methods.
    """
    if not isinstance(folder, str | Path):
        raise UserError(f"poise.load_hf takes the folder of a saved model, not a {type(folder).__name__}")
    from transformers import AutoConfig

    from poise.integrations import hf_methods

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"there is no saved model in '{folder}': it has no config.json")
    config = AutoConfig.from_pretrained(str(folder))
    wanted = _with_settings(getattr(config, hf_methods.RECORD, ()), hf_methods.METHODS)
    return hf_methods.load_hf(folder, wanted, config=config, dtype=dtype)


def _with_settings(names: Any, methods: Any) -> list[tuple[str, Any]]:
    """Read the settings after each name; their types are checked where the name is known."""
    from poise.model.settings import checked, split

    pairs = [split(name) for name in names]
    return [(name, checked(name, methods[name], given) if name in methods else given) for name, given in pairs]


def _is_module(thing: object) -> bool:
    """Whether it is a torch module, found out without importing torch."""
    return any(base.__module__ == "torch.nn.modules.module" for base in type(thing).__mro__)
