"""Leave out documents by where they came from: lists of hosts and of URLs.

A list is a text file, ``.gz`` allowed; one entry a line, ``#`` begins a comment. The usual lists are read as they are:

- ``example.org`` blocks the host and every host under it (``www.example.org``); a leading ``*.`` or ``.`` is ignored;
- ``0.0.0.0 example.org`` (hosts files): the same;
- ``example.org/forum`` or ``https://example.org/forum/`` blocks this path and what lies under it. Scheme, ``www.``,
  port and a closing slash play no part, nor do capitals in the host;
- ``example.org/show?id=7``: this one URL.

A folder is read as all files in it whose names begin with ``domains``, ``hosts`` or ``urls``, or end in ``.txt``
(``.gz`` or not). Documents without a URL are kept.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from poise.core.errors import UserError
from poise.data.record import drop

_DEPTH: Final = 8  # labels of a host name that are looked at from the right; deeper ones only whole
_ENTRY: Final = re.compile(
    r"(?:[a-z][a-z0-9+.\-]*:(?=//))?(?://)?(?:[^/@\s]*@)?(?:\*?\.)?([^/:?#\s]+)(?::\d+)?"  # host
    r"(/[^?#\s]*)?(\?[^#\s]*)?(?:#\S*)?",
    re.I,
)
_HOST: Final = re.compile(r"[^\s/.]+(?:\.[^\s/.]+)+\.?|localhost|\[[0-9a-f:.]+\]")
_FILE: Final = re.compile(r"(?:domains|hosts|urls).*|.*\.txt(?:\.gz)?")


@dataclass(frozen=True)
class BlockUrls:
    """A stage: the reason ``url`` for documents whose URL is on a list.

    The lists are read when the stage is made. Pickled, it is a path and a hash; each process reads the lists once, and
    finds out if they have changed.

    Attributes:
        path: a list, or a folder of lists.
        hash: of the entries, 32 hexadecimal digits: two lists with the same entries have the same; computed.

    Raises:
        UserError: there is no such list, it has no entry, or a line that is none.
    """

    path: str
    hash: str = ""
    _hosts: Any = field(default=None, init=False, repr=False, compare=False)
    _paths: dict[str, frozenset[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def read(cls, path: str | Path) -> BlockUrls:
        """Return the stage for a list or a folder of lists."""
        return cls(str(path))

    def __post_init__(self) -> None:
        hosts, paths = _read_all(Path(self.path).expanduser())
        digest = hashlib.blake2b("\n".join([*sorted(hosts), "", *sorted(paths)]).encode(), digest_size=16).hexdigest()
        if self.hash and self.hash != digest:
            raise UserError(f"the URL list '{self.path}' has changed since this began; start again")
        by_host: dict[str, set[str]] = {}
        for entry in paths:
            host, _, place = entry.partition(" ")
            by_host.setdefault(host, set()).add(place)
        object.__setattr__(self, "hash", digest)
        object.__setattr__(self, "_hosts", pa.array(sorted(hosts), pa.string()))
        object.__setattr__(self, "_paths", {host: frozenset(found) for host, found in by_host.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockUrls, (self.path, self.hash)

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch with reasons set."""
        return drop(batch, self.blocked(batch.column("url")), "url")

    def blocked(self, urls: pa.StringArray) -> NDArray[np.bool_]:
        """Return which URLs are on the list, (N,); null and what is no URL are not."""
        at = np.flatnonzero(np.asarray(urls.is_valid()))
        if len(at) == 0:
            return np.zeros(len(urls), np.bool_)
        bare = pc.replace_substring_regex(urls.take(at), r"^\s*(?:[A-Za-z][A-Za-z0-9+.\-]*:)?//(?:[^/@?#]*@)?", "")
        hosts = pc.ascii_lower(pc.replace_substring_regex(bare, r"(?s)[/:?#\s].*$", ""))
        hosts = pc.replace_substring_regex(hosts, r"^www\.|\.$", "")
        hit = np.zeros(len(at), np.bool_)
        under = hosts
        for _ in range(_DEPTH):
            hit |= np.asarray(pc.is_in(under, self._hosts))
            under = pc.replace_substring_regex(under, r"^[^.]*\.", "")  # the last label alone stays as it is
        if self._paths:
            listed = np.asarray(pc.is_in(hosts, pa.array(list(self._paths), pa.string())))
            for row in np.flatnonzero(listed & ~hit):
                hit[row] = self._under_path(hosts[row].as_py(), bare[row].as_py())
        blocked = np.zeros(len(urls), np.bool_)
        blocked[at] = hit
        return blocked

    def _under_path(self, host: str, bare: str) -> bool:
        """Tell whether the path of a URL, or a path above it, is listed for its host."""
        path, question, query = bare.strip().partition("#")[0].partition("?")
        parts = path.rstrip("/").split("/")[1:]
        listed = self._paths[host]
        whole = "".join(f"/{part}" for part in parts) + question + query
        return whole in listed or any("/" + "/".join(parts[: n + 1]) in listed for n in range(len(parts)))


def _read_all(path: Path) -> tuple[set[str], set[str]]:
    """Return (hosts, ``host path?query``) of a list or a folder of lists."""
    try:
        files = (
            sorted(p for p in path.rglob("*") if p.is_file() and _FILE.fullmatch(p.name)) if path.is_dir() else [path]
        )
        texts = [(file, _text(file)) for file in files]
    except FileNotFoundError:
        raise UserError(f"no URL list '{path}'; give a text file with one host or URL a line") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read URL list '{path}': {reason}; check the file") from None
    hosts: set[str] = set()
    paths: set[str] = set()
    for file, text in texts:
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            hosts_file = len(words) == 2 and re.fullmatch(r"[0-9.]{7,15}|[0-9a-fA-F:]{2,39}", words[0])
            match = _ENTRY.fullmatch(words[-1]) if len(words) == 1 or hosts_file else None
            host = match[1].lower().removesuffix(".").removeprefix("www.") if match else ""
            if match is None or not (_HOST.fullmatch(host) or hosts_file):
                raise UserError(f"line {number} of URL list '{file}' is no host or URL: '{line.strip()[:60]}'; mend it")
            place = (match[2] or "").rstrip("/") + (match[3] or "")
            if place:
                paths.add(f"{host} {place}")
            else:
                hosts.add(host)
    if not hosts and not paths:
        raise UserError(f"URL list '{path}' is empty; give a text file with one host or URL a line")
    return hosts, paths


def _text(file: Path) -> str:
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return raw.decode("utf-8", "replace").removeprefix("\ufeff")
