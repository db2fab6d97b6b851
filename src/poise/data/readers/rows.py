"""What all kinds of records have in common: a text field, and an id and an address if there are any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise.data.readers.document import Document
from poise.data.readers.encoding import clean
from poise.data.readers.stream import Job


def of_row(job: Job, row: Any, origin: str, offset: int, replaced: int, after: tuple[int, int]) -> Document | None:
    """Return the document of a JSON value, or None (and count it) if it is not an object with the text field."""
    value = row.get(job.text_field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        job.tally.missing(job.text_field, tuple(row) if isinstance(row, dict) else ())
        return None
    text, surrogates = clean(value)
    return job.document(text, origin, offset, replaced + surrogates, after, identity(row), address(row))


def identity(row: Mapping[str, Any]) -> str | None:
    """Return the field ``id``."""
    return None if (id := row.get("id")) is None else label(id)


def address(row: Mapping[str, Any]) -> str | None:
    """Return the field ``url``, or else ``metadata.url``."""
    url = row.get("url")
    if url is None and isinstance(inside := row.get("metadata"), dict):
        url = inside.get("url")
    return None if url is None else label(url)


def label(value: Any) -> str | None:
    """Return a name that is text or a whole number as text; None for anything else."""
    if isinstance(value, str):
        return clean(value)[0]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None
