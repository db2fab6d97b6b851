"""What a preparation depends on, as a hash, and the place in the cache that follows from it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from poise.core.errors import UserError
from poise.data import store, work
from poise.data.dedup import minhash
from poise.data.settings import Settings
from poise.data.sources import Source
from poise.data.tokens.tokenizer import Tokenizer


def fingerprint(found: Sequence[Source], settings: Settings, given: Tokenizer | None) -> str:
    """Return a hash of everything the result depends on."""
    facts = asdict(settings) | {"sources": [one.fingerprint() for one in found], "version": store.VERSION}
    if given is not None:
        facts |= {"tokenizer": given.hash(), "vocab_size": None}
    if settings.dedup == "near":
        facts["minhash"] = minhash.backend_of(settings.minhash)
    facts["decontaminate"] = [(Path(path).stem, _contents(path)) for path in settings.decontaminate]
    facts["block_urls"] = _contents(settings.block_urls) if settings.block_urls else None
    return work.hashed(facts)


def _contents(place: str) -> list[str]:
    """Return the hashes of a file, or of all files in a folder; a place that cannot be read is refused later on."""
    path = Path(place).expanduser()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    try:
        return [store.file_hash(file) for file in files if file.is_file()]
    except OSError:
        return []


def place_for(found: Sequence[Source], key: str) -> Path:
    """Return the place in the cache of what is prepared from the sources with this ``fingerprint``.

    Raises:
        UserError: there is no home folder, and no other place is given.
    """
    described = "\n".join([*(one.description for one in found), key])
    name = "+".join(re.sub(r"[^A-Za-z0-9._-]+", "-", one.name).strip("-.") for one in found)[:40] or "data"
    digest = hashlib.blake2b(described.encode("utf-8", "replace"), digest_size=6).hexdigest()
    return _cache() / "data" / f"{name}-{digest}"


def _cache() -> Path:
    if place := os.environ.get("POISE_CACHE"):
        return Path(place).expanduser().absolute()
    try:
        return Path.home() / ".cache" / "poise"
    except RuntimeError:
        raise UserError("there is no home folder for the cache; give --data.dir PATH or set POISE_CACHE") from None
