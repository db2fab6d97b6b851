from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from poise.core.errors import UserError
from poise.data import prepare as module
from poise.data import store, writer
from poise.data.prepare import Settings, default_dir, prepare
from poise.data.store import Tokens, open_tokens, verify
from poise.data.tokenizer import load


def texts_of(tokens: Tokens, split: str) -> list[str]:
    opened, tokenizer = tokens.split(split), load(tokens.tokenizer_path)
    out = []
    for number in range(opened.table.num_rows):
        ids = opened.document_tokens(number)
        assert ids[-1] == tokens.end_of_text
        out.append(tokenizer.decode(ids[:-1]))
    return out


def make(folder: Path, **kwargs: Any) -> Tokens:
    return open_tokens(prepare(str(folder), folder.parent / "out", **{"vocab_size": 300, **kwargs}).dir)


def fails(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        prepare(*args, **kwargs)
    assert "\n" not in str(error.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip(corpus: Path, tokens: Tokens) -> None:
    expected = {path.read_text(encoding="utf-8") for path in corpus.iterdir()}
    train, val = texts_of(tokens, "train"), texts_of(tokens, "val")
    assert len(train) + len(val) == len(expected) == 24
    assert {*train, *val} == expected
    assert val and len(train) > len(val)
    facts = tokens.manifest["splits"]
    for name, texts in (("train", train), ("val", val)):
        split = tokens.split(name)
        assert facts[name] == {
            "documents": len(texts),
            "tokens": len(split.tokens),
            "bytes": sum(len(text.encode()) for text in texts),
        }
        assert split.tokens.dtype == np.dtype("<u2")
        assert int(split.tokens.max()) < tokens.vocab_size == 320


def test_documents_table_names_every_document(corpus: Path, tokens: Tokens) -> None:
    for name in ("train", "val"):
        rows = tokens.split(name).table.to_pylist()
        for row, text in zip(rows, texts_of(tokens, name), strict=True):
            assert (corpus / row["origin"]).read_text(encoding="utf-8") == text
            assert row["content_hash"] == writer.content_hash(text)
            assert (row["source"], row["offset"], row["bytes"]) == ("notes", 0, len(text.encode()))
        assert [row["origin"] for row in rows] == sorted(row["origin"] for row in rows)


def test_two_runs_write_the_same_bytes(corpus: Path, tokens: Tokens, tmp_path: Path) -> None:
    again = prepare(str(corpus), tmp_path / "again", vocab_size=320, val_fraction=0.25)
    assert names(again.dir) == {*store.FILES, store.MANIFEST}
    for name in names(again.dir):
        assert (again.dir / name).read_bytes() == (tokens.dir / name).read_bytes(), name
    assert verify(again.dir).fingerprint == tokens.fingerprint


def test_the_same_input_again_does_nothing(corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "notes")
    out = tmp_path / "out"
    first = prepare(str(folder), out, vocab_size=300)
    before = {name: (out / name).stat().st_mtime_ns for name in names(out)}
    second = prepare(str(folder), out, vocab_size=300)
    assert (first.reused, second.reused) == (False, True)
    assert second.manifest == first.manifest
    assert {name: (out / name).stat().st_mtime_ns for name in names(out)} == before
    # Any change of the input or the settings makes it anew.
    (folder / "new.txt").write_text("a new document")
    third = prepare(str(folder), out, vocab_size=300)
    assert not third.reused
    assert third.manifest["splits"]["train"]["documents"] == first.manifest["splits"]["train"]["documents"] + 1
    assert not prepare(str(folder), out, vocab_size=301).reused
    assert not prepare(str(folder), out, vocab_size=301, seed=1).reused
    assert names(tmp_path) == {"notes", "out"}


def test_damaged_data_is_made_again(corpus: Path, tmp_path: Path) -> None:
    out = prepare(str(corpus), tmp_path / "out", vocab_size=300).dir
    os.truncate(out / "train.bin", 10)
    assert not prepare(str(corpus), out, vocab_size=300).reused
    verify(out)


def test_prepared_data_as_a_source_is_opened(tokens: Tokens, tmp_path: Path) -> None:
    found = prepare(str(tokens.dir), tmp_path / "unused", vocab_size=999)
    assert (found.dir, found.reused) == (tokens.dir, True)
    assert not (tmp_path / "unused").exists()
    assert default_dir(str(tokens.dir), Settings()) == tokens.dir


def test_prepared_data_inside_its_source_is_not_read_as_text(corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "notes")
    assert not prepare(str(folder), folder / "ready", vocab_size=300).reused
    assert prepare(str(folder), folder / "ready", vocab_size=300).reused


def test_equal_texts_are_on_one_side(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"text number {number % 20}")
    tokens = make(folder, vocab_size=260, val_fraction=0.4)
    train, val = texts_of(tokens, "train"), texts_of(tokens, "val")
    assert len(train) + len(val) == 60
    assert len(set(train)) * 3 == len(train) and len(set(val)) * 3 == len(val)
    assert not set(train) & set(val)
    assert 3 <= len(set(val)) <= 14  # 8 of 20 expected


def test_the_seed_chooses_the_held_out_documents(corpus: Path, tmp_path: Path) -> None:
    held = []
    for seed in (0, 1):
        opened = prepare(str(corpus), tmp_path / str(seed), vocab_size=300, val_fraction=0.3, seed=seed)
        held.append(set(texts_of(open_tokens(opened.dir), "val")))
    assert held[0] != held[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [1e-9, 0.5])
def test_two_texts_have_both_sides(tmp_path: Path, seed: int, fraction: float) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "a.txt").write_text("first text")
    (folder / "b.txt").write_text("second text")
    (folder / "c.txt").write_text("first text")
    tokens = make(folder, vocab_size=257, val_fraction=fraction, seed=seed)
    verify(tokens.dir)
    sides = [set(texts_of(tokens, name)) for name in ("train", "val")]
    assert sorted(len(side) for side in sides) == [1, 1]
    assert sides[0] | sides[1] == {"first text", "second text"}
    assert not list(tokens.dir.glob("again"))


def test_moving_a_text_keeps_the_others_in_order(corpus: Path, tmp_path: Path) -> None:
    out = prepare(str(corpus), tmp_path / "out", vocab_size=300, val_fraction=1e-12).dir
    tokens = verify(out)
    train, val = texts_of(tokens, "train"), texts_of(tokens, "val")
    assert (len(train), len(val)) == (23, 1)
    origins = [row["origin"] for row in tokens.split("train").table.to_pylist()]
    assert origins == sorted(origins)
    starts = tokens.split("train").table["token_start"].to_numpy()
    assert np.array_equal(starts, tokens.split("train").index.pointers // 2)
    # The choice is by hash: it stays when other, larger keys come and go.
    key = {text: module.derive(0, "held-out", writer.content_hash(text).hex()) for text in train + val}
    assert min(key, key=lambda text: key[text]) == val[0]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5])
