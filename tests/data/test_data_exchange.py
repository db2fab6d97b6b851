"""Export and import, checked against the real libraries and against readers written here from the layouts."""

from __future__ import annotations

import csv
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.core.errors import UserError
from poise.data import staging, store
from poise.data.exchange import datatrove, hf, incoming, megatron, olmo, outgoing
from poise.data.exchange.incoming import Import, Incoming
from poise.data.tokens.periodic import REPEAT
from poise.data.tokens.tokenizer import Tokenizer, train
from poise.data.writer import SplitWriter, content_hash

WORDS = ["loss", "gradient", "step", "weight", "Größe", "layer", "token", "batch", "spike", "日本語", "rate"]
FORMATS: dict[str, Any] = {"megatron": megatron, "datatrove": datatrove, "olmo": olmo, "hf": hf}
SUFFIX = {"megatron": ".idx", "datatrove": ".ds.index", "olmo": ".csv.gz"}


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [f"{n}: " + " ".join(rng.choice(WORDS, int(rng.integers(3, 30)))) for n in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(texts(200), 300)


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> store.Tokens:
    """Two sources, 40 documents for training and 7 held out, one of them with a repeated token."""
    out = tmp_path_factory.mktemp("prepared") / "mixed"
    rows = texts(47)
    rows[5] = "spike" * 40
    with staging.staged(out) as folder:
        writers = {name: SplitWriter(folder, name, np.dtype("<u2")) for name in store.SPLITS}
        manifest_sources = []
        for name, first, last in (("web", 0, 30), ("books", 30, 47)):
            before = {side: writer.counts() for side, writer in writers.items()}
            for number in range(first, last):
                side = "val" if number % 7 == 6 else "train"
                ids = np.append(tokenizer.encode([rows[number]])[0], tokenizer.end_of_text).astype("<u2")
                start = writers[side].tokens
                repeated = [(start, len(ids) - 1, 40, 2, False)] if number == 5 else []
                writers[side].add_block(ids, _row(name, number, rows[number], len(ids)), np.array(repeated, REPEAT))
                assert start == writers[side].tokens - len(ids)
            counts = {side: dict(writers[side].counts() - before[side]) for side in store.SPLITS}
            manifest_sources.append({"name": name, "description": name, "files": 1, "splits": counts})
        for writer in writers.values():
            writer.close()
        (folder / store.TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        store.seal(
            folder,
            {
                "source": {"name": "mixed", "description": "mixed", "files": 2, "fingerprint": ""},
                "sources": manifest_sources,
                "tokenizer": {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text, "hash": ""},
                "splits": {name: dict(writer.counts()) for name, writer in writers.items()},
                "replaced_bytes": 0,
                "skipped": {},
            },
        )
    return store.open_tokens(out)


def _row(source: str, number: int, text: str, length: int) -> pa.RecordBatch:
    row = {
        "token_length": length,
        "content_hash": content_hash(text),
        "source": source,
        "origin": f"{source}.jsonl:{number}" if source == "web" else f"{source}/{number}.txt",
        "offset": 10 * number,
        "bytes": len(text.encode()),
        "replaced_bytes": 0,
        "id": f"doc, {number}" if number % 2 else None,
        "cluster_size": 1,
    }
    kept = [field for field in store.DOCUMENT_SCHEMA if field.name in row]
    return pa.RecordBatch.from_pylist([row], pa.schema(kept))


def same(a: store.Tokens, b: store.Tokens, provenance: bool) -> None:
    for name in store.SPLITS:
        ours, theirs = a.split(name), b.split(name)
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert (a.dir / f"{name}.bin").read_bytes() == (b.dir / f"{name}.bin").read_bytes()
        assert np.array_equal(ours.index.lengths, theirs.index.lengths)
        columns = ["token_start", "token_length", "content_hash"]
        columns += ["source", "origin", "offset", "bytes", "id", "cluster_size"] if provenance else []
        for column in columns:
            assert ours.table[column].to_pylist() == theirs.table[column].to_pylist(), column
        if provenance:
            assert ours.sources == theirs.sources


@pytest.mark.parametrize("kind", FORMATS)
def test_there_and_back(kind: str, data: store.Tokens, tmp_path: Path) -> None:
    """An export that is imported again is the same data: bytes, documents, sides, sources and provenance."""
    if kind == "hf":
        pytest.importorskip("datasets")
    told: list[tuple[str, int, int | None]] = []
    files = FORMATS[kind].export(data.dir, tmp_path / "out", progress=lambda *at: told.append(at))
    total = sum(facts["tokens"] for facts in data.manifest["splits"].values())
    assert files and all(file.is_file() for file in files)
    assert told == sorted(told) and told[-1] == ("exporting", total, total)
    manifest = FORMATS[kind].import_(tmp_path / "out", tmp_path / "back", progress=lambda *at: told.append(at))
    assert told[-1] == ("importing", total, None)
    back = store.verify(tmp_path / "back")
    same(data, back, provenance=True)
    assert manifest["ends_added"] == manifest["ends_inside"] == 0
    assert manifest["read"]["documents"] == 47
    train_split = back.split("train")
    assert train_split.repeats["count"].max() >= 39  # found anew, on the tokens
    assert train_split.table["repeat_count"].to_pylist()[5] >= 39


@pytest.mark.parametrize("kind", ["megatron", "datatrove", "olmo"])
def test_without_provenance(kind: str, data: store.Tokens, tmp_path: Path) -> None:
    """Hash and size of a text come back by decoding; origins name the token file."""
    FORMATS[kind].export(data.dir, tmp_path / "out")
    for path in (tmp_path / "out").glob("*" + outgoing.PROVENANCE):
        path.unlink()
    FORMATS[kind].import_(tmp_path / "out", tmp_path / "back", Import(name="theirs"))
    back = store.verify(tmp_path / "back")
    same(data, back, provenance=False)
    table, ours = back.split("train").table, data.split("train").table
    assert table["bytes"].to_pylist() == ours["bytes"].to_pylist()
    assert set(table["source"].to_pylist()) == {"theirs"}
    if kind == "olmo":
        assert table["id"].to_pylist()[1] == "doc, 1"
        assert table["origin"].to_pylist()[1] == "web.jsonl:1"
    else:
        assert ":1" in table["origin"].to_pylist()[1]
        starts = np.asarray(ours["token_start"])
        assert table["offset"].to_pylist() == (2 * starts).tolist()


@pytest.mark.parametrize("kind", ["datatrove", "olmo"])
@pytest.mark.parametrize("limit", [100, 10**6])
def test_files_of_bounded_size(kind: str, limit: int, data: store.Tokens, tmp_path: Path) -> None:
    files = FORMATS[kind].export(data.dir, tmp_path / "out", tokens_per_file=limit)
    assert len(files) == 2 if limit == 10**6 else len(files) > 5
    for file in files:
        held = file.stat().st_size // 2
        count = len(_provenance_of(file))
        assert held <= limit or count == 1
    FORMATS[kind].import_(tmp_path / "out", tmp_path / "back")
    same(data, store.open_tokens(tmp_path / "back"), provenance=True)


def _provenance_of(file: Path) -> list[Any]:
    path = file.with_name(file.name.partition(".")[0] + outgoing.PROVENANCE)
    starts: list[Any] = pa.ipc.open_file(str(path)).read_all()["token_start"].to_pylist()
    assert starts[0] == 0
    return starts


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), limit=st.integers(1, 30))
def test_shards_cover_all_documents(lengths: list[int], limit: int) -> None:
    ends = np.cumsum(lengths)
    index = store.Index(np.array(lengths, np.int32), 2 * (ends - lengths))
    split = store.Split("train", np.zeros(ends[-1], "<u2"), index, Path(), np.zeros(0, REPEAT), ())
    found = outgoing.shards(split, limit)
    assert [s.first for s in found] == [0, *(s.last for s in found[:-1])] and found[-1].last == len(lengths)
    for shard, after in zip(found, [*found[1:], None], strict=True):
        assert shard.tokens == sum(lengths[shard.first : shard.last])
        assert shard.start == sum(lengths[: shard.first])
        assert shard.tokens <= limit or shard.last == shard.first + 1
        if after is not None:  # and no file could have taken one more
            assert shard.tokens + lengths[shard.last] > limit


