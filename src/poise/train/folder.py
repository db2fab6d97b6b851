"""The folder of a run: made new, and its recipe."""

from __future__ import annotations

import os
from pathlib import Path

from poise.core import config as configs
from poise.core.errors import UserError
from poise.train.recipe import Recipe


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write ``recipe.toml`` whole or not at all."""
    aside = folder / "recipe.toml.new"
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(configs.to_toml(recipe))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / "recipe.toml")
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def new_folder(folder: Path) -> None:
    """Make the folder of a new run.

    Raises:
        UserError: there is something at that place, or it cannot be made.
    """
    try:
        if folder.is_dir() and not any(folder.iterdir()):
            return  # empty: left by a run that was killed while its text was prepared, or made by the user
        folder.mkdir(parents=True, exist_ok=False)
    except FileExistsError:
        raise UserError(
            f"'{folder}' exists and is not overwritten; resume it with: poise resume {folder}, "
            f"or choose another folder with --out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot make the run folder '{folder}': {error.strerror}; choose another with --out") from None