def test_one_document_is_for_training(tmp_path: Path, fraction: float) -> None:
    (tmp_path / "a.txt").write_text("only text")
    out = prepare(str(tmp_path / "a.txt"), tmp_path / "out", vocab_size=257, val_fraction=fraction).dir
    tokens = verify(out)
    assert texts_of(tokens, "train") == ["only text"]
    assert texts_of(tokens, "val") == []


def test_no_held_out_part_if_none_is_asked_for(corpus: Path, tmp_path: Path) -> None:
    out = prepare(str(corpus), tmp_path / "out", vocab_size=300, val_fraction=0).dir
    assert open_tokens(out).manifest["splits"]["val"] == {"documents": 0, "tokens": 0, "bytes": 0}


def test_replaced_and_skipped_are_in_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"bad \xff\xfe byte" * 3)
    (folder / "b.bin").write_bytes(b"\0\0\0")
    (folder / "c.txt").write_text("fine")
    (folder / "d.txt").symlink_to(folder / "none")
    tokens = make(folder, vocab_size=257)
    assert tokens.manifest["replaced_bytes"] == 6
    assert tokens.manifest["skipped"] == {"binary file": 1, "broken link": 1}
    by_origin = {
        row["origin"]: row["replaced_bytes"]
        for name in ("train", "val")
        for row in tokens.split(name).table.to_pylist()
    }
    assert by_origin == {"a.txt": 6, "c.txt": 0}