def test_megatron_read_by_hand(data: store.Tokens, tmp_path: Path) -> None:
    """The exported pair, parsed value by value as the layout says."""
    megatron.export(data.dir, tmp_path / "out")
    raw = (tmp_path / "out" / "train.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\0\0" and struct.unpack("<QB", raw[9:18]) == (1, 8)
    sequences, documents = struct.unpack("<QQ", raw[18:34])
    assert documents == sequences + 1
    lengths = struct.unpack(f"<{sequences}i", raw[34 : 34 + 4 * sequences])
    pointers = struct.unpack(f"<{sequences}q", raw[34 + 4 * sequences : 34 + 12 * sequences])
    body, split = (tmp_path / "out" / "train.bin").read_bytes(), data.split("train")
    for number, (length, pointer) in enumerate(zip(lengths, pointers, strict=True)):
        ids = struct.unpack(f"<{length}H", body[pointer : pointer + 2 * length])
        assert list(ids) == split.document_tokens(number).tolist()


def write_pair(
    stem: Path, tokens: list[int], sequences: list[tuple[int, int]], documents: list[int], kind: str = "<i4"
) -> None:
    """Write a Megatron pair; ``sequences`` are (position, length) in tokens."""
    dtype = np.dtype(kind)
    code = {"<i4": 4, "<u2": 8, "<i8": 5, "<f4": 7}[kind]
    stem.with_suffix(".bin").write_bytes(np.array(tokens, dtype).tobytes())
    with stem.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents)))
        file.write(np.array([n for _, n in sequences], "<i4").tobytes())
        file.write(np.array([at * dtype.itemsize for at, _ in sequences], "<i8").tobytes())
        file.write(np.array(documents, "<i8").tobytes())


