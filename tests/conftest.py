"""Shared by all rooms' tests: a small folder of real text and a recipe that trains on it in a second."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.ranks import Ranks

TINY: dict[str, Any] = {
    "model": {"n_layers": 2, "d_model": 32, "n_heads": 2, "methods": ["qk_norm", "z_loss"]},
    "optim": {"lr": 5e-3, "schedule": {"warmup_steps": 5}},
    "train": {
        "steps": 40,
        "batch_size": 4,
        "seq_len": 32,
        "eval_every": 10,
        "eval_batches": 2,
        "save_every": 10,
        "compile": "off",
        "dtype": "fp32",
        "threads": 1,
    },
}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector away from what collecting imports.

    That is some millions of objects that stay to the end. Every full collection would walk over all of them, and some
    libraries ask for one after each training.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Markdown files made of docstrings and sources that every Python has."""
    folder = tmp_path_factory.mktemp("notes")
    for module in ("json", "inspect", "pathlib", "typing", "logging", "shutil"):
        imported = importlib.import_module(module)
        (folder / f"{module}.md").write_text(inspect.getsource(imported), encoding="utf-8")
    (folder / "json-doc.md").write_text(inspect.getdoc(json) or "", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokens_dir(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, prepared once with a vocabulary of 512."""
    from poise.data.prepare import prepare
    from poise.data.settings import Settings

    out = tmp_path_factory.mktemp("prepared") / "notes"
    return prepare(str(text_folder), out, Settings(vocab_size=512, val_fraction=0.1)).dir


@pytest.fixture(scope="session")
def tiny(tokens_dir: Path) -> dict[str, Any]:
    """Overrides that turn the nano recipe into a 40-step run on the prepared folder."""
    return {**TINY, "data": {"source": str(tokens_dir), "vocab_size": 512, "val_fraction": 0.1}}


@pytest.fixture(scope="session")
def straight(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 40 uninterrupted steps; never changed by a test."""
    from poise.train.recipe import load
    from poise.train.run import train

    folder = tmp_path_factory.mktemp("straight") / "run"
    assert train(load("nano", tiny), folder).reason == "finished"
    return folder


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes of one gloo group, for all tests of this pytest process."""
    from tests.ranks import Ranks

    with Ranks(2) as ranks:
        yield ranks
