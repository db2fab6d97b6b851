"""Kinds of files, encodings, damage, and going on from a place."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import record, sources
from poise.data.dedup.ids import Ids
from poise.data.readers import Document, Place, Tally, encoding, jsonl, warc
from poise.data.readers.stream import _Remote

TEXTS = [f"Text number {i}: " + "some words here. " * (i % 7) for i in range(700)]


def read(path: Path | str, strict: bool = False, repair: bool = False) -> tuple[list[Document], Tally]:
    tally = Tally()
    source = sources.resolve(str(path))
    return list(sources.documents(source, "text", tally, strict=strict, repair=repair)), tally


def texts(path: Path | str) -> list[str]:
    return [d.text for d in read(path)[0]]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def arrow(table: pa.Table, stream: bool) -> bytes:
    sink = io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=100):
            writer.write_batch(batch)
    return sink.getvalue()


def warc_record(kind: str, payload: bytes, number: int, content: str = "text/plain") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: https://example.org/{number}\r\n"
        f"WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{number}>\r\n"
        f"Content-Type: {content}\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload + b"\r\n\r\n"


def response(kind: str, body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


# -- encodings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"])
def test_an_encoding_is_detected_and_counted(tmp_path: Path, name: str) -> None:
    text = "Über den Flüssen liegt der Nebel, schöne Grüße.\r\nCafé déjà vu.\n" * 30
    (tmp_path / "a.txt").write_bytes(text.encode(name))
    (document,), tally = read(tmp_path / "a.txt")
    assert document.text == text.replace("\r\n", "\n")
    assert document.replaced_bytes == 0
    expected = {"utf-16": "utf-16-le", "utf-32": "utf-32-le", "latin-1": "cp1252"}.get(name, name)
    assert tally.converted == ({} if name == "utf-8-sig" else {expected: 1})
    assert tally.removed["CR of CR LF"] == 30


def test_each_document_of_a_file_of_mixed_encodings_is_read_right(tmp_path: Path) -> None:
    text = {"utf-8": "schöne Grüße aus Köln, ", "cp1252": "Café “déjà vu” – naïve, "}
    rows = [json.dumps({"text": text[name]}, ensure_ascii=False).encode(name) for name in ("utf-8", "cp1252") * 3]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    documents, tally = read(tmp_path / "a.jsonl")
    assert [d.text for d in documents] == list(text.values()) * 3
    assert tally.converted == {"cp1252": 3}


def test_utf16_json_lines_are_read(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"日本 {i}"}, ensure_ascii=False) + "\n" for i in range(5))
    (tmp_path / "a.jsonl").write_bytes(rows.encode("utf-16"))
    documents, tally = read(tmp_path / "a.jsonl")
    assert [d.text for d in documents] == [f"日本 {i}" for i in range(5)]
    assert tally.converted == {"utf-16-le": 5}


def test_an_encoding_named_in_the_file_is_used_only_if_all_bytes_are_valid_in_it(tmp_path: Path) -> None:
    russian = '<?xml version="1.0" encoding="windows-1251"?>\n<p>Все счастливые семьи похожи друг на друга</p>\n'
    (tmp_path / "a.xml").write_bytes(russian.encode("cp1251"))
    (document,), tally = read(tmp_path / "a.xml")
    assert (document.text, dict(tally.converted)) == (russian, {"cp1251": 1})
    (tmp_path / "a.xml").write_bytes(russian.encode("cp1251") + b"\x98" * 3)  # undefined in cp1251
    documents, tally = read(tmp_path / "a.xml")
    assert documents == []
    assert tally.skipped == {"file in an unknown encoding": 1}


@pytest.mark.parametrize(
    "raw",
    [
        "Все счастливые семьи похожи друг на друга".encode("cp1251"),  # nearly all letters above ASCII
        "Zażółć gęślą jaźń, proszę państwa łódź".encode("cp1250"),  # signs of cp1252 inside words
        "Król mały był".encode("cp1250"),
        "жжжжжaжжж ббaббб ".encode("cp1251") * 3,
        "日本語のテキスト".encode("shift_jis"),
        "voilà là, et un petit chat voilà ".encode() + "Café".encode("cp1252"),
        "mostly UTF-8: é ü ß 日本, one bad \xff".encode() + b"\xff",
        b"a lone \xff and \xfe between blanks",
        b"caf\xe9 with a control \x01",
        bytes(range(128, 256)),
    ],
)
def test_other_bytes_are_not_taken_for_cp1252(raw: bytes) -> None:
    assert not encoding.is_cp1252(raw)


@given(st.text(st.sampled_from("abcdef ghi\r\n\t\0\x01\x1b\x85é日\ufeff"), max_size=60))
@settings(max_examples=150, deadline=None)
def test_tidy_keeps_everything_but_what_it_counts(text: str) -> None:
    tally = Tally()
    tidy = encoding.tidy(text, tally)
    kept = [c for c in text if ord(c) >= 32 or c in "\t\n\r\f"]
    assert tidy == "".join(kept).replace("\r\n", "\n")
    assert len(text) - len(tidy) == tally.removed.total()
    assert tally.removed["NUL"] == text.count("\0")


def test_nul_bytes_inside_a_text_are_removed_and_binary_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello\0world")
    (tmp_path / "b.bin").write_bytes(b"\1\0\0\0\2\0\0\0 some words \3\0\0\0" * 9)
    (tmp_path / "c.mo").write_bytes(b"words and words " * 60 + b"\0\xff\0\xfe\0")
    (tmp_path / "d.pdf").write_bytes(b"%PDF-1.7 looks like text at first")
    (tmp_path / "e.json").write_text('{"text": "a"}')
    (tmp_path / "f.jsonl").write_text('{"text": "nul \\u0000 and raw tab \t here"}\n')
    documents, tally = read(tmp_path)
    assert [(d.origin, d.text) for d in documents] == [
        ("a.txt", "helloworld"),
        ("e.json:1", "a"),
        ("f.jsonl:1", "nul  and raw tab \t here"),
    ]
    assert tally.removed == {"NUL": 2}
    assert tally.skipped == {"binary file": 3}


def test_mojibake_is_repaired_only_when_asked_for_and_nearly_certain(tmp_path: Path) -> None:
    good = "Ça va? Déjà vu, naïve café — “quoted” text. " * 3
    (tmp_path / "a.txt").write_text(good.encode().decode("cp1252", "ignore"), encoding="utf-8")
    bad = "".join(chr(b) if b in b"\x81\x8d\x8f\x90\x9d" else bytes([b]).decode("cp1252") for b in good.encode())
    (tmp_path / "a.txt").write_text(bad, encoding="utf-8")
    assert read(tmp_path)[0][0].text == bad
    (document,), tally = read(tmp_path, repair=True)
    assert (document.text, tally.repaired) == (good, 1)
    for genuine in ("Ã© is one", good, "CHÂTEAU ÃÃ – " * 5, "An essay on mojibake: Ã© is é, " + "öäü " * 9, "plain"):
        assert encoding.repair(genuine) == genuine


# -- kinds of files --------------------------------------------------------------------------------------------


def test_ids_and_addresses(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "id": "x1", "url": "https://a.org"},
        {"text": "b", "id": 7, "metadata": {"url": "https://b.org"}},
        {"text": "c", "id": [1], "url": None, "metadata": "no"},
        {"text": "d", "id": "lone \ud800"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents, _ = read(tmp_path / "a.jsonl")
    expected = [("x1", "https://a.org"), ("7", "https://b.org"), (None, None), ("lone \ufffd", None)]
    assert [(d.id, d.url) for d in documents] == expected
    record.of(documents)
    table = pa.table({"text": ["a", "b"], "id": [3, None], "metadata": [{"url": "https://a.org"}, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.arrow").write_bytes(arrow(table, stream=True))
    for name in ("a.parquet", "b.arrow"):
        documents, _ = read(tmp_path / name)
        assert [(d.id, d.url) for d in documents] == [("3", "https://a.org"), (None, None)]


@pytest.mark.parametrize(("name", "stream"), [("a.arrow", True), ("a.arrow", False), ("a.feather", False)])
def test_arrow(tmp_path: Path, name: str, stream: bool) -> None:
    column = pa.array([None, *TEXTS], pa.string()).dictionary_encode()
    (tmp_path / name).write_bytes(arrow(pa.table({"text": column}), stream))
    documents, tally = read(tmp_path / name)
    assert [d.text for d in documents] == TEXTS
    assert (documents[0].origin, documents[-1].origin) == (f"{name}:1", f"{name}:700")
    assert tally.skipped == {"empty document": 1}
    (tmp_path / name).write_bytes(arrow(pa.table({"body": ["x"]}), stream))
    _, tally = read(tmp_path / name)
    assert (tally.fields, tally.skipped["no text field 'text'"]) == (("body",), 1)


def test_text_that_is_not_utf8_in_a_column_is_no_crash(tmp_path: Path) -> None:
    raw = pa.array([b"caf\xe9 noir", b"ok \xc3\xa9"], pa.binary())
    column = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    (tmp_path / "a.arrow").write_bytes(arrow(pa.table({"text": column, "id": column}), stream=True))
    documents, tally = read(tmp_path / "a.arrow")
    assert [d.text for d in documents] == ["café noir", "ok é"]
    assert tally.converted == {"cp1252": 1}
    assert documents[1].id == "ok é"


@pytest.mark.parametrize("space", [None, 1])
def test_a_json_list_is_read_without_holding_it(tmp_path: Path, space: int | None) -> None:
    rows = [{"text": f"é {text}", "id": i} for i, text in enumerate(TEXTS)] + [5, {"body": "x"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=space, ensure_ascii=False), encoding="utf-8")
    documents, tally = read(path)
    assert [d.text for d in documents] == [f"é {text}" for text in TEXTS]
    assert (documents[3].origin, documents[3].id) == ("a.json:3", "3")
    raw = path.read_bytes()
    assert all(json.JSONDecoder().raw_decode(raw[d.offset :].decode())[0]["text"] == d.text for d in documents[::97])
    assert tally.skipped["no text field 'text'"] == 2
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(raw))
    assert texts(tmp_path / "b.json.gz") == [d.text for d in documents]


@given(
    st.lists(st.one_of(st.text(max_size=12), st.integers(), st.none()), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(["", " ", "\n\t"]),
)
@settings(max_examples=60, deadline=None)
def test_a_json_list_may_be_cut_anywhere(values: list[object], chunk: int, blank: str) -> None:
    raw = (
        blank + "[" + f"{blank},{blank}".join(json.dumps(v, ensure_ascii=False) for v in values) + blank + "]"
    ).encode("utf-8", "surrogatepass")
    stream = SimpleNamespace(reader=io.BufferedReader(io.BytesIO(raw)), size=len)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_CHUNK", chunk)
        found = list(jsonl._objects(stream))  # type: ignore[arg-type]
    assert [element.row for element in found] == values
    assert [json.loads(raw[element.offset : element.end]) for element in found] == values


def test_json_that_holds_no_records_is_text_and_one_that_breaks_off_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}\n')
    (tmp_path / "list.json").write_text('[{"name": "x"}]')
    (tmp_path / "one.json").write_text('{"text": "one"}')
    (tmp_path / "cut.json").write_text('[{"text": "first"}, {"text": "sec')
    documents, tally = read(tmp_path)
    assert [(d.origin, d.text) for d in documents] == [
        ("cut.json:0", "first"),
        ("list.json", '[{"name": "x"}]'),
        ("one.json:1", "one"),
        ("package.json", '{\n  "name": "x"\n}\n'),
    ]
    assert tally.damaged == ["cut.json"]


def test_warc(tmp_path: Path) -> None:
    pytest.importorskip("warcio")
    records = [
        warc_record("warcinfo", b"software: x\r\n", 0, "application/warc-fields"),
        warc_record("conversion", "Grüße aus dem Netz\n".encode(), 1),
        warc_record("response", response("text/html; charset=utf-8", b"<p>page</p>"), 2, "application/http"),
        warc_record("response", response("text/plain", b"a plain answer"), 3, "application/http"),
        warc_record("conversion", b"last one\n" * 9000, 4),
    ]
    plain, packed = tmp_path / "a.warc", tmp_path / "a.warc.wet.gz"
    plain.write_bytes(b"".join(records))
    packed.write_bytes(b"".join(map(gzip.compress, records)))
    expected = ["Grüße aus dem Netz\n", "a plain answer", "last one\n" * 9000]
    for path in (plain, packed):
        documents, tally = read(path)
        assert [d.text for d in documents] == expected
        assert documents[0].url == "https://example.org/1"
        assert documents[0].id == "<urn:uuid:1>"
        assert documents[2].origin == f"{path.name}:4"
        assert plain.read_bytes()[documents[2].offset :].startswith(records[4][:60])
        assert tally.skipped == {"WARC record without text": 1, warc.HTML: 1}
    for path in (plain, packed):
        path.write_bytes(path.read_bytes()[:-40])
        documents, tally = read(path)
        assert [d.text for d in documents] == expected[:2]
        assert tally.damaged == [path.name]


def test_warc_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warcio.archiveiterator", None)
    (tmp_path / "a.warc").write_bytes(b"WARC/1.0\r\n")
    with pytest.raises(UserError, match=r"pip install 'poise\[warc\]'"):
        read(tmp_path)


def test_a_saved_data_set_is_its_tables_and_its_train_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "data-00000-of-00001.arrow").write_bytes(arrow(pa.table({"text": [split]}), stream=True))
        (folder / "cache-1.arrow").write_bytes(arrow(pa.table({"text": ["cached"]}), stream=True))
        (folder / "state.json").write_text("{}")
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(tmp_path) == ["train"]
    assert sources.resolve(str(tmp_path)).skipped == {"other split of a saved data set (give its folder)": 1}
    assert texts(tmp_path / "test") == ["test"]


@pytest.mark.slow
def test_a_data_set_saved_by_the_library_itself(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == TEXTS


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_compressed_in_several_members(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    suffix = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz", zstd: "zst"}[pack]
    rows = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(pack(b"".join(rows[i : i + 100])) for i in range(0, 700, 100)))
    assert texts(path) == TEXTS


def test_a_highly_compressed_file_does_not_fill_memory(tmp_path: Path) -> None:
    for name, pack in (("a.txt.xz", lambda data: lzma.compress(data, preset=0)), ("a.txt.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(b"x " * 2**22))  # 8 MiB out of a few KiB
        tracemalloc.start()
        size = sum(len(d.text) for d in sources.documents(sources.resolve(str(tmp_path / name)), "text", Tally()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size == 2**23
        assert peak < 2**21


# -- damage ----------------------------------------------------------------------------------------------------


def damaged_file(folder: Path, name: str) -> tuple[Path, int]:
    """Write a file that breaks off in its second half; return it and the least number of rows before the break."""
    rng = np.random.default_rng(0)
    values = [rng.bytes(60).hex() for _ in range(4000)]
    rows = b"".join(b'{"text": "%s"}\n' % value.encode() for value in values)
    path = folder / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": values}), path, row_group_size=500, use_dictionary=False)
        raw = bytearray(path.read_bytes())
        start = pq.ParquetFile(path).metadata.row_group(6).column(0).data_page_offset
        raw[start : start + 2000] = b"\xff" * 2000  # the footer is whole, the pages of the seventh group are not
        path.write_bytes(raw)
        return path, 3000
    if name.endswith("arrow"):
        raw = bytearray(arrow(pa.table({"text": values}), stream=True))
    else:
        raw = bytearray(
            {"gz": gzip.compress, "zst": zstd, "bz2": lambda data: bz2.compress(data, 1)}[name.rpartition(".")[2]](rows)
        )
    path.write_bytes(raw[: len(raw) * 7 // 8])
    return path, 2000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.txt.gz", "a.parquet", "a.arrow"])
def test_what_comes_before_the_damage_is_used_and_strict_stops(tmp_path: Path, name: str) -> None:
    _, least = damaged_file(tmp_path, name)
    (tmp_path / "z.txt").write_text("read as well")
    documents, tally = read(tmp_path)
    assert documents[-1].text == "read as well"
    assert tally.damaged == [name]
    assert tally.skipped == {"damaged file": 1} | ({"damaged member": 1} if name == "a.parquet" else {})
    if not name.startswith("a.txt"):
        assert least <= len(documents) < 4000
        assert all(len(d.text) == 120 for d in documents[:-1])
    assert tally.done == sum(file.stat().st_size for file in tmp_path.iterdir())
    with pytest.raises(UserError, match="is damaged") as error:
        read(tmp_path, strict=True)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_that_breaks_off_is_not_taken_for_a_document(tmp_path: Path) -> None:
    packed = gzip.compress(np.random.default_rng(0).bytes(1000).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[:-100])
    documents, tally = read(tmp_path)
    assert documents == []
    assert tally.damaged == ["a.txt.gz"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.json.xz", "a.warc.gz"])
@pytest.mark.parametrize(
    "raw", [b"", b"PAR1", b"not at all what the name says", b"\xff" * 999, b"ARROW1\0\0\xff\xff\xff\xff"]
)
def test_a_file_that_is_not_what_its_name_says_is_one_clear_line(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    documents, tally = read(tmp_path)
    assert documents == []
    assert sum(tally.skipped.values()) == 1


def test_a_line_without_end_is_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 2**20)
    for name in ("a.jsonl", "b.txt", "c.json"):
        with (tmp_path / name).open("wb") as file:
            if name != "b.txt":
                file.write(b'[{"text": "' if name == "c.json" else b'{"text": "')
            for _ in range(30):
                file.write(b"x" * 2**20)
        tracemalloc.start()
        source = sources.resolve(str(tmp_path / name))
        tally, longest, size = Tally(), 0, 0
        for document in sources.documents(source, "text", tally):
            longest, size = max(longest, len(document.text)), size + len(document.text)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * 2**20
        assert longest <= source.piece
        if name == "b.txt":
            assert size == 30 * 2**20
        if name == "a.jsonl":
            assert list(tally.skipped) == ["line over 1 MiB"]


# -- remote ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield "memory://corpus"
    system.rm("/corpus", recursive=True)


def put(url: str, data: bytes) -> None:
    import fsspec

    with fsspec.open(url, "wb") as file:
        file.write(data)


def test_a_remote_folder_is_listed_and_streamed(bucket: str) -> None:
    put(f"{bucket}/b/a.jsonl.gz", gzip.compress(b'{"text": "from lines"}\n'))
    put(f"{bucket}/a.txt", b"from text")
    put(f"{bucket}/.hidden", b"no")
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["from parquet"]}), sink)
    put(f"{bucket}/c.parquet", sink.getvalue())
    put(f"{bucket}/d.arrow", arrow(pa.table({"text": ["from arrow"]}), stream=True))
    put(f"{bucket}/e.arrow", arrow(pa.table({"text": ["from arrow file"]}), stream=False))
    documents, tally = read(bucket)
    assert [(d.origin, d.text, d.source) for d in documents] == [
        ("a.txt", "from text", "corpus"),
        ("b/a.jsonl.gz:1", "from lines", "corpus"),
        ("c.parquet:0", "from parquet", "corpus"),
        ("d.arrow:0", "from arrow", "corpus"),
        ("e.arrow:0", "from arrow file", "corpus"),
    ]
    source = sources.resolve(bucket)
    assert tally.done == source.size
    assert source.fingerprint() == sources.resolve(bucket).fingerprint()
    put(f"{bucket}/a.txt", b"From text")
    assert source.fingerprint() != sources.resolve(bucket).fingerprint()
    assert texts(f"{bucket}/a.txt") == ["From text"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_failing_network_is_never_taken_for_the_end_of_a_file(
    bucket: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rows = b"".join(b'{"text": "%s"}\n' % np.random.default_rng(i).bytes(300).hex().encode() for i in range(3000))
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [json.loads(row)["text"] for row in rows.splitlines()]}), sink)
    put(f"{bucket}/{name}", {"a.jsonl": rows, "a.jsonl.zst": zstd(rows), "a.parquet": sink.getvalue()}[name])
    real, calls = _Remote.readinto, []

    def fail(self: _Remote, buffer: object) -> int:
        calls.append(1)
        if len(calls) > 2:
            self._try(lambda: (_ for _ in ()).throw(ConnectionError("connection lost\nsomewhere")))
        return real(self, buffer)

    monkeypatch.setattr(_Remote, "readinto", fail)
    with pytest.raises(UserError, match=r"cannot read 'memory://.*connection lost; run it again") as error:
        read(bucket)
    assert "\n" not in str(error.value)


def test_bad_addresses_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    for url, message in {
        "memory://nowhere/at/all": "no file or folder 'memory://nowhere/at/all'",
        "nosuch://bucket/x": "cannot be opened",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            sources.resolve(url)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"pip install 'poise\[cloud\]'"):
        sources.resolve("s3://bucket/x")


# -- several sources -------------------------------------------------------------------------------------------


def test_several_sources_get_different_names(tmp_path: Path) -> None:
    for folder in ("a/web", "b/web", "c/web", "x=y"):
        (tmp_path / folder).mkdir(parents=True)
    given_ = [f"{tmp_path}/a/web", f"{tmp_path}/b/web", f"books={tmp_path}/c/web", str(tmp_path / "x=y"), "py=stdlib"]
    found = sources.resolve_all(given_)
    assert [source.name for source in found] == ["web", "web-2", "books", "x-y", "py"]
    assert found[2].description == f"{tmp_path}/c/web"
    (tmp_path / "link").symlink_to(tmp_path / "a/web")
    for twice in ("a/web", "a/../a/web/", "link"):
        with pytest.raises(UserError, match="the same place as") as error:
            sources.resolve_all([f"{tmp_path}/a/web", f"again={tmp_path}/{twice}"])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no source of text"):
        sources.resolve_all([])


# -- ids -------------------------------------------------------------------------------------------------------


def test_ids_are_exact_up_to_the_bound_and_unbiased_above_it() -> None:
    exact, bounded = Ids(), Ids(most=500)
    for i in range(3000):
        for _ in range(1 + i % 3):
            exact.add("s", str(i))
            bounded.add("s", str(i))
    assert exact.duplicates() == 3000
    assert abs(bounded.duplicates() - 3000) < 600
    exact.add("other source", "5")
    assert exact.duplicates() == 3000


# -- going on from a place -------------------------------------------------------------------------------------


def everything(folder: Path) -> None:
    """Write a folder with a file of every kind, each with things that are skipped, converted and repaired."""
    rows = [{"text": text, "id": i % 9} for i, text in enumerate(TEXTS[:12])]
    lines = [json.dumps(row).encode() for row in rows]
    lines[3:3] = [b"{broken", b"", '{"text": "Café noir très chaud"}'.encode("cp1252"), b'{"text": " "}', b'{"x": 1}']
    data = b"\n".join(lines) + b"\n{not json"
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "c.jsonl.zst").write_bytes(zstd(data)[:-9])
    (folder / "d.json").write_text(json.dumps([*rows[:5], {"x": 1}, *rows[5:], 3]))
    (folder / "e.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(TEXTS[:300]).encode())
    (folder / "f.txt").write_bytes("\n\n".join(TEXTS[:300]).encode("utf-16"))
    (folder / "g.txt.bz2").write_bytes(bz2.compress("\n\n".join(TEXTS[:200]).encode()))
    (folder / "h.bin").write_bytes(b"\0\1\2" * 50)
    table = pa.table({"text": [*TEXTS[:20], None, *TEXTS[20:40], None]})
    pq.write_table(table, folder / "i.parquet", row_group_size=8)
    (folder / "j.arrow").write_bytes(arrow(pa.table({"text": TEXTS[:300]}), stream=True))
    (folder / "k.arrow").write_bytes(arrow(table, stream=False))
    (folder / "m.txt").write_bytes(b"")
    records = [warc_record("conversion", text.encode(), i) for i, text in enumerate(TEXTS[:6])]
    records.insert(2, warc_record("metadata", b"x", 99))
    (folder / "n.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    (folder / "o.warc").write_bytes(b"".join(records))
    (folder / "z.txt").write_bytes(b"\0" * 40)


def test_reading_goes_on_from_any_place_with_the_same_counts(tmp_path: Path) -> None:
    pytest.importorskip("warcio")
    everything(tmp_path)
    source = sources.resolve(str(tmp_path))
    whole, states = Tally(), []
    documents = []
    for document in sources.documents(source, "text", whole):
        documents.append(document)
        states.append(json.loads(json.dumps(whole.state())))
    assert {Path(d.origin.partition(":")[0]).name[0] for d in documents} == set("abdefgijkno")
    assert whole.damaged == ["c.jsonl.zst"]
    assert len({d.place for d in documents}) == len(documents)
    for at in [*range(0, len(documents), 7), len(documents) - 1]:
        tally = Tally.of(states[at])
        place = documents[at].place
        assert place is not None
        rest = list(sources.documents(source, "text", tally, start=Place(*json.loads(json.dumps(place)))))
        assert rest == documents[at + 1 :]
        assert tally.state() == whole.state()
        assert tally.done == whole.done


def test_going_on_from_a_state_taken_at_the_end_counts_nothing_twice(tmp_path: Path) -> None:
    everything(tmp_path)
    source = sources.resolve(str(tmp_path))
    whole = Tally()
    last = list(sources.documents(source, "text", whole))[-1]
    again = Tally.of(whole.state())
    assert list(sources.documents(source, "text", again, start=last.place)) == []
    assert again.state() == whole.state()
    other = replace(source, name="other")
    assert len(list(sources.documents(other, "text", again))) > 100


class Counting(io.FileIO):
    """A file that counts what is read of it."""

    read_bytes = 0

    def readinto(self, buffer: object) -> int:
        count = super().readinto(buffer)  # type: ignore[arg-type]
        Counting.read_bytes += count or 0
        return count or 0


def test_going_on_in_a_plain_file_seeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_bytes(b'{"text": "row"}\n' * 200_000)
        source = sources.resolve(str(tmp_path / name))
        place = Place(0, 16 * 199_990, 199_990)
        documents = [d.text for d in sources.documents(source, "text", Tally(), start=place)]
        with monkeypatch.context() as patch:
            patch.setattr(Counting, "read_bytes", 0)
            patch.setattr(Path, "open", lambda path, mode, buffering: io.BufferedReader(Counting(path), buffering))
            again = [d.text for d in sources.documents(source, "text", Tally(), start=place)]
            assert Counting.read_bytes < 2**20 < source.size  # type: ignore[operator]
        assert again == documents
        assert documents == (["row"] * 10 if name == "a.jsonl" else ['{"text": "row"}\n' * 10])


def test_the_hub_and_the_help_texts_go_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    fake = types.ModuleType("datasets")
    rows = [{"text": "a", "id": 1, "url": "u"}, {"x": 1}, {"text": "b"}, {"text": "c"}]
    fake.load_dataset = lambda name, *, split, streaming: iter(rows)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    topics = sources.resolve("stdlib")
    only = replace(topics, files=tuple(file for file in topics.files if file.kind == "topics"))
    for source in (sources.resolve("hf:owner/name"), only):
        documents = list(sources.documents(source, "text", Tally()))
        assert len(documents) >= 3
        assert list(sources.documents(source, "text", Tally(), start=documents[1].place)) == documents[2:]
    hub = list(sources.documents(sources.resolve("hf:owner/name"), "text", Tally()))
    assert [(d.id, d.url) for d in hub] == [("1", "u"), (None, None), (None, None)]


# -- damaged members -------------------------------------------------------------------------------------------


def rows_of(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{i} " + rng.bytes(60).hex() for i in range(count)]


def as_lines(rows: list[str]) -> bytes:
    return b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows)


def goes_on_from_everywhere(path: Path, every: int = 1) -> tuple[list[Document], Tally]:
    """Read a file, and again from places in it: the same documents must come, with the same counts."""
    source, whole, states = sources.resolve(str(path)), Tally(), []
    documents = []
    for document in sources.documents(source, "text", whole):
        documents.append(document)
        states.append(json.loads(json.dumps(whole.state())))
    for at in range(0, len(documents), every):
        tally = Tally.of(states[at])
        assert list(sources.documents(source, "text", tally, start=documents[at].place)) == documents[at + 1 :]
        assert tally.state() == whole.state()
    return documents, whole


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("how", ["flipped", "shortened", "no end", "no beginning"])
def test_of_three_members_the_damaged_one_is_left_out(tmp_path: Path, suffix: str, how: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}[suffix]
    rows = rows_of(300)
    parts = [bytearray(pack(as_lines(rows[i : i + 100]))) for i in (0, 100, 200)]  # type: ignore[operator]
    if how == "flipped":
        parts[1][2000:2300] = bytes(300)
    elif how == "shortened":
        del parts[1][2000:2300]
    elif how == "no end":
        del parts[1][2000:]
    else:
        del parts[1][:2]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(parts))
    documents, tally = goes_on_from_everywhere(path, every=9)
    assert [d.text for d in documents] == rows[:100] + rows[200:]
    assert tally.damaged == [path.name]
    assert tally.skipped == {"damaged file": 1, "damaged member": 1}
    with pytest.raises(UserError, match="is damaged"):
        read(path, strict=True)


def test_text_members_around_a_damaged_one_are_documents_of_their_own(tmp_path: Path) -> None:
    parts = [bytearray(gzip.compress(text.encode())) for text in ("the first", "x" * 500 + "y", "the third")]
    parts[1][-6] ^= 1  # the checksum
    (tmp_path / "a.txt.gz").write_bytes(b"".join(parts))
    documents, tally = goes_on_from_everywhere(tmp_path)
    assert [d.text for d in documents] == ["the first", "the third"]
    assert tally.skipped["damaged member"] == 1


def test_a_line_is_never_put_together_across_damage(tmp_path: Path) -> None:
    rows = rows_of(16_000)
    data = as_lines(rows)
    cut = [0, 500_050, 1_700_050, len(data)]  # inside lines
    parts = [bytearray(gzip.compress(data[a:b], 1)) for a, b in pairwise(cut)]
    parts[1][len(parts[1]) * 3 // 4] ^= 64
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(parts))
    documents, tally = goes_on_from_everywhere(tmp_path, every=9_000)
    found = [d.text for d in documents]
    assert set(found) <= set(rows) and len(set(found)) == len(found)
    last = data[: cut[2]].count(b"\n") + 1
    assert found[-(16_000 - last) :] == rows[last:]
    assert found[:3000] == rows[:3000]
    assert tally.skipped == {"damaged file": 1, "damaged member": 1}


def test_a_member_within_a_member_is_not_taken_by_chance(tmp_path: Path) -> None:
    bad = bytearray(gzip.compress(as_lines(rows_of(100))))
    bad[700:712] = b"\x1f\x8b\x08\0\0\0\0\0\0\xff\x05\xc0"
    bad[900:904] = b"\x28\xb5\x2f\xfd"
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(bad) + gzip.compress(as_lines(["whole"])))
    documents, tally = read(tmp_path)
    assert [d.text for d in documents] == ["whole"]
    assert tally.skipped["damaged member"] == 1


def test_zstandard_frames_of_every_layout_are_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    data = as_lines(rows_of(1500)) + b" " * 2**18 + b"\n"
    packed = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # a frame that is to be skipped
    for options in ({"write_checksum": True}, {"write_content_size": False}, {"level": 19}, {}):
        packed += zstandard.ZstdCompressor(**options).compress(data)
    writer = zstandard.ZstdCompressor().compressobj()
    packed += writer.compress(b'{"text": "last"}') + writer.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    documents, tally = read(tmp_path)
    assert [d.text for d in documents] == rows_of(1500) * 4 + ["last"]
    assert not tally.skipped


def test_a_damaged_row_group_is_left_out(tmp_path: Path) -> None:
    rows = rows_of(400)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": rows}), path, row_group_size=100, use_dictionary=False, write_page_checksum=True)
    raw = bytearray(path.read_bytes())
    raw[pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset + 900] ^= 8
    path.write_bytes(raw)
    documents, tally = goes_on_from_everywhere(path, every=30)
    assert [d.text for d in documents] == rows[:100] + rows[200:]
    assert documents[100].origin == "a.parquet:200"
    assert tally.skipped == {"damaged file": 1, "damaged member": 1}
    with pytest.raises(UserError, match="is damaged"):
        read(path, strict=True)


def test_a_damaged_batch_of_an_arrow_file_is_left_out(tmp_path: Path) -> None:
    rows, sink = rows_of(300), io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, pa.schema({"text": pa.string()}), options=options) as writer:
        for at in (0, 100, 200):
            writer.write_batch(pa.record_batch({"text": rows[at : at + 100]}))
    raw = bytearray(sink.getvalue())
    second = [m.start() for m in re.finditer(rb"\x28\xb5\x2f\xfd", raw)][-3]
    raw[second : second + 12] = bytes(12)
    (tmp_path / "a.arrow").write_bytes(raw)
    documents, tally = goes_on_from_everywhere(tmp_path, every=30)
    assert [d.text for d in documents] == rows[:100] + rows[200:]
    assert tally.skipped == {"damaged file": 1, "damaged member": 1}


@pytest.mark.parametrize("name", ["a.warc.gz", "a.warc"])
def test_of_a_warc_only_the_damaged_record_is_lost(tmp_path: Path, name: str) -> None:
    pytest.importorskip("warcio")
    rows = rows_of(100)
    records = [warc_record("conversion", row.encode(), i) for i, row in enumerate(rows)]
    if name.endswith("gz"):
        records = list(map(gzip.compress, records))
        records[60] = records[60][:150] + b"\0" * 40 + records[60][190:]
    else:
        records[60] = records[60].replace(b"WARC/1.0", b"WXRC!!!!")
    (tmp_path / name).write_bytes(b"".join(records))
    documents, tally = goes_on_from_everywhere(tmp_path, every=7)
    assert [d.text for d in documents] == rows[:60] + rows[61:]
    assert tally.skipped == {"damaged file": 1, "damaged member": 1}
    (tmp_path / name).write_bytes(b"".join(records[:50]) + records[50][:-30])
    assert [d.text for d in read(tmp_path)[0]] == rows[:50]


@pytest.mark.parametrize("name", ["utf-16", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_offsets_are_true_bytes_of_the_file(tmp_path: Path, name: str, suffix: str) -> None:
    many = "\r\n\r\n".join(f"Grüße, naïve {'' if name == 'cp1252' else '日本 😀'} {text}" for text in TEXTS[:200])
    if suffix == "jsonl":
        many = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in many.split("\r\n\r\n"))
    raw = (("\ufeff" if name == "utf-16-be" else "") + many).encode(name)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(raw)
    documents, _ = goes_on_from_everywhere(path, every=11)
    assert len(documents) > 2
    wide = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(name, name)
    for document in documents:
        head = raw[document.offset :].decode(wide).replace("\r\n", "\n")
        assert head.lstrip("\ufeff").removeprefix('{"text": "').startswith(document.text[:40])


def test_a_warc_record_without_a_length_is_damaged(tmp_path: Path) -> None:
    pytest.importorskip("warcio")
    records = [warc_record("conversion", text.encode(), i) for i, text in enumerate(TEXTS[:3])]
    records[1] = records[1].replace(b"Content-Length", b"Content-Lenxxx")
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    documents, tally = goes_on_from_everywhere(tmp_path)
    assert [d.text for d in documents] == [TEXTS[0], TEXTS[2]]
    assert tally.skipped == {"damaged file": 1, "damaged member": 1}


@pytest.mark.parametrize(
    ("origin", "offset", "said"),
    [
        ("a.txt", 4096, ", from byte 4,096 on"),
        ("b/a.txt.GZ", 5, ", from unpacked byte 5 on"),
        ("a.jsonl:106", 4096, ", line 106, at byte 4,096"),
        ("a.jsonl.zst:106", 4096, ", line 106, at unpacked byte 4,096"),
        ("a.jsonl:106", 0, ", line 106"),
        ("a.parquet:69", 0, ", row 69"),
        ("a.warc:3", 99, ", record 3, at byte 99"),
        ("owner/name/train:5", 0, ""),
        ("pydoc_data/topics.py:for", 0, ""),
    ],
)
def test_blame_says_no_place_that_is_not_known(origin: str, offset: int, said: str) -> None:
    from poise.cli.blame import _place

    assert _place(SimpleNamespace(origin=origin, offset=offset)) == said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"), [(40, "longer than it is"), (-40, "longer than it says"), (None, "how long")]
)
def test_a_record_of_a_wrong_length_is_left_out(tmp_path: Path, change: int | None, says: str) -> None:
    bodies = [f"page {n} " + " ".join(f"word{n}x{i}" for i in range(30)) for n in range(6)]
    records = []
    for number, body in enumerate(bodies):
        length = len(body) if number != 2 else "12z" if change is None else len(body) + change
        head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <urn:{number}>\r\nContent-Type: text/plain\r\n"
        records.append(f"{head}Content-Length: {length}\r\n\r\n{body}\r\n\r\n")
    (tmp_path / "a.warc").write_text("".join(records), newline="")
    source, tally = sources.resolve(str(tmp_path / "a.warc")), Tally()
    found = [document.text for document in sources.documents(source, "text", tally)]
    assert found == [body for number, body in enumerate(bodies) if number != 2]
    assert tally.skipped["damaged member"] == 1 and tally.damaged == ["a.warc"]
    with pytest.raises(UserError, match=says):
        list(sources.documents(source, "text", Tally(), strict=True))