@pytest.mark.parametrize("kind", ["<i4", "<u2", "<i8"])
def test_documents_of_several_sequences(kind: str, tmp_path: Path) -> None:
    """Sequences are joined in the order of the index, not of the file; a document without any is counted."""
    tokens = [1, 2, 3, 0, 4, 5, 0, 6, 7, 8]
    write_pair(tmp_path / "a", tokens, [(4, 3), (0, 2), (2, 2), (7, 3)], [0, 1, 3, 3, 4], kind)
    how = Import(vocab_size=9, end_of_text=0, val_fraction=0.0)
    manifest = megatron.import_(tmp_path / "a", tmp_path / "out", how)
    back = store.verify(tmp_path / "out")
    split = back.split("train")
    found = [split.document_tokens(i).tolist() for i in range(len(split.index.lengths))]
    assert found == [[4, 5, 0], [1, 2, 3, 0], [6, 7, 8, 0]]
    assert split.tokens.dtype == np.uint16
    assert (manifest["ends_added"], manifest["skipped"]) == (1, {"empty document": 1})
    assert split.table["bytes"].to_pylist() == [0, 0, 0]  # nobody knows the texts
    from poise.data.tokens.tokenizer import load

    shown = load(back.tokenizer_path)
    assert shown.end_of_text == 0 and shown.decode(found[0]) == "4 5 <|endoftext|>"


def test_end_of_text_is_found_or_asked_for(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [5, 3, 6, 7, 3], [(0, 2), (2, 3)], [0, 1, 2])
    assert megatron.import_(tmp_path / "a.bin", tmp_path / "out", Import(vocab_size=9))["tokenizer"]["end_of_text"] == 3
    write_pair(tmp_path / "b", [5, 3, 6, 7, 4], [(0, 2), (2, 3)], [0, 1, 2])
    fails("end with different ids; give end_of_text", megatron, tmp_path / "b", tmp_path / "x", Import(vocab_size=9))
    fails("no tokenizer for .*give its tokenizer.json, or vocab_size", megatron, tmp_path / "b", tmp_path / "x")


def test_split_inside(tmp_path: Path) -> None:
    """Packed sequences can be cut after each end of text; by default they stay and are counted."""
    write_pair(tmp_path / "a", [1, 0, 2, 2, 0, 3, 4, 0], [(0, 6), (6, 2)], [0, 1, 2])
    how = Import(vocab_size=5, end_of_text=0, val_fraction=0.0)
    assert megatron.import_(tmp_path / "a", tmp_path / "one", how)["ends_inside"] == 2
    cut = Import(vocab_size=5, end_of_text=0, val_fraction=0.0, split=True)
    manifest = megatron.import_(tmp_path / "a", tmp_path / "two", cut)
    split = store.open_tokens(tmp_path / "two").split("train")
    assert split.index.lengths.tolist() == [2, 3, 2, 2]
    assert split.table["offset"].to_pylist() == [0, 8, 20, 24]
    assert (manifest["ends_inside"], manifest["ends_added"]) == (0, 1)


@settings(max_examples=40, deadline=None)
@given(ids=st.lists(st.integers(0, 2), max_size=20))
def test_split_is_the_plain_split(ids: list[int]) -> None:
    parts = [p.ids.tolist() for p in incoming.split(Incoming(np.array(ids, "<u2"), "x", 0), 0)]
    assert [i for part in parts for i in part] == ids
    assert all(part and 0 not in part[:-1] for part in parts)
    assert all(part[-1] == 0 for part in parts[:-1])