def test_a_given_tokenizer_is_used(corpus: Path, tokens: Tokens, tmp_path: Path) -> None:
    out = prepare(
        str(corpus),
        tmp_path / "out",
        tokenizer=str(tokens.tokenizer_path),
        val_fraction=0.25,
        vocab_size=5000,
    )
    assert out.manifest["tokenizer"] == tokens.manifest["tokenizer"]
    assert (out.dir / "train.bin").read_bytes() == (tokens.dir / "train.bin").read_bytes()
    assert (out.manifest["settings"]["tokenizer"], out.manifest["settings"]["vocab_size"]) == ("given", None)


def test_large_vocabularies_take_four_bytes(corpus: Path, tmp_path: Path) -> None:
    import tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000, "loss": 70_001}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "big.json"))
    out = prepare(str(corpus), tmp_path / "out", tokenizer=str(tmp_path / "big.json"), val_fraction=0.25).dir
    split = verify(out).split("train")
    assert split.tokens.dtype == np.dtype("<u4")
    assert {70_000, 70_001} <= set(split.tokens.tolist())
    assert split.document_tokens(3)[-1] == 70_000


def test_progress_rises_to_the_total(corpus: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    prepare(str(corpus), tmp_path / "out", vocab_size=300, progress=lambda *call: calls.append(call))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == [
        "sampling",
        "training tokenizer",
        "encoding",
        "sealing",
    ]
    for stage, total in (("sampling", size), ("training tokenizer", 1), ("encoding", size), ("sealing", 1)):
        done = [d for s, d, t in calls if s == stage and t == total]
        assert done == sorted(done) and done[-1] == total


def test_many_batches_and_record_batches(
    corpus: Path, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(writer, "_ROWS", 2)
    out = prepare(str(corpus), tmp_path / "out", vocab_size=320, val_fraction=0.25).dir
    assert (out / "train.bin").read_bytes() == (tokens.dir / "train.bin").read_bytes()
    assert (out / "train.idx").read_bytes() == (tokens.dir / "train.idx").read_bytes()
    table = verify(out).split("train").table
    assert table["origin"].num_chunks > 5
    assert table.equals(tokens.split("train").table)


# What can go wrong.


def test_bad_settings(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails("vocab_size is 256.*at least 257", "stdlib", out, vocab_size=256)
    for fraction in (-0.1, 0.51, float("nan")):
        fails(f"val_fraction is {fraction}", "stdlib", out, val_fraction=fraction)
    fails("text_field is empty", "stdlib", out, text_field="")
    fails("no tokenizer 'none.json'", "stdlib", out, tokenizer="none.json")


def test_sources_without_text(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails("no file or folder", str(tmp_path / "none"), out)
    folder = tmp_path / "in"
    folder.mkdir()
    fails("no text in .*it is empty", str(folder), out)
    (folder / "a.bin").write_bytes(b"\0")
    fails("no text in .*1 binary file", str(folder), out)
    (folder / "a.jsonl").write_text('{"body": "x", "id": 3}\n')
    fails("its fields: body, id.*--data.text_field", str(folder), out)
    fails("its fields: body, id", str(folder), out, tokenizer=None, vocab_size=257)
    assert names(tmp_path) == {"in"}


def test_too_little_text_for_the_default_vocabulary(corpus: Path, tmp_path: Path) -> None:
    fails("too small for a vocabulary of 8192 ids: it supports", str(corpus), tmp_path / "out")
    assert names(tmp_path) == set()


def test_other_files_are_never_replaced(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    fails("holds other files.*--data.dir", str(corpus), tmp_path, vocab_size=300)
    fails("is a file", str(corpus), tmp_path / "thesis.tex", vocab_size=300)
    assert names(tmp_path) == {"thesis.tex"}


def test_a_place_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(
        "cannot write .*--data.dir PATH or set POISE_CACHE",
        str(corpus),
        tmp_path / "file" / "a",
        vocab_size=300,
    )


def test_a_full_disk_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    # A limit on the size of a file is the nearest thing to a full disk that every machine has.
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from poise.data.prepare import prepare; from poise.core.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "try: prepare(sys.argv[1], Path(sys.argv[2]), vocab_size=300)\n"
        "except UserError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.count("\n") == 1
    assert "disk is full" in run.stdout and "--data.dir PATH" in run.stdout
    assert run.stderr == ""
    assert names(tmp_path) == set()


@pytest.mark.parametrize("place", ["add", "close"])
def test_no_space_while_writing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.SplitWriter, place, full)
    fails("disk is full", str(corpus), tmp_path / "out", vocab_size=300)
    assert names(tmp_path) == set()


def test_an_interrupt_keeps_what_was_there(corpus: Path, tmp_path: Path) -> None:
    out = prepare(str(corpus), tmp_path / "out", vocab_size=300).dir
    before = json.loads((out / "manifest.json").read_text())

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "encoding":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(corpus), out, vocab_size=310, progress=stop)
    assert names(tmp_path) == {"out"}
    assert verify(out).manifest == before


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_run_leaves_nothing_that_looks_whole(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from poise.data.prepare import prepare\n"
        "def kill(stage, done, total):\n"
        "    if stage == 'sealing': os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(sys.argv[1], Path(sys.argv[2]), vocab_size=300, progress=kill)"
    )
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", code, str(corpus), str(out)], check=False)
    assert run.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    with pytest.raises(UserError, match="no prepared data"):
        open_tokens(left)
    prepare(str(corpus), out, vocab_size=300)
    assert names(tmp_path) == {"out"}


def test_unfinished_folders_of_the_living_stay(corpus: Path, tmp_path: Path) -> None:
    host = socket.gethostname()
    mine = tmp_path / f".out.partial-{host}-{os.getppid()}"
    fresh, stale = tmp_path / ".out.partial-elsewhere-1", tmp_path / ".out.partial-elsewhere-2"
    other = tmp_path / ".output.partial-elsewhere-3"
    for folder in (mine, fresh, stale, other):
        folder.mkdir()
    for folder in (mine, stale, other):
        os.utime(folder, (time.time() - 10**6,) * 2)
    prepare(str(corpus), tmp_path / "out", vocab_size=300)
    assert names(tmp_path) == {"out", mine.name, fresh.name, other.name}


def test_without_a_folder_the_cache_is_used(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    done = prepare(str(corpus), vocab_size=300)
    assert done.dir == default_dir(str(corpus), Settings(vocab_size=300))
    assert verify(done.dir).vocab_size == 300
    assert prepare(str(corpus), None, vocab_size=300).reused
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*file.*--data\.dir PATH or set POISE_CACHE"):
        prepare(str(corpus), vocab_size=300)


def test_default_dir(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    place = default_dir(str(corpus), Settings())
    assert place.parent == tmp_path / "cache" / "data"
    assert place.name.startswith("notes-")
    assert default_dir(str(corpus), Settings()) == place
    assert default_dir(str(corpus), Settings(seed=1)) != place
    copy = shutil.copytree(corpus, tmp_path / "notes")
    assert default_dir(str(copy), Settings()) != place
    monkeypatch.delenv("POISE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_dir("stdlib", Settings()).parent == tmp_path / ".cache" / "poise" / "data"
    assert default_dir("hf:owner/na me:test", Settings()).name.startswith("owner-na-me-")


def test_jsonl_and_parquet_lead_to_the_same_tokens(corpus: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    made = [
        prepare(str(tmp_path / name), tmp_path / f"out{name}", vocab_size=300).dir for name in ("a.jsonl", "a.parquet")
    ]
    for name in ("train.bin", "val.bin", "train.idx", "tokenizer.json"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()
