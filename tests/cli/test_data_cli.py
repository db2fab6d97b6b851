"""``poise data`` as a user meets it: help, views, JSON, advice for a wrong word, and through other formats and back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from poise.cli.data import show
from poise.cli.main import main
from poise.data.clean.presets import PRESETS

PREPARE = ["data", "prepare"]


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen texts, of which three are equal."""
    folder = tmp_path_factory.mktemp("cli") / "notes"
    folder.mkdir()
    known = ("loss", "gradient", "step", "weight", "norm", "layer", "token", "batch", "spike", "rate", "decay")
    for number in range(24):
        text = " ".join(known[(number * 7 + i * i) % len(known)] for i in range(60 + number))
        (folder / f"{number:02}.txt").write_text(f"{number % 22} {text}\n")
    for number in (22, 23):
        (folder / f"{number:02}.txt").write_text((folder / "03.txt").read_text())
    return folder


@pytest.fixture(scope="module")
def tokens(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """They, prepared without the duplicates."""
    out = tmp_path_factory.mktemp("cli-out") / "tokens"
    assert main([*PREPARE, str(notes), "--out", str(out), "--vocab-size", "270", "--dedup", "exact"]) == 0
    return out


class Shell:
    """Runs commands and shows what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> str:
        self._capsys.readouterr()
        assert main(["data", *map(str, words)]) == 0
        return self._capsys.readouterr().out

    def json(self, *words: object) -> Any:
        return json.loads(self(*words, "--json"))

    def fails(self, *words: object) -> str:
        self._capsys.readouterr()
        assert main(["data", *map(str, words)]) == 2
        (line,) = [line for line in self._capsys.readouterr().err.splitlines() if line.startswith("poise")]
        return line


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.mark.parametrize("action", ["", "prepare", "inspect", "export", "import", "verify"])
def test_help_has_an_example(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["data", *filter(None, [action]), "--help"])
    except SystemExit as end:
        code = int(end.code or 0)
    out = capsys.readouterr().out
    assert code == 0 and f"example:\n  poise data {action}" in out
    assert all(len(line) <= 120 for line in out.partition("\n\n")[2].splitlines())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("prepar notes", "did you mean 'prepare'"),
        ("prepare notes --vocab-siz 300", "did you mean '--vocab-size'"),
        ("prepare notes --dedup nera", "did you mean 'near'"),
        ("prepare notes --dedup-keep logs", "did you mean 'log'"),
        ("prepare notes --filters gophr", "did you mean 'gopher'"),
        ("prepare notes --filters", "expected at least one argument"),
        ("prepare notes --vocab-size many", "'many'"),
        ("prepare notes --vocab-size 256", "at least 257"),
        ("prepare notes --val-fraction nan", "val_fraction is nan"),
        ("prepare notes --similarity 0", "similarity is 0"),
        ("prepare notes --processes -1", "'-1' is no whole number from 0"),
        ("prepare notes --languages english", "knows no 'english'"),
        ("prepare notes --fim-rate 0.5 --bpe-dropout 0.5", "choose one"),
        ("prepare", "no source"),
        ("inspect tokens --smple 3", "did you mean '--sample'"),
        ("inspect tokens --sample 0", "'0' is no whole number from 1"),
        ("inspect tokens --sample 1 --seed -1", "'-1' is no whole number from 0"),
        ("inspect tokens --sort bytes --count 0", "'0' is no whole number from 1"),
        ("inspect tokens --packing 100000000000000000000", "no whole number from 1"),
        ("inspect tokens --sort byte", "did you mean 'bytes'"),
        ("inspect tokens --histogram scores.compresion", "did you mean 'scores.compression'"),
        ("inspect tokens --histogram language", "is empty"),
        ("inspect tokens --document 999", "there is no document 999"),
        ("inspect tokens --document test:1", "is no document"),
        ("inspect tokens --search /(/", "no regular expression"),
        ("inspect tokens --drop bytes<100", "--drop and --out belong together"),
        ("inspect tokens --drop bites<100 --out less", "did you mean 'bytes'"),
        ("inspect tokens --drop bytes<0 --out less", "matches no document"),
        ("inspect tokens --drop bytes>0 --out less", "nothing would be left"),
        ("inspect tokens --drop bytes<200 --out tokens", "is or touches the folder"),
        ("inspect tokens --sample 1 --repeats", "not allowed with"),
        ("inspect nowhere", "no prepared data"),
        ("verify nowhere", "no prepared data"),
        ("export tokens --to megatrn --out x", "did you mean 'megatron'"),
        ("export tokens --to olmo", "required: --out"),
        ("export nowhere --to olmo --out x", "no prepared data"),
        ("import notes --from olm --out x", "did you mean 'olmo'"),
        ("import notes --from megatron --out x", "no Megatron data"),
    ],
)
def test_mistakes(shell: Shell, notes: Path, tokens: Path, tmp_path: Path, words: str, says: str) -> None:
    (tmp_path / "notes").symlink_to(notes)
    (tmp_path / "tokens").symlink_to(tokens)
    line = shell.fails(*words.split())
    assert says in line and "--data." not in line
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"notes", "tokens"}


def test_filters_are_listed(shell: Shell) -> None:
    out = shell("prepare", "--filters", "list")
    heads = [line for line in out.splitlines() if not line.startswith(" ")]
    assert heads == list(PRESETS)
    assert out.count("\n") == len(PRESETS) + sum(map(len, PRESETS.values()))


def test_a_dry_run_shows_and_the_next_call_goes_on(shell: Shell, notes: Path, tmp_path: Path) -> None:
    words = ["prepare", notes, "--out", "out", "--vocab-size", "270", "--dedup", "exact"]
    out = shell(*words, "--dry-run")
    assert out.splitlines()[0].startswith("left out: 2 of 24 documents (8.3%)")
    assert out.splitlines()[1].split()[:2] == ["duplicate.exact", "2"]
    assert shell.json(*words, "--dry-run")["dropped"]["duplicate.exact"]["documents"] == 2
    assert not (tmp_path / "out").exists()
    blocks = tmp_path / ".out.work" / "clean" / "000000.arrow"
    before = blocks.stat().st_mtime_ns
    assert shell.json(*words, "--dry-run") and blocks.stat().st_mtime_ns == before
    assert shell.json(*words)["dropped"] == {"duplicate.exact": {"documents": 2, "bytes": 2 * len(_third(notes))}}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _third(notes: Path) -> str:
    return (notes / "03.txt").read_text()


def test_views_agree_with_each_other(shell: Shell, notes: Path, tokens: Path) -> None:
    facts = shell.json("inspect", tokens)
    assert facts["documents"] == 22
    everything = shell.json("inspect", tokens, "--sample", "99")
    assert sorted(one["text"] for one in everything) == sorted(p.read_text() for p in sorted(notes.iterdir())[:22])
    few = shell.json("inspect", tokens, "--sample", "3", "--seed", "5")
    assert few == shell.json("inspect", tokens, "--sample", "3", "--seed", "5") and len(few) == 3
    largest = shell.json("inspect", tokens, "--sort", "bytes", "--count", "2")
    smallest = shell.json("inspect", tokens, "--sort", "-bytes", "--count", "2")
    sizes = sorted(one["bytes"] for one in everything)
    assert [one["bytes"] for one in largest] == sizes[:-3:-1] and [one["bytes"] for one in smallest] == sizes[:2]
    one = largest[0]
    (same,) = shell.json("inspect", tokens, "--document", f"{one['split']}:{one['document']}")
    assert same == one
    histogram = shell.json("inspect", tokens, "--histogram", "bytes")
    assert sum(histogram["counts"]) == 22 and histogram["edges"][-1] == sizes[-1]
    hits = [json.loads(line) for line in shell("inspect", tokens, "--search", "/SPIKE/i", "--json").splitlines()]
    assert len(hits) == sum("spike" in one["text"] for one in everything) > 0
    (cluster,) = [one for one in everything if one["facts"]["cluster_size"] > 1]
    assert cluster["text"] == _third(notes) and cluster["facts"]["cluster_size"] == 3
    assert shell.json("inspect", tokens, "--repeats")["spans"] >= 0
    assert shell.json("inspect", tokens, "--vocabulary")["tokens"] <= facts["tokens"]
    assert list(shell.json("inspect", tokens, "--diversity"))
    assert shell.json("inspect", tokens, "--packing", "64")["best_fit"]["truncated"] == 0


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--sample 2",
        "--search loss",
        "--histogram bytes",
        "--histogram origin",
        "--sort bytes --count 3",
        "--document 0",
        "--document val:0",
        "--repeats",
        "--vocabulary",
        "--diversity",
        "--packing 32",
    ],
)
def test_views_for_people(shell: Shell, tokens: Path, words: str) -> None:
    out = shell("inspect", tokens, *words.split())
    assert out.strip() and "{" not in out and "Traceback" not in out


def test_dropping_writes_another_folder(shell: Shell, tokens: Path) -> None:
    before = {path.name: path.read_bytes() for path in tokens.iterdir() if path.is_file()}
    most = sorted(one["bytes"] for one in shell.json("inspect", tokens, "--sample", "99"))[-4]
    facts = shell.json("inspect", tokens, "--drop", "origin~/0[0-4]/", f"bytes>{most}", "--out", "less")
    kept = shell.json("inspect", "less", "--sample", "99")
    assert sum(split["documents"] for split in facts["splits"].values()) == len(kept) < 22
    assert all(one["bytes"] <= most and not one["origin"].startswith(("00", "01", "02", "03", "04")) for one in kept)
    assert "all as they were written" in shell("verify", "less")
    assert {path.name: path.read_bytes() for path in tokens.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("kind", ["megatron", "datatrove", "olmo", "hf"])
def test_there_and_back(shell: Shell, tokens: Path, kind: str) -> None:
    if kind == "hf":
        pytest.importorskip("datasets")
    exported = shell.json("export", tokens, "--to", kind, "--out", "theirs")
    assert exported["files"] >= 1
    assert "there already" in shell.fails("export", tokens, "--to", kind, "--out", "theirs")
    words = ["import", "theirs", "--from", kind, "--out", "ours", "--tokenizer", tokens / "tokenizer.json"]
    facts = shell.json(*words)
    assert (facts["documents"], facts["tokens"]) == tuple(
        shell.json("inspect", tokens)[k] for k in ("documents", "tokens")
    )
    texts = [
        sorted(one["text"] for one in shell.json("inspect", place, "--sample", "99")) for place in (tokens, "ours")
    ]
    assert texts[0] == texts[1]
    assert "all as they were written" in shell("verify", "ours")
    few = ["--vocab-size", "20", "--end-of-text", "0"]
    assert "ids; give its own tokenizer" in shell.fails("import", "theirs", "--from", kind, "--out", "few", *few)


def test_changed_data_is_not_trained_on(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(tokens, tmp_path / "copy")
    os.truncate(copy / "train.bin", 64)
    assert main(["train", "--data", str(copy), "--out", "run", "--train.steps", "50"]) == 2
    assert "train.bin has 64 bytes instead of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_show_every_letter(shell: Shell, tmp_path: Path) -> None:
    odd = os.fsdecode(b"n\xff\n\x1b[31m")
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{odd}{number}.txt").write_text(f"{number} naïve 日本語 " * 9)
    shell("prepare", "in", "--out", "out", "--vocab-size", "257")
    out = shell("inspect", "out", "--sample", "3") + shell("inspect", "out", "--histogram", "origin")
    assert "\x1b" not in out and "\\n\\x1b[31m0.txt" in out


def test_records_are_shown_as_tables(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.txt").write_text(f"{number} begins" + " ab\n" * 60 + "{the} end " * 40)
    shell("prepare", "in", "--out", "out", "--vocab-size", "270")
    for view, name in (("--vocabulary", "top"), ("--repeats", "ngrams")):
        facts, lines = shell.json("inspect", "out", view), shell("inspect", "out", view).splitlines()
        head = lines.index(name.replace("_", " ")) + 1
        assert lines[head - 2] == "" and len(facts[name]) > 0
        assert len(lines[head:]) == 1 + len(facts[name])
        assert lines[head].split() == [word for key in facts[name][0] for word in key.split("_")]
        for line, record in zip(lines[head + 1 :], facts[name], strict=True):
            assert repr(record["text"])[:40] in line and len(line) < 160
            count = record["count" if view == "--vocabulary" else "tokens"]
            assert f" {count:,}" in line
        right = {len(line) for line in lines[head:]}
        assert len(right) == 1  # the last column holds numbers, which end together


def test_show_of_odd_records(capsys: pytest.CaptureFixture[str]) -> None:
    show({"n": 1, "rows": [{"a": None, "b": True, "c": 1234}, {"a": 0.25, "d": "x\ny"}], "none": []}, as_json=False)
    out = capsys.readouterr().out
    assert out.splitlines()[:2] == ["n     1", "none"]
    assert out.splitlines()[2:] == [
        "",
        "rows",
        "  a     b    c      d",
        "  -     yes  1,234  -",
        "  0.25  -    -      'x\\ny'",
    ]
