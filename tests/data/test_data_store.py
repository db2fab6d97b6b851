from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from poise.core.errors import UserError
from poise.data.look.inspect import describe
from poise.data.megatron_index import open_index, write_index
from poise.data.prepare import prepare
from poise.data.settings import Settings
from poise.data.staging import staged
from poise.data.store import FILES, Tokens, check, open_tokens, token_dtype, verify


@pytest.fixture
def copy(cleaned: Tokens, tmp_path: Path) -> Path:
    return shutil.copytree(cleaned.dir, tmp_path / "data")


def fails(match: str, folder: Path, split: str = "") -> None:
    with pytest.raises(UserError, match=match) as error:
        opened = verify(folder)
        if split:
            opened.split(split)
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("name", ["train", "val"])
def test_index_read_by_hand(tokens: Tokens, name: str) -> None:
    """Parse the file byte by byte as the layout of Megatron-LM says."""
    raw = (tokens.dir / f"{name}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", raw[9:34])
    assert (version, code) == (1, 8)  # 8 stands for uint16
    assert documents == sequences + 1 == tokens.manifest["splits"][name]["documents"] + 1
    at = 34
    lengths = struct.unpack(f"<{sequences}i", raw[at : at + 4 * sequences])
    at += 4 * sequences
    pointers = struct.unpack(f"<{sequences}q", raw[at : at + 8 * sequences])
    at += 8 * sequences
    starts = struct.unpack(f"<{documents}q", raw[at : at + 8 * documents])
    assert at + 8 * documents == len(raw)
    assert starts == tuple(range(documents))
    assert sum(lengths) * 2 == (tokens.dir / f"{name}.bin").stat().st_size
    body = (tokens.dir / f"{name}.bin").read_bytes()
    for length, pointer in zip(lengths, pointers, strict=True):
        ids = struct.unpack(f"<{length}H", body[pointer : pointer + 2 * length])
        assert ids[-1] == tokens.end_of_text
        assert tokens.end_of_text not in ids[:-1]


@pytest.mark.parametrize(("vocab", "code"), [(65_536, 8), (65_537, 4)])
def test_index_of_no_documents_and_of_both_types(tmp_path: Path, vocab: int, code: int) -> None:
    dtype = token_dtype(vocab)
    for lengths in ([], [5], [3, 1, 7]):
        write_index(tmp_path / "a.idx", np.array(lengths, np.int32), dtype)
        index = open_index(tmp_path / "a.idx", dtype)
        assert index.lengths.tolist() == lengths
        assert index.pointers.tolist() == [sum(lengths[:i]) * dtype.itemsize for i in range(len(lengths))]
        assert (tmp_path / "a.idx").read_bytes()[17] == code
    other = token_dtype(3) if code == 4 else token_dtype(10**6)
    with pytest.raises(UserError, match="damaged"):
        open_index(tmp_path / "a.idx", other)


def test_opened_data(tokens: Tokens) -> None:
    assert tokens.vocab_size == 320
    assert tokens.tokenizer_path == tokens.dir / "tokenizer.json"
    assert tokens.split("train").name == "train"
    assert not tokens.split("train").tokens.flags.writeable
    with pytest.raises(UserError, match="no split 'test'"):
        tokens.split("test")


