"""Every user's mistake: one clear line with the mend, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from poise.cli.main import main

SMALL = [
    word
    for key, value in {
        "train.steps": "3",
        "train.batch_size": "2",
        "train.seq_len": "32",
        "train.compile": "off",
        "train.eval_every": "0",
        "train.dtype": "fp32",
        "optim.schedule.warmup_steps": "1",
        "model.n_layers": "1",
        "model.d_model": "32",
        "model.n_heads": "2",
        "data.vocab_size": "512",
    }.items()
    for word in (f"--{key}", value)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def fails(words: list[str], capsys: pytest.CaptureFixture[str], *says: str) -> str:
    """Run, and check that it failed as a user's mistake should."""
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if "%" not in line]
    assert lines[-1].startswith("poise"), lines
    assert sum(line.startswith("poise") for line in lines) == 1
    for text in says:
        assert text in lines[-1], lines[-1]
    return lines[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], ["unknown command 'trian'", "did you mean 'train'"]),
        (["train", "smal"], ["no recipe file 'smal'", "did you mean 'small'"]),
        (["train", "--optim.lrr", "1"], ["unknown key 'optim.lrr'", "did you mean 'optim.lr'"]),
        (["train", "--optmi.lr", "1"], ["unknown key 'optmi", "did you mean"]),
        (["train", "--lr", "1"], ["unknown argument '--lr'"]),
        (["train", "--optim", "1"], ["unknown argument '--optim'"]),
        (["train", "--optim.lr"], ["option '--optim.lr' needs a value"]),
        (["train", "--optim.lr", "0"], ["lr", "0"]),
        (["train", "--optim.lr", "-1e-3"], ["lr", "-0.001"]),
        (["train", "--optim.lr", "nan"], ["lr", "nan"]),
        (["train", "--optim.lr", "fast"], ["'optim.lr' is 'fast'"]),
        (["train", "--train.steps", "0"], ["train.steps is 0"]),
        (["train", "--train.steps", "20"], ["warmup_steps is 40", "20 steps"]),
        (["train", "--train.steps", "2.5"], ["'train.steps' is 2.5"]),
        (["train", "--train.micro_batch", "3"], ["does not divide"]),
        (["train", "--model.n_heads", "3"], ["3", "256"]),
        (["train", "--model.methods", '["qk_nrm"]'], ["no model method 'qk_nrm'", "did you mean 'qk_norm'"]),
        (["train", "--model.methods", '["embed_norm", "embed_scale"]'], ["embed_norm", "embed_scale"]),
        (["train", "--name", "a/b"], ["name is 'a/b'"]),
        (["train", "--data.vocab_size", "10"], ["data.vocab_size is 10"]),
        (["train", "--data", "no/such/folder"], ["no/such/folder"]),
        (["resume", "nowhere"], ["'nowhere' is not a run"]),
        (["resume"], ["required"]),
        (["methods", "show", "qk_nrom"], ["no method 'qk_nrom'", "did you mean 'qk_norm'"]),
        (["data", "inspect", "nowhere"], ["nowhere"]),
        (["data", "explode"], ["unknown action"]),
        (["train", "--model.methods", '["mup"]', "--optim.name", "muon", "--dry-run"], ["'muon'", "mup"]),
        (["train", "--model.methods", '["attention_sink:learned=True"]'], ["'learned'", "give true or false"]),
        (["train", "--train.compile", "maybe"], ["'train.compile' is 'maybe'"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes(words: list[str], says: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(words, capsys, *says)
    assert not list(tmp_path.glob("runs/*")), "a mistake must not leave a run folder behind"


def test_unknown_key_in_a_file_names_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optim]\nlearning_rate = 1\n")
    fails(["train", "mine.toml"], capsys, "unknown key 'optim.learning_rate'", "mine.toml")
    (tmp_path / "mine.toml").write_text("[optim\n")
    fails(["train", "mine.toml"], capsys, "not valid TOML")


def test_empty_corpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(["train", "--data", "empty", *SMALL], capsys, "empty")
    (tmp_path / "empty" / "a.md").write_text("")
    fails(["train", "--data", "empty", *SMALL], capsys)


def test_one_tiny_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("Hello, world.")
    fails(["train", "--data", "one.md", *SMALL], capsys)


def test_only_binary_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "a.bin").write_bytes(os.urandom(4000))
    fails(["train", "--data", "bin", *SMALL], capsys)


def test_vocabulary_larger_than_the_data_supports(capsys: pytest.CaptureFixture[str], text_folder: Path) -> None:
    fails(["train", "--data", str(text_folder), *SMALL, "--data.vocab_size", "60000"], capsys, "60000")


def test_sequence_longer_than_the_corpus(capsys: pytest.CaptureFixture[str], tokens_dir: Path) -> None:
    words = ["train", "--data", str(tokens_dir), *SMALL, "--train.seq_len", "9000000"]
    fails(words, capsys, "9,000,000", "at most")


def test_run_folder_that_exists(capsys: pytest.CaptureFixture[str], tokens_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    line = fails(["train", "--data", str(tokens_dir), "--out", "mine", *SMALL], capsys, "'mine' exists")
    assert "--out" in line
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_run_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tokens_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(
        ["train", "--data", str(tokens_dir), "--out", "file/run", *SMALL],
        capsys,
        "cannot make the run folder",
    )


def test_a_good_run_and_its_summary(capsys: pytest.CaptureFixture[str], tokens_dir: Path, tmp_path: Path) -> None:
    assert main(["train", "--data", str(tokens_dir), "--out", "good", *SMALL]) == 0
    out = capsys.readouterr()
    assert "report.html" in out.out and "poise resume good" in out.out
    assert "\x1b" not in out.err
    assert sorted(p.name for p in (tmp_path / "good").iterdir()) == [
        "checkpoints", "journal.jsonl", "recipe.toml", "report.html",
    ]  # fmt: skip
    assert main(["resume", "good"]) == 0
    assert "has finished" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "resume", "demo", "methods", "data"])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([command, "--help"])
    except SystemExit as end:
        code = int(end.code or 0)
    out = capsys.readouterr().out
    assert code == 0 and "example" in out and "poise" in out


@pytest.mark.parametrize("recipe", ["nano", "small", "100m", "1b"])
def test_dry_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "memory" in out and "tokens" in out
    bound = out.split("gradient bound at the start\n")[1].splitlines()
    assert 1 <= len(bound) <= 3 and all(line.startswith("  ") for line in bound)


def test_a_dry_run_warns_of_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nano", "--dry-run", "--model.methods", '["gated_attention"]']) == 0
    bound = capsys.readouterr().out.split("gradient bound at the start\n")[1].splitlines()
    assert bound[0].startswith("  mlp of layer 1: ") and bound[1].startswith("  attention of 4 layers is not judged")


def test_one_method_shown_as_json_says_what_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "show", "mlra", "--json"]) == 0
    (card,) = json.loads(capsys.readouterr().out)
    assert main(["methods", "show", "mlra"]) == 0
    text = capsys.readouterr().out
    assert card["settings"] == {"rank": None} and "rank (default: by the method's rule)" in text
    assert "(SDPA)" in card["attention_path"] and card["attention_path"] in text
    assert card["changes_the_meaning_of_the_learning_rate"] in text
    assert card["not_with"] and all(f"not with {other}: {why}" in text for other, why in card["not_with"].items())
    assert main(["methods", "show", "attention_sink"]) == 0
    assert "settings: init=0.0, learned=true\n" in capsys.readouterr().out


def test_train_help_lists_recipe_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--optim.lr" in capsys.readouterr().out
