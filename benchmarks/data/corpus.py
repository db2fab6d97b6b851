"""Real text that a machine has without a network, for the other benchmarks here.

Run: ``python benchmarks/data/corpus.py FOLDER`` (some seconds). Writes JSON lines (``id``: the file's place, ``text``)
of some 16 MB each into FOLDER, which must be empty or not there yet, and prints what they hold.

Taken: sources of the standard library, sources and documents of installed packages, ``/usr/share/doc``, manual pages
(as they are, in roff), Vim's help, Perl's documents and modules; of a large group the files whose place has the
smallest hash. Not taken: what is no UTF-8 or holds a NUL, files below 200 bytes or above 1 MB, pictures and archives,
the same file a second time through a link. Files are in the order of their hashes, so the first of the shards is a fair
sample of all. The same machine gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SHORTEST: Final = 200
LONGEST: Final = 1_000_000
SHARD_BYTES: Final = 16_000_000
DOCUMENTS: Final = ("", ".txt", ".md", ".rst", ".pod", ".debian", ".old", ".news", ".tex")


@dataclass(frozen=True, slots=True)
class Group:
    """Files of one kind: those below ``roots`` that end in one of ``suffixes`` (``.gz`` left out), at most so much."""

    name: str
    roots: tuple[str, ...]
    suffixes: tuple[str, ...]
    most_bytes: int = 10**9
    skipped_folders: tuple[str, ...] = ()


def groups() -> tuple[Group, ...]:
    """Return the groups, each with folders that may not be there."""
    paths = sysconfig.get_paths()
    sections = tuple(f"/usr/share/man/man{number}" for number in range(1, 9))
    manual = tuple(f".{number}{more}" for number in range(1, 9) for more in ("", "ssl", "pm", "perl", "posix"))
    return (
        Group("standard library", (paths["stdlib"],), (".py",), skipped_folders=("site-packages", "dist-packages")),
        Group("installed packages, sources", (paths["purelib"],), (".py", ".pyi"), 40_000_000),
        Group("installed packages, documents", (paths["purelib"], "/usr/lib/python3"), (".md", ".rst", ".txt")),
        Group("distribution's Python", ("/usr/lib/python3",), (".py",)),
        Group("/usr/share/doc", ("/usr/share/doc",), DOCUMENTS, 40_000_000),
        Group("manual pages", sections, manual, 20_000_000),
        Group("Vim's help", ("/usr/share/vim",), (".txt",)),
        Group("Perl", ("/usr/share/perl", "/usr/share/perl5"), (".pod", ".pm")),
    )


def files_of(group: Group) -> Iterator[tuple[str, Path]]:
    """Yield (hash of its place, file) in the order of the hashes."""
    found = []
    for root in group.roots:
        for path in Path(root).rglob("*"):
            name = path.name.lower().removesuffix(".gz")
            inside = path.relative_to(root)
            if Path(name).suffix in group.suffixes and not set(inside.parts) & set(group.skipped_folders):
                found.append((hashlib.blake2b(str(inside).encode(), digest_size=8).hexdigest(), path))
    yield from sorted(found)


def text_of(path: Path) -> str | None:
    """Return the text of a file; None if it is too long, too short, a link or no text."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        usable = SHORTEST <= len(data) <= LONGEST and b"\0" not in data
        return data.decode() if usable else None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return None


def main() -> None:
    """Write the shards and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"'{folder}' is not empty; give a new folder")
    lines: list[tuple[str, bytes]] = []
    print(f"{'':<32} {'documents':>9} {'MB':>7} {'mean kB':>7}")
    total = 0
    for group in groups():
        count = size = 0
        for key, path in files_of(group):
            if size >= group.most_bytes:
                break
            if (text := text_of(path)) is not None:
                lines.append((key, json.dumps({"id": str(path), "text": text}, ensure_ascii=False).encode() + b"\n"))
                count, size = count + 1, size + len(text.encode())
        total += size
        print(f"{group.name:<32} {count:>9,} {size / 1e6:>7.1f} {size / max(count, 1) / 1e3:>7.1f}")
    lines.sort()
    shard, left = 0, 0
    out = None
    for _, line in lines:
        if out is None or left <= 0:
            if out is not None:
                out.close()
            out, left, shard = (folder / f"{shard:03}.jsonl").open("wb"), SHARD_BYTES, shard + 1
        out.write(line)
        left -= len(line)
    if out is not None:
        out.close()
    print(f"{'together':<32} {len(lines):>9,} {total / 1e6:>7.1f} {total / max(len(lines), 1) / 1e3:>7.1f}")
    print(f"{shard} shards")


if __name__ == "__main__":
    main()