def test_arrow_file_is_an_ordinary_one(tokens: Tokens) -> None:
    with pa.OSFile(str(tokens.dir / "train.docs.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.column_names[:3] == ["token_start", "token_length", "content_hash"]
    lengths = table["token_length"].to_numpy()
    assert np.array_equal(table["token_start"].to_numpy(), np.cumsum(lengths) - lengths)


def test_the_manifest_holds_no_time(tokens: Tokens) -> None:
    text = (tokens.dir / "manifest.json").read_text()
    assert not any(word in text for word in ("time", "date", "created"))


def test_a_missing_or_cut_file(copy: Path) -> None:
    for name in FILES:
        raw = (copy / name).read_bytes()
        os.truncate(copy / name, len(raw) - 1)
        with pytest.raises(UserError, match=f"{name} has {len(raw) - 1:,} bytes instead of {len(raw):,}"):
            open_tokens(copy)
        (copy / name).unlink()
        fails(f"{name} is missing", copy)
        (copy / name).write_bytes(raw)
    verify(copy)


def test_changed_contents_are_found_by_verify(copy: Path) -> None:
    for name in (*FILES, "dropped/00000.parquet"):
        raw = (copy / name).read_bytes()
        changed = bytearray(raw)
        changed[len(raw) // 2] ^= 1
        (copy / name).write_bytes(changed)
        open_tokens(copy)  # sizes are as they were
        fails(f"the contents of {name} have changed", copy)
        (copy / name).write_bytes(raw)
    verify(copy)


def test_damage_that_only_opening_a_split_meets(copy: Path) -> None:
    for name, data in (("train.idx", b"\0"), ("train.docs.arrow", b"\0")):
        raw = (copy / name).read_bytes()
        (copy / name).write_bytes(data * len(raw))
        with pytest.raises(UserError, match="is damaged") as error:
            _ = open_tokens(copy).split("train").table
        assert "\n" not in str(error.value)
        (copy / name).write_bytes(raw)
    open_tokens(copy).split("train")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["tokens"] -= 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="disagree"):
        open_tokens(copy).split("train")


def test_folders_that_are_not_prepared_data(copy: Path, tmp_path: Path) -> None:
    fails("holds no prepared data", tmp_path / "none")
    fails("holds no prepared data", copy / "train.bin")
    manifest = json.loads((copy / "manifest.json").read_text())
    for change, match in (
        ({"version": 99}, "has data format 99, this poise reads 2"),
        ({"format": "web app"}, "of another program"),
    ):
        (copy / "manifest.json").write_text(json.dumps(manifest | change))
        fails(match, copy)
    (copy / "manifest.json").write_text(json.dumps(manifest)[:100])
    fails("manifest.json is not JSON", copy)
    (copy / "manifest.json").write_text("[]")
    fails("of another program", copy)


def test_describe(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("a", "abab"), ("b", "abab"), ("c", "abcabcabc")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    out = prepare(str(tmp_path / "in"), tmp_path / "out", Settings(vocab_size=257, val_fraction=0.3)).dir
    facts = describe(out)
    assert (facts["documents"], facts["tokens"], facts["bytes"]) == (3, 20, 17)
    assert facts["splits"]["train"]["documents"] + facts["splits"]["val"]["documents"] == 3
    assert facts["bytes_per_token"] == 1.0
    assert facts["duplicate_documents"] == 1
    assert (facts["longest_document"]["tokens"], facts["longest_document"]["origin"]) == (10, "c.txt")
    assert facts["ids_never_seen"] == 257 - 4  # a, b, c and the end of text
    assert facts["ids_seen_under_10_times"] == 257
    assert json.loads(json.dumps(facts)) == facts


def test_describe_with_an_empty_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    facts = describe(prepare(str(tmp_path / "a.txt"), tmp_path / "out", Settings(vocab_size=257)).dir)
    assert (facts["splits"]["val"]["tokens"], facts["tokens"], facts["duplicate_documents"]) == (0, 4, 0)


def test_what_killed_processes_left(copy: Path, tmp_path: Path) -> None:
    """Old data that were moved aside are put back where the new ones never came."""
    before = verify(copy).manifest
    process = subprocess.Popen([sys.executable, "--version"], stdout=subprocess.DEVNULL)
    process.wait()
    host, dead = socket.gethostname(), process.pid
    for number in range(2):
        old = tmp_path / f".data.old-{host}-{dead}"
        if number:  # the new data did come
            shutil.copytree(copy, old)
        else:
            copy.rename(old)
        half = tmp_path / f".data.partial-{host}-{dead}"
        half.mkdir()
        with pytest.raises(KeyboardInterrupt), staged(copy):
            raise KeyboardInterrupt
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
        assert verify(copy).manifest == before


def test_a_failed_step_leaves_nothing(tmp_path: Path, copy: Path) -> None:
    for error, match in (
        (OSError(errno.ENOSPC, "No space"), "disk is full"),
        (OSError(errno.EACCES, "No"), "cannot wr"),
    ):
        with pytest.raises(UserError, match=match) as caught, staged(copy) as aside:
            (aside / "train.bin").write_text("half")
            raise error
        assert "\n" not in str(caught.value) and "same command" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
    verify(copy)


def test_begins_are_the_pointers(cleaned: Tokens) -> None:
    split = cleaned.split("train")
    starts = split.table["token_start"].to_numpy()
    assert np.array_equal(split.begins, starts)
    assert split.document_tokens(5).tolist() == split.tokens[starts[5] : starts[6]].tolist()


def test_check_looks_at_what_is_small_enough(copy: Path) -> None:
    tokens = open_tokens(copy)
    size = sum(tokens.manifest["files"][name]["bytes"] for name in FILES)
    dropped = copy / "dropped" / "00000.parquet"
    raw = dropped.read_bytes()
    dropped.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    assert check(tokens) and check(tokens, size) and not check(tokens, size - 1)  # training does not read it
    assert not check(tokens, size, dropped=True)
    with pytest.raises(UserError, match=r"contents of dropped/00000.parquet have changed; remove the folder"):
        check(tokens, dropped=True)
    dropped.unlink()
    assert check(tokens, dropped=True)
    raw = (copy / "val.bin").read_bytes()
    (copy / "val.bin").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert not check(tokens, size - 1)
    with pytest.raises(UserError, match=r"contents of val.bin have changed"):
        check(tokens)
    (copy / "val.bin").unlink()
    with pytest.raises(UserError, match=r"val.bin': No such file"):
        check(tokens)
