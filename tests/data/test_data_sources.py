from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import readers, sources
from poise.data.readers import Document, Tally, jsonl
from poise.data.readers.text import pieces as cut_up


def read(path: Path | str, text_field: str = "text", strict: bool = False) -> tuple[list[Document], Tally]:
    tally = Tally()
    return list(sources.documents(sources.resolve(str(path)), text_field, tally, strict=strict)), tally


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_is_read_in_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name, data in {
        "b.md": b"# bee",
        "a/z.py": b"x = 1\n",
        "a-first.txt": b"first",
        "image.png": b"\x89PNG\0\0",
        "noise.bin": bytes(range(128, 256)) * 4,
        ".hidden": b"no",
        ".git/config": b"no",
        "empty.txt": b"",
        "blank.txt": b" \n\n",
        "wide.txt": "wide".encode("utf-16"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    documents, tally = read(tmp_path)
    assert [(d.origin, d.text) for d in documents] == [
        ("a-first.txt", "first"),
        ("a/z.py", "x = 1\n"),
        ("b.md", "# bee"),
        ("wide.txt", "wide"),
    ]
    assert {d.source for d in documents} == {tmp_path.name}
    assert dict(tally.skipped) == {
        "binary file": 1,
        "file in an unknown encoding": 1,
        "empty file": 1,
        "empty document": 1,
    }
    assert tally.converted == {"utf-16-le": 1}
    assert tally.done == sources.resolve(str(tmp_path)).size


def test_links_to_folders_are_not_followed_and_broken_links_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "same.txt").symlink_to(tmp_path / "a.txt")
    source = sources.resolve(str(tmp_path))
    assert [f.origin for f in source.files] == ["a.txt", "same.txt"]
    assert source.skipped == {"broken link": 1}


def test_invalid_utf8_is_replaced_and_counted(tmp_path: Path) -> None:
    # A genuine U+FFFD must not be counted, nor a cut-off character be lost.
    raw = "genuine � and é ".encode() + b"\xff\xfe bad \xc3" + b" x" * 20
    (tmp_path / "a.txt").write_bytes(raw)
    (document,), _ = read(tmp_path / "a.txt")
    assert document.replaced_bytes == 3
    assert document.text == raw.decode("utf-8", "replace")


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_replaced_bytes_are_those_the_decoder_refuses(raw: bytes) -> None:
    bad, at = 0, 0
    while at < len(raw):  # the slow, plain way: decode up to each error
        try:
            raw[at:].decode("utf-8")
            break
        except UnicodeDecodeError as error:
            bad += error.end - error.start
            at += error.end
    assert readers.decode(raw) == (raw.decode("utf-8", "replace"), bad)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (document,), _ = read(tmp_path / "a.txt")
    assert (document.text, document.offset) == ("hello", 3)


def test_a_single_file_becomes_several_documents_that_join_to_it(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i}: " + "Größe and 日本語 " * (i % 40) for i in range(800))
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    documents, _ = read(path)
    assert len(documents) > 40
    assert "".join(d.text for d in documents) == text
    assert all(d.text.endswith("\n\n") for d in documents[:-1])
    raw = path.read_bytes()
    for d in documents:
        size = len(d.text.encode())
        assert size <= sources.resolve(str(path)).piece
        assert raw[d.offset : d.offset + size].decode() == d.text


@given(st.text("ab \né日", max_size=80), st.integers(8, 30))
@settings(max_examples=100, deadline=None)
def test_pieces_join_to_the_whole_and_cut_no_character(text: str, limit: int) -> None:
    stream = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
    pieces = list(cut_up(stream, limit))
    assert b"".join(data for _, data, _ in pieces) == text.encode()
    assert "".join(data.decode() for _, data, _ in pieces) == text
    assert all(0 < len(data) <= limit for _, data, _ in pieces)
    assert [at for at, _, _ in pieces] == [sum(len(d) for _, d, _ in pieces[:i]) for i in range(len(pieces))]
    assert [last for _, _, last in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    lines = [
        json.dumps({"text": "first é"}, ensure_ascii=False).encode(),
        b"",
        b"{broken",
        b'{"body": "other"}',
        b"[1, 2]",
        b'{"text": null}',
        b'{"text": "bad \xff byte"}',
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": ""}',
    ]
    data = b"\n".join(lines)
    if suffix.endswith(".gz"):
        data = gzip.compress(data)
    elif suffix.endswith(".zst"):
        data = zstd(data)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    documents, tally = read(path)
    assert [(d.text, d.origin, d.replaced_bytes) for d in documents] == [
        ("first é", f"a{suffix}:1", 0),
        ("bad \ufffd byte", f"a{suffix}:7", 1),
        ("lone \ufffd surrogate", f"a{suffix}:8", 3),
    ]
    assert documents[1].offset == b"\n".join(lines).index(b'{"text": "bad')
    assert dict(tally.skipped) == {
        "line that is not JSON": 1,
        "no text field 'text'": 3,
        "empty document": 1,
    }
    assert tally.fields == ("body",)
    assert tally.done == len(data)


def test_json_lines_with_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"text": "y"}\n')
    documents, _ = read(tmp_path / "a.jsonl", "body")
    assert [d.text for d in documents] == ["x"]


def test_a_line_over_the_limit_is_counted_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    exact = '{"text": "' + "x" * 87 + '"}\n'
    assert len(exact) == 100
    (tmp_path / "a.jsonl").write_text(exact + '{"text": "' + "x" * 5000 + '"}\n{"text": "ok"}\n')
    documents, tally = read(tmp_path / "a.jsonl")
    assert [(d.text, d.origin) for d in documents] == [("x" * 87, "a.jsonl:1"), ("ok", "a.jsonl:3")]
    assert documents[1].offset == (tmp_path / "a.jsonl").read_text().index('{"text": "ok"}')
    assert list(tally.skipped.values()) == [1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", None, "drei ß"] + [f"row {i}" for i in range(600)]
    table = pa.table({"id": range(603), "text": pa.array(texts, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=200)
    documents, tally = read(tmp_path / "a.parquet")
    assert [d.text for d in documents] == [t for t in texts if t]
    assert [d.origin for d in documents[:2]] == ["a.parquet:0", "a.parquet:2"]
    assert documents[-1].origin == "a.parquet:602"
    assert tally.skipped["empty document"] == 1
    assert tally.done == (tmp_path / "a.parquet").stat().st_size


def test_parquet_without_the_column_is_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "a.parquet")
    documents, tally = read(tmp_path / "a.parquet")
    assert documents == []
    assert tally.skipped["no text field 'text'"] == 1
    assert tally.fields == ("body", "text")
    assert [d.text for d in read(tmp_path / "a.parquet", "body")[0]] == ["x"]


def test_compressed_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello") + gzip.compress(b" again"))
    assert [d.text for d in read(tmp_path / "a.txt.gz")[0]] == ["hello again"]


def test_a_folder_may_mix_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "from json"}')
    (tmp_path / "b.txt").write_text("from text")
    pq.write_table(pa.table({"text": ["from parquet"]}), tmp_path / "c.parquet")
    assert [d.text for d in read(tmp_path)[0]] == ["from json", "from text", "from parquet"]


def test_a_missing_source_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"no file or folder .*did you mean 'corpus.txt'") as error:
        sources.resolve(str(tmp_path / "corpsu.txt"))
    one_line(error)
    with pytest.raises(UserError, match="give a file, a folder, hf:owner/name or stdlib"):
        sources.resolve(str(tmp_path / "no" / "such"))


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (PermissionError(13, "Permission denied"), "unreadable file", "cannot read .*Permission denied"),
        (FileNotFoundError(2, "No such file"), "vanished file", "has gone since the source was listed"),
    ],
)
def test_a_file_that_cannot_be_opened_is_counted_in_a_folder_and_an_error_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str, message: str
) -> None:
    # Tests may run as root, who can read everything: refuse at the place where the system would.
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    real = Path.open

    def refuse(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == "a.txt":
            raise error
        return real(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    documents, tally = read(tmp_path)
    assert [d.text for d in documents] == ["b.txt"]
    assert tally.skipped == {reason: 1}
    for place, strict in ((tmp_path / "a.txt", False), (tmp_path, True)):
        with pytest.raises(UserError, match=message) as caught:
            read(place, strict=strict)
        assert "a.txt" in one_line(caught)


def test_a_failing_disk_stops_although_not_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)

    def fail(self: Path, *args: object, **kwargs: object) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match="Input/output error") as caught:
        read(tmp_path)
    one_line(caught)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    before = sources.resolve(str(tmp_path)).fingerprint()
    assert sources.resolve(str(tmp_path)).fingerprint() == before
    path.write_text("xy")
    changed = sources.resolve(str(tmp_path)).fingerprint()
    path.rename(tmp_path / "b.txt")
    renamed = sources.resolve(str(tmp_path)).fingerprint()
    os.utime(tmp_path / "b.txt", ns=(1, 1))
    touched = sources.resolve(str(tmp_path)).fingerprint()
    assert len({before, changed, renamed, touched}) == 4


