"""Anybody's configuration as ``Settings``: which format each file has is told by its content."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poise.core.errors import UserError, nearest
from poise.preflight.readers import READERS, hf, megatron, recipe
from poise.preflight.readers.document import Document, load_document
from poise.preflight.readers.draft import merge
from poise.preflight.readers.megatron_words import KNOWN
from poise.preflight.readers.mlperf import from_mlperf
from poise.preflight.settings import Settings

FOLDER = (*hf.FOLDER, "recipe.toml", "run_config.yaml")
"""Files that are looked for in a folder."""

BESIDE = ("tokenizer.json",)
"""Files that are read together with a ``config.json`` in the same folder."""


def read_settings(paths: Sequence[Path | str] | Path | str) -> Settings:
    """Read configuration files, checkpoint folders, or the name of a recipe that comes with poise, as one run.

    Args:
        paths: one, or several in any order, as text or ``Path``; what one does not say another may.

    Raises:
        UserError: a file that is missing or of no known format, a value that cannot be, or two files that disagree.
    """
    named = [Path(one) for one in ([paths] if isinstance(paths, str | Path) else paths)]
    if not named:
        raise UserError(f"no configuration is named; give {_looked_for()}")
    parts: list[Settings] = []
    groups: dict[str, list[Document]] = {}
    for path in dict.fromkeys(named):
        if not path.exists() and (name := _recipe_name(path)):
            parts.append(recipe.read_recipe(name))
            continue
        for document in _documents(path):
            groups.setdefault(_reader(document), []).append(document)
    for reader, documents in groups.items():
        parts.append(importlib.import_module(reader).read(documents))
    settings = merge(parts)
    if _is_blank(settings):
        raise UserError(f"'{settings.source}' says nothing about a run; give {_looked_for()}")
    return settings


def from_mapping(settings: Mapping[str, Any], source: str) -> Settings | None:
    """Return what a log says of its own run (``Log.settings``), or ``None`` where that is too little.

    Understood are Megatron-LM's argument dump, MLPerf's keys, and a tracker's copy of Hugging Face arguments.

    Raises:
        UserError: a value that cannot be.
    """
    if (found := from_mlperf(settings, source) or hf.from_config(settings, source)) is not None:
        return found
    return megatron.from_dump(settings, source) if len(KNOWN & settings.keys()) >= 4 else None


def _documents(path: Path) -> list[Document]:
    if path.is_dir():
        found = [path / name for name in FOLDER if (path / name).is_file()]
        if not found:
            pickle = (
                " (training_args.bin is a pickle and is not opened)" if (path / "training_args.bin").exists() else ""
            )
            raise UserError(f"folder '{path}' has none of {', '.join(FOLDER)}{pickle}; name a configuration file")
        return [document for file in found if _reader(document := load_document(file), False)]
    if not path.exists():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"no configuration '{path}'{nearest(path.name, [*siblings, *recipe.names()])}; give a file, a checkpoint "
            f"folder, or a recipe: {', '.join(recipe.names())}"
        )
    if not path.is_file():
        raise UserError(f"'{path}' is a pipe or a device; write it to a file first")
    document = load_document(path)
    beside = []
    if hf.kind_of(document) == "model":
        beside = [load_document(path.parent / name) for name in BESIDE if (path.parent / name).is_file()]
    return [document, *(other for other in beside if _reader(other, False))]


def _reader(document: Document, must: bool = True) -> str:
    """Return the module that recognises a file best."""
    scores = {name: importlib.import_module(name).sniff(document) for name in READERS}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] > 0.0:
        return best
    if must:
        raise UserError(f"'{document.name}' is no configuration that can be read; looked for: {_looked_for('; ')}")
    return ""


def _looked_for(between: str = ", or ") -> str:
    return between.join(importlib.import_module(name).LOOKS_FOR for name in READERS)


def _recipe_name(path: Path) -> str:
    known = recipe.names()
    return path.stem if path.stem in known and str(path) in (path.stem, path.stem + ".toml") else ""


def _is_blank(settings: Settings) -> bool:
    return not settings.said
