"""Our own recipes: TOML files, run folders, and names of those that come with poise.

A recipe is read by the code that will train it, so that methods and defaults are what they will be. That imports
torch, which no other reader does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from poise.preflight.readers.document import Document
from poise.preflight.readers.draft import Draft, Found, merge
from poise.preflight.settings import Settings

if TYPE_CHECKING:
    from poise.train.recipe import Recipe

FORMAT = "recipe"
LOOKS_FOR = "a poise recipe (TOML with [model], [optim], [train])"

_SECTIONS = frozenset({"model", "data", "optim", "guard", "train"})
CALLED: Final[Mapping[str, str]] = {
    **{name: f"model.{name}" for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "tied")},
    **{name: f"optim.{name}" for name in ("lr", "beta1", "beta2", "eps", "weight_decay")},
    "methods": "model.methods", "vocab_size": "data.vocab_size", "optimizer": "optim.name", "clip": "optim.clip_norm",
    "schedule": "optim.schedule.kind", "warmup_steps": "optim.schedule.warmup_steps",
    "total_steps": "train.steps", "batch_sequences": "train.batch_size",
    "seq_len": "train.seq_len", "save_every": "train.save_every", "dtype": "train.dtype",
}  # fmt: skip
"""Field -> where a recipe says it."""

_OWN_KEYS = frozenset(
    {"n_layers", "d_model", "methods", "batch_size", "micro_batch", "steps", "seq_len", "source", "schedule", "lr"}
)


def sniff(document: Document) -> float:
    """Return how sure it is that this is a recipe."""
    data = document.data
    if document.kind != "toml" or not data.keys() & _SECTIONS:
        return 0.0
    inner = {key for name in _SECTIONS if isinstance(section := data.get(name), Mapping) for key in section}
    return 0.85 if inner & _OWN_KEYS and data.keys() <= _SECTIONS | {"name", "seed"} else 0.3


def read(documents: Sequence[Document]) -> Settings:
    """Read recipe files.

    Raises:
        UserError: what ``poise train`` would not train either.
    """
    return merge([read_recipe(document.path) for document in documents])


def names() -> list[str]:
    """Return the names of the recipes that come with poise; imports no torch."""
    from importlib import resources

    folder = resources.files("poise.train") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(where: Path | str) -> Settings:
    """Return what a recipe file, or one that comes with poise, will do.

    Raises:
        UserError: no such recipe, an unknown key, or a value that cannot be.
    """
    from poise.train.recipe import load

    return of_recipe(load(str(where)), str(where))


def of_recipe(recipe: Recipe, source: str) -> Settings:
    """Return what a ``Recipe`` will do."""
    from poise.preflight.readers.model import read_spec

    draft = Draft(source, FORMAT, CALLED)
    model = read_spec(recipe.spec(), source)
    for field in dataclasses.fields(Settings):
        value = getattr(model, field.name)
        if value is not None and field.name not in ("source", "format", "said", "notes", "methods"):
            draft.put(field.name, Found(value, model.said.get(field.name, f"{field.name} = {value}")))
    draft.values["methods"] = model.methods
    draft.notes.extend(model.notes)
    _optimizer(recipe, draft)
    _run(recipe, draft)
    return draft.settings()


def _optimizer(recipe: Recipe, draft: Draft) -> None:
    optim, schedule = recipe.optim, recipe.optim.schedule
    of_optim: tuple[tuple[str, str, Any], ...] = (
        ("optimizer", "name", optim.name),
        ("lr", "lr", optim.lr),
        ("beta1", "beta1", optim.beta1),
        ("beta2", "beta2", optim.beta2),
        ("eps", "eps", optim.eps),
        ("weight_decay", "weight_decay", optim.weight_decay),
    )
    for name, key, value in of_optim:
        draft.put(name, Found(value, f"optim.{key} = {value}"))
    draft.put("schedule", Found(schedule.kind, f"optim.schedule.kind = {schedule.kind}"))
    draft.put("warmup_steps", Found(schedule.warmup_steps, f"optim.schedule.warmup_steps = {schedule.warmup_steps}"))
    if schedule.kind not in ("constant", "inverse_sqrt", "power"):
        share = schedule.final_fraction
        draft.put("min_lr", Found(share * optim.lr, f"optim.schedule.final_fraction = {share}"))
    if optim.clip in ("global_norm", "block"):
        draft.put("clip", Found(optim.clip_norm, f"optim.clip = {optim.clip}, clip_norm = {optim.clip_norm}"))
    elif optim.clip == "none":
        draft.put("clip", Found(0.0, "optim.clip = none"))
    draft.put("decay_embeddings", Found(False, "poise decays no embeddings"))
    draft.put("state_dtype", Found("fp32", "poise keeps moments in fp32"))
    draft.put("master_weights", Found(True, "poise keeps weights in fp32"))


def _run(recipe: Recipe, draft: Draft) -> None:
    train, guard = recipe.train, recipe.guard
    draft.put("total_steps", Found(train.steps, f"train.steps = {train.steps}"))
    draft.put("batch_sequences", Found(train.batch_size, f"train.batch_size = {train.batch_size}"))
    draft.put("seq_len", Found(train.seq_len, f"train.seq_len = {train.seq_len}"))
    draft.put("save_every", Found(train.save_every, f"train.save_every = {train.save_every}"))
    if train.dtype == "auto":
        draft.notes.append("train.dtype = auto: bf16 or fp32, as the machine is")
    else:
        draft.put("dtype", Found(train.dtype, f"train.dtype = {train.dtype}"))
    acts = guard.enabled and guard.mode == "act"
    said = f"guard.enabled = {str(guard.enabled).lower()}, guard.mode = {guard.mode}"
    draft.put("skip_steps", Found(acts, said))
    draft.put("nan_check", Found(guard.enabled and guard.mode != "observe", said))
    draft.put("vocab_size", Found(recipe.data.vocab_size, f"data.vocab_size = {recipe.data.vocab_size}"))
