"""A configuration file as text and, where it is JSON, TOML or YAML, as a nested mapping.

A reader is a module with

    FORMAT: str                                      what ``Settings.format`` says
    LOOKS_FOR: str                                   what it recognises, for the message when nothing fits
    sniff(document: Document) -> float               0 (not mine) .. 1 (certainly mine)
    read(documents: Sequence[Document]) -> Settings  all files that it recognised, in the order given
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from poise.core.errors import UserError
from poise.preflight.readers.plain_yaml import parse_yaml

LOG_BYTES = 4 << 20
"""Of a file that is no JSON, TOML or YAML only so much is read: the argument dump of a log is at its start."""

MAX_BYTES = 128 << 20
"""No configuration is larger; a tokenizer of 250 000 pieces has 30 MB."""

Kind = Literal["json", "toml", "yaml", "text"]

_BINARY = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""Zip archives and pickles: what ``torch.save`` writes."""


@dataclass(frozen=True, slots=True)
class Document:
    """One file.

    Attributes:
        path: the file.
        text: its content, or its beginning where it is a log.
        kind: what it is written in.
        data: the mapping that it holds; empty for text.
        unread: for YAML: keys whose values are no plain values, lists of them, or mappings.
    """

    path: Path
    text: str
    kind: Kind
    data: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path)


def load_document(path: Path) -> Document:
    """Read a file.

    Raises:
        UserError: it is missing, empty, binary, or not what its extension says.
    """
    raw = _bytes(path)
    if path.suffix == ".bin" or raw.startswith(_BINARY):
        raise UserError(
            f"'{path}' is a pickle, which is not opened because that runs code; write the arguments with "
            "training_args.to_json_string() to training_args.json and name that"
        )
    if b"\x00" in raw[:LOG_BYTES] and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"'{path}' is a binary file; name a configuration: JSON, YAML, TOML, a script or a log")
    try:
        text = _decoded(raw)
    except UnicodeDecodeError:
        text = raw[:LOG_BYTES].decode("utf-8", errors="replace")
    if not text.strip():
        raise UserError(f"'{path}' is empty; name a configuration with at least one setting in it")
    return _parsed(path, text)


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            whole = path.suffix in (".json", ".toml", ".yaml", ".yml", ".bin")
            if whole and size > MAX_BYTES:
                raise UserError(f"'{path}' has {size / 1e6:.0f} MB, which no configuration has; name a smaller file")
            return file.read(MAX_BYTES if whole else LOG_BYTES)
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}; name a configuration file") from None


def _decoded(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16")
    return raw.decode("utf-8-sig")


def _parsed(path: Path, text: str) -> Document:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return Document(path, text, "json", _json(path, text))
    if suffix == ".toml":
        return Document(path, text, "toml", _toml(path, text))
    if suffix in (".yaml", ".yml"):
        data, unread = parse_yaml(text, str(path))
        return Document(path, text, "yaml", data, unread)
    if text.lstrip().startswith("{"):
        try:
            return Document(path, text, "json", _json(path, text))
        except UserError:
            return Document(path, text[:LOG_BYTES], "text")
    return Document(path, text[:LOG_BYTES], "text")


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not valid JSON ({error}); mend that place or write the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"'{path}' holds a JSON {type(value).__name__} and no object; a configuration is {{...}}")
    return value


def _toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not valid TOML ({error}); mend that place") from None
