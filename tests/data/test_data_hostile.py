"""Bad input, bad places and changed data, through the command line: one clear line, exit code 2, nothing lost."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.shell import VOCABULARY, Poise, contents, end, names, start, without_permission, words, write

from poise.cli.main import main
from poise.core.lock import claim
from poise.data import sources, store, work
from poise.data.readers import jsonl
from poise.data.store import open_tokens, verify

pytestmark = pytest.mark.usefixtures("own_places")


# What is in the sources.


def test_nothing_left_names_the_filter(poise: Poise, notes: Path, tmp_path: Path) -> None:
    line = poise.prepare(notes, "--out", "out", "--filters", "c4").line
    assert "nothing is left of 12 documents: c4.sentences took 12" in line
    assert names(tmp_path) == set()


@pytest.mark.parametrize("empty", [b"", b" \n\t\n"])
def test_sources_without_text(poise: Poise, tmp_path: Path, empty: bytes) -> None:
    (tmp_path / "in").mkdir()
    assert "no text in" in poise.prepare("in", "--out", "out").line
    (tmp_path / "in" / "a.txt").write_bytes(empty)
    assert "1 empty" in poise.prepare("in", "--out", "out").line
    assert "did you mean 'in'" in poise.prepare("inn", "--out", "out").line
    assert names(tmp_path) == {"in"}


def test_unset_variables_do_not_mean_this_folder(poise: Poise, notes: Path, tmp_path: Path) -> None:
    assert "a source is empty" in poise.prepare("", "--out", "out").line
    assert "--out is empty" in poise.prepare(notes, "--out", "").line
    assert names(tmp_path) == set()


def test_nul_bytes_and_other_encodings_are_counted(poise: Poise, tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    (folder / "nul.txt").write_bytes(words(40, 1).encode() + b" a\0b \0\0")
    (folder / "latin.txt").write_bytes(f"Über den Flüssen {words(40, 2)} schöne Grüße".encode("cp1252"))
    (folder / "wide.txt").write_bytes(words(40, 3).encode("utf-16"))
    (folder / "bad.txt").write_bytes(words(40, 4).encode() + b" \xff\xfe\xf8 end")
    mixed = [json.dumps({"text": f"schön {words(20, n)}"}, ensure_ascii=False) for n in range(4)]
    (folder / "mixed.jsonl").write_bytes(
        b"\n".join(line.encode("cp1252" if n % 2 else "utf-8") for n, line in enumerate(mixed))
    )
    facts = poise.prepare(folder, "--out", "out").facts
    assert facts["removed"]["NUL"] == 3
    assert facts["converted"] == {"cp1252": 3, "utf-16-le": 1}
    assert facts["replaced_bytes"] == 3
    assert facts["documents"] == 12 + 4 + 4
    text = poise("inspect", "out", "--search", "schön", "--json").out
    assert len(text.splitlines()) == 5


def test_duplicate_ids_are_counted(poise: Poise, tmp_path: Path) -> None:
    rows = [json.dumps({"id": "same" if n % 2 else n, "text": f"{n} {words(30, n)}"}) for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    facts = poise.prepare("a.jsonl", "--out", "out").facts
    assert (facts["documents"], facts["duplicate_ids"]) == (10, 4)


def test_a_line_without_end_is_never_in_memory(poise: Poise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 2**12)
    good = json.dumps({"text": words(50)}) + "\n"
    (tmp_path / "a.jsonl").write_text(good + '{"text": "' + "a" * 2**20 + '"}\n' + good.replace("loss", "lost"))
    facts = poise.prepare("a.jsonl", "--out", "out").facts
    assert facts["documents"] == 2
    assert [reason for reason in facts["skipped"] if reason.startswith("line over")]
    (tmp_path / "b.txt").write_text("".join(f"{n:07x}" for n in range(2**16)))  # no space, no newline
    facts = poise.prepare("b.txt", "--out", "out2").facts
    assert facts["bytes"] == 7 * 2**16 and facts["longest_document"]["tokens"] <= 2**13


def damage(folder: Path) -> dict[str, int]:
    """Write damaged files; return how many documents can be read of each."""
    lines = "".join(json.dumps({"text": f"{n} {words(40, n)}"}) + "\n" for n in range(400)).encode()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-3000])
    (folder / "b.jsonl.zst").write_bytes(pa.compress(lines, "zstd", asbytes=True)[:-9000])
    table = pa.table({"text": [words(40, n) for n in range(100)]})
    pq.write_table(table, folder / "c.parquet", row_group_size=10, compression="none", use_dictionary=False)
    whole = bytearray((folder / "c.parquet").read_bytes())
    whole[len(whole) // 2 : len(whole) // 2 + 4000] = b"\xff" * 4000
    (folder / "c.parquet").write_bytes(whole)
    (folder / "d.parquet").write_bytes(bytes(whole[: len(whole) // 2]))
    with pa.OSFile(str(folder / "e.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        for batch in table.to_batches(10):
            stream.write_batch(batch)
    os.truncate(folder / "e.arrow", (folder / "e.arrow").stat().st_size // 2)
    return {"a.jsonl.gz": 200, "b.jsonl.zst": 0, "c.parquet": 10, "d.parquet": 0, "e.arrow": 10}


def test_damaged_members_are_used_up_to_the_damage_and_named(poise: Poise, tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    least = damage(folder)
    ran = poise("prepare", folder, "--out", "out", *VOCABULARY)
    assert ran.code == 0 and f"damaged, the rest of them is used: {', '.join(least)}" in ran.err
    facts = poise.prepare(folder, "--out", "out").facts
    assert facts["reused"] and facts["damaged"] == list(least) and facts["skipped"]["damaged file"] == len(least)
    table = verify("out").split("train").table
    read = [origin.partition(":")[0] for origin in table["origin"].to_pylist()]
    for name, count in least.items():
        assert read.count(name) >= count, name
    assert read.count("a.jsonl.gz") < 400 and read.count("c.parquet") < 100


@pytest.mark.parametrize("name", ["a.jsonl.gz", "b.jsonl.zst", "c.parquet", "d.parquet", "e.arrow"])
def test_strict_stops_at_damage(poise: Poise, notes: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "all").mkdir()
    damage(tmp_path / "all")
    folder = shutil.copytree(notes, tmp_path / "in")
    (tmp_path / "all" / name).rename(folder / name)
    line = poise.prepare(folder, "--out", "out", "--strict").line
    assert f"{name}' is damaged" in line
    assert names(tmp_path) == {"all", "in"}


def test_a_file_that_vanishes(poise: Poise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "in")
    listed = sources.resolve_all

    def then_gone(given: list[str]) -> Any:
        found = listed(given)
        (folder / "003.txt").unlink()
        return found

    monkeypatch.setattr(sources, "resolve_all", then_gone)
    assert "has gone since" in poise.prepare(folder, "--out", "out", "--strict").line
    (folder / "003.txt").write_text("it is back")
    facts = poise.prepare(folder, "--out", "out").facts
    assert (facts["documents"], facts["skipped"]) == (11, {"vanished file": 1})


def test_odd_files_in_a_folder(poise: Poise, tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "gone").symlink_to("nowhere")
    (folder / "two\nlines.txt").write_text(words(30, 77))
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt")).write_text(words(30, 78))
    facts = poise.prepare(folder, "--out", "out").facts
    assert (facts["documents"], facts["skipped"]) == (14, {"broken link": 2, "special file": 1})
    shown = poise("inspect", "out", "--sort", "document", "--count", "20").out
    assert "two\\nlines.txt" in shown and "??.txt" in shown


@pytest.mark.parametrize("kind", ["file", "arrow", "folder", "out"])
def test_names_that_are_not_utf8(poise: Poise, tmp_path: Path, kind: str) -> None:
    odd = os.fsdecode(b"x\xff\ny")
    folder = write(tmp_path / (odd if kind == "folder" else "in"))
    if kind == "arrow":
        table = pa.table({"text": [words(40, n) for n in range(3)]})
        with pa.OSFile(str(tmp_path / "plain"), "wb") as out, pa.ipc.new_file(out, table.schema) as file:
            file.write_table(table)
        (tmp_path / "plain").rename(folder / f"{odd}.arrow")
    elif kind == "file":
        (folder / f"{odd}.txt").write_text(words(10))
    place = tmp_path / (odd if kind == "out" else "out")
    facts = poise.prepare(folder, "--out", place).facts
    assert facts["documents"] == 12 + {"arrow": 3, "file": 1}.get(kind, 0)
    assert poise("verify", place).code == 0
    assert poise("inspect", place, "--sample", "3").code == 0
    assert "no prepared data" in poise("verify", str(place) + "\n?").line


@pytest.mark.parametrize("kind", ["fifo", "loop", "null"])
def test_sources_that_are_no_files(poise: Poise, tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    assert poise.prepare({"null": os.devnull}.get(kind, kind), "--out", "out").line
    assert names(tmp_path) == {"fifo", "loop"}


def test_what_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "in")
    (folder / "003.txt").chmod(0)
    (folder / "sub").mkdir(0)
    try:
        ran = end(*start([folder, "--out", "out"], without_permission))
        strict = end(*start([folder, "--out", "out2", "--strict"], without_permission))
        alone = end(*start([folder / "003.txt", "--out", "out2"], without_permission))
    finally:
        (folder / "sub").chmod(0o755)
    assert ran.code == 0, ran
    assert open_tokens("out").manifest["skipped"] == {"unreadable file": 1, "unreadable folder": 1}
    for each in (strict, alone):
        assert "003.txt': Permission denied; check its permissions" in each.line
    assert names(tmp_path) == {"in", "out"}


def test_one_source_twice(poise: Poise, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(notes)
    for again in (f"{notes}/", f"b={notes}", "link"):
        assert "is the same place as" in poise.prepare(notes, again, "--out", "out").line


# Tokenizers and other files that are given.


def test_a_tokenizer_without_an_end_of_text_gets_one_and_says_so(poise: Poise, notes: Path, tmp_path: Path) -> None:
    assert poise.prepare(notes, "--out", "out").code == 0
    text = (tmp_path / "out" / "tokenizer.json").read_text()
    (tmp_path / "mine.json").write_text(text.replace("<|endoftext|>", "<|nothing|>"))
    facts = poise.prepare(notes, "--out", "out2", "--tokenizer", "mine.json").facts
    assert facts["vocab_size"] == 281
    assert [line for line in facts["warnings"] if "end of text" in line]
    split = verify("out2").split("train")
    assert split.document_tokens(0)[-1] == 280


@pytest.mark.parametrize("data", [b"", b"{}", b'{"model": 1}', b"\xff\xfe\0", b"[" * 10**5, None])
def test_what_is_no_tokenizer(poise: Poise, notes: Path, tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / "bad.json").write_bytes(data)
    line = poise.prepare(notes, "--out", "out", "--tokenizer", "bad.json").line
    assert ("no tokenizer 'bad.json'" if data is None else "is not a tokenizer.json") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--decontaminate", "--block-urls"])
def test_lists_that_are_missing_or_no_lists(poise: Poise, notes: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\0\1\2\3\xff" * 100)
    for given in ("nowhere", "empty", "binary")[: 3 if option == "--block-urls" else 2]:
        assert poise.prepare(notes, "--out", "out", option, given).line
    assert not (tmp_path / "out").exists()


def test_a_second_vocabulary_in_one_process(poise: Poise, notes: Path) -> None:
    """The work folder has the same name each time: nothing in this process may be remembered by that name."""
    for size in ("290", "270"):
        assert main(["data", "prepare", str(notes), "--out", "out", "--vocab-size", size]) == 0
        assert int(verify("out").split("train").tokens.max()) < int(size)


# Where the result goes.


def test_places_that_will_not_do(poise: Poise, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("years of work")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    before = contents(tmp_path / "thesis")
    assert "holds other files" in poise.prepare(notes, "--out", "thesis").line
    assert "holds other files" in poise.prepare(notes, "--out", notes).line
    for place, says in (("file", "is a file"), ("file/out", "Not a directory"), ("loop", "loop")):
        line = poise.prepare(notes, "--out", place).line
        assert says in line and "--out DIR" in line and "--data" not in line
    assert poise.prepare(notes, "--out", "a" * 300).line
    assert contents(tmp_path / "thesis") == before and (tmp_path / "file").read_text() == "precious"
    assert names(tmp_path) == {"thesis", "file", "loop"}


def test_a_place_without_permission(notes: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o555)
    line = end(*start([notes, "--out", tmp_path / "closed" / "out"], without_permission)).line
    assert "Permission denied" in line and "--out DIR" in line
    assert names(tmp_path / "closed") == set()


@pytest.mark.parametrize("there", [False, True])
def test_a_link_as_the_place_leads_to_the_result(poise: Poise, notes: Path, tmp_path: Path, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "tokens").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "tokens")
    assert poise.prepare(notes, "--out", "out").code == 0
    assert (tmp_path / "out").is_symlink() and verify(tmp_path / "disk" / "tokens")


def test_prepared_data_as_a_source(poise: Poise, notes: Path, tmp_path: Path) -> None:
    assert not poise.prepare(notes, "--out", "out").facts["reused"]
    before = contents(tmp_path / "out")
    assert poise.prepare("out").facts["reused"]
    assert poise.prepare("out", "--out", "out").facts["reused"]
    assert "is prepared already" in poise.prepare("out", "--out", "other").line
    assert "is prepared already" in poise.prepare("out", "--dry-run").line
    assert "is prepared already" in poise.prepare("out", notes, "--out", "other").line
    assert contents(tmp_path / "out") == before and names(tmp_path) == {"out"}


def test_two_at_one_place(poise: Poise, notes: Path, tmp_path: Path) -> None:
    folder = work.folder_of(tmp_path / "out")
    folder.mkdir()
    with (folder / "lock").open("a") as lock:
        assert claim(lock)
        assert "another process is preparing" in poise.prepare(notes, "--out", "out").line
        assert names(tmp_path) == {".out.work"}
    assert poise.prepare(notes, "--out", "out").code == 0
    assert names(tmp_path) == {"out"}


# Data that has changed since it was prepared.


@pytest.fixture(scope="module")
def prepared(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """Prepared data with something in ``dropped``, and the words that made it; not to be changed."""
    place = tmp_path_factory.mktemp("prepared")
    (place / "list").write_text((notes / "000.txt").read_text())
    words: list[object] = [notes, "--decontaminate", place / "list"]
    assert main(["data", "prepare", *map(str, words), "--out", str(place / "out"), *VOCABULARY]) == 0
    return place / "out", words


def _tamper(folder: Path, what: str) -> None:
    manifest = folder / store.MANIFEST
    if what == "bit":
        data = bytearray((folder / "train.bin").read_bytes())
        data[7] ^= 1
        (folder / "train.bin").write_bytes(data)
    elif what == "cut":
        os.truncate(folder / "train.bin", 100)
    elif what == "gone":
        (folder / "val.idx").unlink()
    elif what == "dropped":
        (folder / store.DROPPED / "00000.parquet").write_bytes(b"PAR1")
    else:
        facts = json.loads(manifest.read_bytes())
        changed: dict[str, Any] = {
            "not JSON": "{",
            "a list": [],
            "files": facts | {"files": []},
            "nothing": {"format": facts["format"], "version": facts["version"]},
            "no splits": {key: value for key, value in facts.items() if key != "splits"},
            "no sources": {key: value for key, value in facts.items() if key != "sources"},
            "no tokenizer": facts | {"tokenizer": None},
        }
        value = changed[what]
        manifest.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    "what",
    [
        "bit",
        "cut",
        "gone",
        "dropped",
        "not JSON",
        "a list",
        "files",
        "nothing",
        "no splits",
        "no sources",
        "no tokenizer",
    ],
)
def test_changed_data_is_found(poise: Poise, prepared: tuple[Path, list[object]], tmp_path: Path, what: str) -> None:
    good, words = contents(prepared[0]), [*prepared[1], "--out", "out"]
    shutil.copytree(prepared[0], tmp_path / "out")
    _tamper(tmp_path / "out", what)
    assert "out' is damaged" in poise("verify", "out").line or what == "a list"
    if what in ("bit", "dropped"):
        before = contents(tmp_path / "out")
        if what == "bit":  # else its size has changed, which is no matter: it may also be removed
            assert "contents of train.bin have changed; remove the folder" in poise.prepare(*words).line
            assert "contents of train.bin have changed" in poise.prepare("out").line
            assert "contents of train.bin have changed" in poise("export", "out", "--to", "olmo", "--out", "x").line
        else:
            assert "dropped/00000.parquet have changed" in poise.prepare(*words).line
            assert poise("export", "out", "--to", "olmo", "--out", "x").code == 0
        assert contents(tmp_path / "out") == before
        shutil.rmtree(tmp_path / "out")
        assert not poise.prepare(*words).facts["reused"]
        assert contents(tmp_path / "out") == good
        return
    assert poise("inspect", "out").line
    if what in ("cut", "not JSON", "files"):
        assert not poise.prepare(*words).facts["reused"]
        assert contents(tmp_path / "out") == good


@pytest.mark.parametrize(
    "view",
    [
        "--vocabulary",
        "--document {}",
        "--sample 99",
        "--search the",
        "--search /the/",
        "--sort bytes",
        "--diversity",
        "--drop document=0 --out less",
    ],
)
def test_an_id_outside_the_vocabulary(
    poise: Poise, prepared: tuple[Path, list[object]], tmp_path: Path, view: str
) -> None:
    shutil.copytree(prepared[0], tmp_path / "out")
    split = open_tokens("out").split("train")
    last = len(split.index.lengths) - 1
    with (tmp_path / "out" / "train.bin").open("r+b") as file:
        file.seek(int(split.index.pointers[last]))
        file.write(b"\xff\xff")
    line = poise("inspect", "out", *view.format(last).split()).line
    assert "the contents of train.bin have changed" in line if "=" in view else "train.bin has id 65,535, the" in line
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("at", ["lengths", "pointers"])
def test_an_index_that_does_not_fit(poise: Poise, prepared: tuple[Path, list[object]], tmp_path: Path, at: str) -> None:
    shutil.copytree(prepared[0], tmp_path / "out")
    count = len(open_tokens("out").split("train").index.lengths)
    with (tmp_path / "out" / "train.idx").open("r+b") as file:
        file.seek(34 + (4 * count if at == "pointers" else 0))
        file.write(b"\xff\xff\xff\xff")
    assert "train.idx does not fit train.bin" in poise("inspect", "out", "--document", "0").line