def test_held_out_by_content(tmp_path: Path) -> None:
    """Equal documents are on one side, wherever they stand; a small import has a held-out document."""
    rng = np.random.default_rng(1)
    bodies = [[*rng.integers(1, 50, 6).tolist(), 0] for _ in range(300)]
    for name, order in (("a", range(300)), ("b", reversed(range(300)))):
        rows = [bodies[i] for i in order] + bodies[:20]
        write_pair(
            tmp_path / name, [i for row in rows for i in row], [(7 * i, 7) for i in range(320)], list(range(321)), "<u2"
        )
        megatron.import_(tmp_path / name, tmp_path / f"out-{name}", Import(vocab_size=50, val_fraction=0.2))
    sides = [
        {side: set(opened.split(side).table["content_hash"].to_pylist()) for side in store.SPLITS}
        for opened in (store.open_tokens(tmp_path / f"out-{name}") for name in "ab")
    ]
    assert sides[0] == sides[1] and not sides[0]["train"] & sides[0]["val"]
    assert 30 < len(sides[0]["val"]) < 90
    write_pair(tmp_path / "c", [1, 2, 0, 3, 0], [(0, 3), (3, 2)], [0, 1, 2])
    megatron.import_(tmp_path / "c", tmp_path / "c-out", Import(vocab_size=50, end_of_text=0))
    assert store.open_tokens(tmp_path / "c-out").manifest["splits"]["val"]["documents"] == 1