def test_the_standard_library_is_listed_without_tests() -> None:
    source = sources.resolve("stdlib")
    origins = [f.origin for f in source.files]
    assert origins == sorted(origins)
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(origins)
    parts = {part for origin in origins for part in origin.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings"}
    assert all(origin.endswith(".py") for origin in origins)
    assert source.size is not None and source.size > 5_000_000


def test_the_topics_of_help_are_text_and_not_their_source_file() -> None:
    source = sources.resolve("stdlib")
    topics = [f for f in source.files if f.kind == "topics"]
    only = sources.Source(source.name, source.description, tuple(topics))
    documents = list(sources.documents(only, "text", Tally()))
    assert len(documents) > 50
    loops = next(d for d in documents if d.origin == "pydoc_data/topics.py:for")
    assert 'The "for" statement' in loops.text and "\\n" not in loops.text


def test_a_python_without_sources_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"--data\.source") as error:
        sources.resolve("stdlib")
    one_line(error)


def test_a_hub_data_set_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'poise\[hf\]'") as error:
        read("hf:owner/name")
    one_line(error)


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, object]]:
        asked.append((name, split, streaming))
        yield {"text": "one"}
        yield {"body": "two"}
        if split == "broken":
            raise ConnectionError("no network\nat all")

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    documents, tally = read("hf:owner/name:test")
    assert [(d.text, d.origin) for d in documents] == [("one", "owner/name/test:0")]
    assert tally.skipped["no text field 'text'"] == 1
    assert asked == [("owner/name", "test", True)]
    with pytest.raises(UserError, match="no network") as error:
        read("hf:owner/name:broken")
    one_line(error)
    with pytest.raises(UserError, match="names no data set"):
        sources.resolve("hf:")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    path.write_bytes(row * 20_000)  # 20 MB
    tracemalloc.start()
    count = sum(1 for _ in sources.documents(sources.resolve(str(path)), "text", Tally()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 2_000_000
