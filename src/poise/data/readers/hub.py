"""Hugging Face data sets, streamed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from poise.core.errors import UserError
from poise.data.readers.document import Document, Place, Tally
from poise.data.readers.encoding import clean
from poise.data.readers.rows import address, identity
from poise.data.readers.stream import first_line


def read_hub(name: str, split: str, source: str, text_field: str, tally: Tally, done: int = 0) -> Iterator[Document]:
    """Yield the rows of a data set after the first ``done``.

    Raises:
        UserError: the ``datasets`` package is missing, or the data set cannot be read.
    """
    for number, row in enumerate(_rows(name, split, done), done):
        value = row.get(text_field)
        if isinstance(value, str):
            text, replaced = clean(value)
            origin, place = f"{name}/{split}:{number}", Place(0, 0, number + 1)
            yield Document(text, source, origin, 0, replaced, identity(row), address(row), place)
        else:
            tally.missing(text_field, tuple(row))


def _rows(name: str, split: str, done: int) -> Iterator[Mapping[str, Any]]:
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"'hf:{name}' needs the datasets package, which is not installed; pip install 'poise[hf]'"
        ) from None
    try:
        rows = hub.load_dataset(name, split=split, streaming=True)
        if done and hasattr(rows, "skip"):
            rows, done = rows.skip(done), 0
        yield from islice(rows, done, None)
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split
        raise UserError(
            f"cannot read 'hf:{name}:{split}': {first_line(error)}; check the name, the split and the network"
        ) from None