@pytest.mark.slow  # datatrove's data set needs torch
def test_datatrove_reads_the_windows(data: store.Tokens, tmp_path: Path) -> None:
    dataset = pytest.importorskip("datatrove.utils.dataset")
    datatrove.export(data.dir, tmp_path / "out")
    split = data.split("train")
    windows = dataset.DatatroveFileDataset(str(tmp_path / "out" / "train.ds"), 15, token_size=2, return_positions=True)
    # Of each token, where its document begins.
    begins = np.repeat(split.index.pointers // 2, split.index.lengths)
    assert len(windows) == len(split.tokens) // 16
    for number in range(len(windows)):
        item, at = windows[number], 16 * number
        assert item["input_ids"].tolist() == split.tokens[at : at + 16].tolist()
        inside = np.arange(at, at + 16) - np.maximum(begins[at : at + 16], at)
        assert item["positions"].tolist() == inside.tolist()


def test_datatrove_reads_the_documents(data: store.Tokens, tmp_path: Path) -> None:
    """As datatrove's own merger does: the ends, and the bytes between them."""
    merger = pytest.importorskip("datatrove.pipeline.tokens.merger")
    datatrove.export(data.dir, tmp_path / "out")
    path, split = tmp_path / "out" / "train.ds", data.split("train")
    ends = merger.load_doc_ends(path.with_name("train.ds.index").open("rb"))
    assert ends.tolist() == np.cumsum(split.index.lengths).tolist()
    found = [np.frombuffer(raw, "<u2").tolist() for raw in merger.get_data_reader(path.open("rb"), ends, nb_bytes=2)]
    assert found == [split.document_tokens(i).tolist() for i in range(len(ends))]
    facts = (tmp_path / "out" / "train.ds.metadata").read_text().splitlines()
    assert facts[:2] == ["tokenizer.json|2", str(len(split.tokens))]


@pytest.mark.parametrize("size", [2, 4])
def test_datatrove_written_by_datatrove(size: int, tmp_path: Path) -> None:
    """What the real writer writes is read, whatever its token size, and a loss mask is counted."""
    module = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    file = module.TokenizedFile(
        str(tmp_path / "in"), "x.ds", save_loss_metadata=True, save_final_metadata=True, token_size=size
    )
    for ids in ([4, 5, 0], [6, 0], [7, 8, 9, 0]):
        file.write(ids, np.ones(len(ids)))
    file.close()
    manifest = datatrove.import_(tmp_path / "in", tmp_path / "out", Import(vocab_size=10, val_fraction=0.0))
    split = store.open_tokens(tmp_path / "out").split("train")
    assert split.tokens.tolist() == [4, 5, 0, 6, 0, 7, 8, 9, 0]
    assert split.index.lengths.tolist() == [3, 2, 4]
    assert manifest["skipped"] == {"loss mask (.ds.loss)": 1}


def test_olmo_read_by_hand(data: store.Tokens, tmp_path: Path) -> None:
    (file, _) = olmo.export(data.dir, tmp_path / "out", tokens_per_file=None)
    assert file.name == "train.npy"
    split = data.split("train")
    ids = np.memmap(file, np.uint16, "r")  # as OLMo opens it: raw, whatever the name says
    with gzip.open(tmp_path / "out" / "train.csv.gz", "rt", newline="") as lines:
        rows = list(csv.reader(lines))
    assert len(rows) == split.table.num_rows
    for number, (start, end, name, src, loc) in enumerate(rows):
        row = {key: split.table[key][number].as_py() for key in ("id", "origin", "content_hash")}
        assert ids[int(start) : int(end)].tolist() == split.document_tokens(number).tolist()
        assert name == (row["id"] or row["content_hash"].hex())
        assert (f"{src}:{loc}" if ":" in row["origin"] else src) == row["origin"]
    assert (tmp_path / "out" / "train.csv.gz").read_bytes()[3:8] == bytes(
        5
    )  # no name, no time: equal data, equal bytes


@pytest.mark.parametrize("header", [False, True])
def test_olmo_without_lines(header: bool, tmp_path: Path) -> None:
    ids = np.array([4, 5, 0, 6, 0, 7], "<u4")
    np.save(tmp_path / "a.npy", ids) if header else ids.tofile(tmp_path / "a.npy")
    how = Import(vocab_size=10, end_of_text=0, val_fraction=0.0)
    olmo.import_(tmp_path / "a.npy", tmp_path / "out", how, token_bytes=4)
    split = store.open_tokens(tmp_path / "out").split("train")
    assert split.tokens.tolist() == [4, 5, 0, 6, 0, 7, 0] and split.tokens.dtype == np.uint16
    assert split.table["origin"].to_pylist() == ["a.npy:0", "a.npy:1", "a.npy:2"]
    fails("has no a.csv.gz; give end_of_text", olmo, tmp_path, tmp_path / "x", Import(vocab_size=10))


def test_hugging_face_reads_the_export(data: store.Tokens, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    hf.export(data.dir, tmp_path / "out")
    found = datasets.load_from_disk(str(tmp_path / "out"))
    assert list(found) == ["train", "validation"]
    for name, theirs in (("train", "train"), ("val", "validation")):
        split, rows = data.split(name), found[theirs]
        assert len(rows) == split.table.num_rows
        for number, row in enumerate(rows):
            assert row["input_ids"] == split.document_tokens(number).tolist()
            assert row["origin"] == split.table["origin"][number].as_py()
            assert row["content_hash"] == split.table["content_hash"][number].as_py().hex()


def test_hugging_face_of_others(tmp_path: Path) -> None:
    """Any saved column of ids, also selected and reordered, and of another type."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"ids": [[1, 2], [3, 0], [], [4, 4, 4, 0]], "id": [7, 8, 9, 10]})
    rows.select([3, 2, 1]).save_to_disk(str(tmp_path / "in"))
    how = Import(vocab_size=5, end_of_text=0, val_fraction=0.0)
    hf.import_(tmp_path / "in", tmp_path / "out", how, column="ids")
    split = store.open_tokens(tmp_path / "out").split("train")
    assert split.tokens.tolist() == [4, 4, 4, 0, 3, 0]
    assert split.table["id"].to_pylist() == ["10", "8"]
    with pytest.raises(UserError, match="no column 'idz', did you mean 'id'"):
        hf.import_(tmp_path / "in", tmp_path / "x", how, column="idz")
    with pytest.raises(UserError, match="column 'id' is int64, not lists"):
        hf.import_(tmp_path / "in", tmp_path / "x", how, column="id")
    fails("no data set saved by save_to_disk", hf, tmp_path / "nowhere", tmp_path / "x")


def fails(match: str, module: Any, source: Path, out: Path, how: Import | None = None) -> None:
    with pytest.raises(UserError, match=match) as error:
        module.import_(source, out, how)
    assert "\n" not in str(error.value)
    assert not out.exists() and not list(out.parent.glob(".*partial*"))


@pytest.mark.parametrize("kind", ["megatron", "datatrove", "olmo"])
def test_damaged_input_is_one_line(kind: str, data: store.Tokens, tmp_path: Path) -> None:
    """Cut off, missing or foreign files say so, and nothing is written."""
    files = FORMATS[kind].export(
        data.dir, tmp_path / "out", **({} if kind == "megatron" else {"tokens_per_file": None})
    )
    file = files[0]
    beside = file.with_name(file.name.partition(".")[0] + SUFFIX[kind])
    whole, index = file.read_bytes(), beside.read_bytes()
    file.write_bytes(whole[:-8])
    fails("is damaged:", FORMATS[kind], tmp_path / "out", tmp_path / "x")
    file.write_bytes(whole)
    beside.write_bytes(index[:-8])
    fails("is damaged:", FORMATS[kind], tmp_path / "out", tmp_path / "x")
    beside.write_bytes(b"something else entirely")
    fails("is damaged:|is not an index|breaks off", FORMATS[kind], tmp_path / "out", tmp_path / "x")
    beside.unlink()
    if kind != "olmo":
        fails("cannot read|has no", FORMATS[kind], tmp_path / "out", tmp_path / "x")
    beside.write_bytes(index)
    (tmp_path / "out" / f"{file.name.partition('.')[0]}{outgoing.PROVENANCE}").write_bytes(b"no")
    fails("not an Arrow file", FORMATS[kind], tmp_path / "out", tmp_path / "x")
    fails("no .* at", FORMATS[kind], tmp_path / "empty", tmp_path / "x")


def test_provenance_of_other_tokens(data: store.Tokens, tmp_path: Path) -> None:
    datatrove.export(data.dir, tmp_path / "out")
    (tmp_path / "out" / "val.docs.arrow").replace(tmp_path / "out" / "train.docs.arrow")
    fails("is of other tokens; remove the provenance", datatrove, tmp_path / "out", tmp_path / "x")
    datatrove.export(data.dir, tmp_path / "again")
    index = tmp_path / "again" / "train.ds.index"
    ends = np.fromfile(index, "<u8")
    ends[3] -= 1  # as many documents, of other lengths
    ends.tofile(index)
    fails("is of other tokens; remove the provenance", datatrove, tmp_path / "again", tmp_path / "x")


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    for tokens in ([1, 9, 0], [1, -1, 0]):
        write_pair(tmp_path / "a", tokens, [(0, 3)], [0, 1])
        how = Import(vocab_size=5, end_of_text=0)
        fails(f"has id {tokens[1]}, the vocabulary 5 ids", megatron, tmp_path / "a", tmp_path / "x", how)
    write_pair(tmp_path / "a", [1, 2, 0], [(0, 3)], [0, 1], "<f4")
    fails("not whole numbers", megatron, tmp_path / "a", tmp_path / "x", Import(vocab_size=5, end_of_text=0))
    write_pair(tmp_path / "a", [], [], [0])
    fails("no documents", megatron, tmp_path / "a", tmp_path / "x", Import(vocab_size=5, end_of_text=0))


@pytest.mark.parametrize("documents", [[0, 3], [0, 2, 1, 2], [1, 2], []])
def test_index_that_contradicts_itself(documents: list[int], tmp_path: Path) -> None:
    write_pair(tmp_path / "a", [1, 0, 2, 0], [(0, 2), (2, 2)], documents)
    fails("is damaged:", megatron, tmp_path / "a", tmp_path / "x", Import(vocab_size=5, end_of_text=0))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_replaces_nothing(kind: str, data: store.Tokens, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="an export never replaces anything"):
        FORMATS[kind].export(data.dir, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["mine.txt"]
    with pytest.raises(UserError, match="holds other files"):
        FORMATS[kind].import_(FORMATS[kind].export(data.dir, tmp_path / "good") and tmp_path / "good", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


def test_full_disk(data: store.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outgoing.os, "fsync", full)
    for kind in FORMATS.values():
        with pytest.raises(UserError, match="disk is full"):
            kind.export(data.dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_settings() -> None:
    for values, match in (
        ({"val_fraction": 0.7}, "val_fraction is 0.7"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"vocab_size": 9, "tokenizer": "x"}, "both given"),
        ({"end_of_text": -1}, "end_of_text is -1"),
    ):
        with pytest.raises(UserError, match=match):
            Import(**values)  # type: ignore[arg-type]


def test_manifest_is_json(data: store.Tokens, tmp_path: Path) -> None:
    megatron.export(data.dir, tmp_path / "out")
    manifest = megatron.import_(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "manifest.json").read_text()) == manifest
    assert [source["name"] for source in manifest["sources"]] == ["web", "books"]
    assert sum(s["splits"]["train"]["tokens"] for s in manifest["sources"]) == manifest["splits"]["train"]["tokens"]
