"""``poise check`` as a command: what it reads, what it prints, exit codes, and that it starts without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from poise.cli.main import main
from poise.preflight.check import RULES
from poise.preflight.presets import PRESETS

LOGS = Path(__file__).resolve().parents[3] / "shared" / "logs"

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
ARGUMENTS = {"learning_rate": 0.003, "max_steps": 1000, "warmup_steps": 2000, "bf16": True, "max_grad_norm": 1.0}
MEGATRON = """#!/bin/bash
torchrun pretrain_gpt.py --num-layers 24 --hidden-size 2048 --num-attention-heads 16 \\
  --seq-length 2048 --max-position-embeddings 1024 --global-batch-size 256 --train-iters 10000 \\
  --lr 2e-4 --lr-warmup-iters 2000 --adam-beta2 0.95 --clip-grad 1.0 --bf16
"""
PRESET = """
seed = 1
[model]
n_layers = 2
d_model = 64
n_heads = 2
methods = ["qk_norm"]
[train]
steps = 200
"""


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["check", *words])
    out, err = capsys.readouterr()
    return code, out, err


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "training_args.json").write_text(json.dumps(ARGUMENTS))
    return tmp_path


def test_a_checkpoint_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(folder))
    assert code == 0 and err == ""
    assert "Hugging Face configuration" in out and "width 2048 x 16 layers" in out and "lr 0.003" in out
    assert "1,000 steps" in out
    assert "(warmup-total)" in out and "do:" in out and "passed" in out and "not judged" in out
    first = out.index("critical  ")
    assert "warning  " not in out[:first]


def test_two_files_are_one_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = record(capsys, str(folder / "config.json"), str(folder / "training_args.json"))
    alone = record(capsys, str(folder / "config.json"))
    assert both["settings"]["lr"] == 0.003 and "lr" not in alone["settings"]
    assert "warmup-total" in {one["rule"] for one in both["findings"]}
    assert len(alone["not_judged"]) > len(both["not_judged"])


def test_json_has_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, str(folder))
    judged = {one["rule"] for one in found["findings"]} | set(found["passed"])
    judged |= {one["rule"] for one in found["not_judged"]}
    assert judged == {one.id for one in RULES}
    assert found["worst"] == "critical" and sum(found["counts"].values()) == len(found["findings"])
    assert found["said"]["lr"].startswith('"learning_rate"')
    assert {"what", "why", "mend", "source", "severity", "fields"} <= found["findings"][0].keys()
    assert "measured" not in found


@pytest.mark.parametrize(("level", "code"), [("critical", 1), ("warning", 1), ("note", 1)])
def test_fail_on_a_critical_finding(level: str, code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, str(folder), "--fail-on", level)[0] == code


def test_fail_on_is_met_only_by_what_is_as_grave(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "bloom-176b", "--fail-on", "critical")[0] == 0
    assert run(capsys, "bigscience-104b", "--fail-on", "critical")[0] == 1
    assert run(capsys, "1b", "--fail-on", "critical")[0] == 0


@pytest.mark.parametrize("name", ["nano", "small", "100m", "1b", "demo"])
def test_recipes_that_come_with_poise_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, name)
    assert found["format"] == "recipe" and found["counts"]["critical"] == found["counts"]["warning"] == 0


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_published_run_is_judged(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, name)
    assert code == 0 and name in out and "published configuration" in out
    if PRESETS[name].outcome == "stable":
        assert "critical" not in out.partition("passed")[0].splitlines()[1]


def test_a_megatron_script_and_a_recipe_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.sh").write_text(MEGATRON)
    (tmp_path / "mine.toml").write_text(PRESET)
    script = record(capsys, str(tmp_path / "run.sh"))
    assert script["format"] == "megatron" and script["settings"]["d_model"] == 2048
    positions = [one for one in script["findings"] if "max_positions" in one["fields"]]
    assert positions and positions[0]["severity"] != "note"
    assert record(capsys, str(tmp_path / "mine.toml"))["settings"]["total_steps"] == 200


@pytest.mark.skipif(not LOGS.is_dir(), reason="the real logs are not on this machine")
def test_a_log_that_begins_with_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, str(LOGS / "megatron_stdout__bigscience_gpt2_n16.out"))
    assert found["format"] == "megatron"
    assert "init-std-width" in {one["rule"] for one in found["findings"] if one["severity"] == "critical"}


def test_all_says_more(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, short, _ = run(capsys, str(folder))
    _, long, _ = run(capsys, str(folder), "--all")
    assert len(long) > len(short)
    assert "betas" in long.partition("passed")[2] or "(needs" in long
    assert short.count("why:") < long.count("why:")


def test_control_characters_of_a_configuration_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a\x1b[31m[bold]b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": "\x1b]0;title\x07"}))
    code, out, _ = run(capsys, str(folder), "--all")
    assert code == 0 and "\x1b" not in out and "\x07" not in out
    assert "a?[31m[bold]b" in out.replace("\n", "").replace("  ", "")


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--list")
    assert all(one.id in out for one in RULES) and "measured-logit-forecast" in out
    _, out, _ = run(capsys, "--presets")
    assert all(name in out for name in PRESETS)
    _, out, _ = run(capsys, "--list", "--presets", "--json")
    found = json.loads(out)
    assert {one["name"] for one in found["presets"]} == set(PRESETS)
    assert {"rule", "severity", "title", "source"} == found["rules"][0].keys()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no configuration is named"),
        (["bloom-176"], "did you mean 'bloom-176b'"),
        (["nope"], "poise check --presets"),
        (["missing.json"], "no configuration 'missing.json'"),
        (["bloom-176b", "nano"], "judged alone"),
        (["nano", "--minutes", "3"], "add --model"),
        (["nano", "--model", "--minutes", "nan"], "--minutes is nan"),
        (["nano", "--model", "--minutes", "0"], "--minutes is 0"),
        (["nano", "--fail-on", "bad"], "invalid choice"),
        (["nano", "--jsn"], "--jsn"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_model_is_measured_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(PRESET)
    code, out, err = run(capsys, str(tmp_path / "mine.toml"), "--model", "--minutes", "0.01", "--json")
    found = json.loads(out)
    assert code == 0 and found["measured"]["start"]["layers"] and found["measured"]["not_done"]
    assert "the start of" in err
    code, out, _ = run(capsys, str(tmp_path / "mine.toml"), "--model", "--minutes", "0.01")
    assert code == 0 and "measured in" in out and "gradient: norm" in out and "not done:" in out


def test_files_are_judged_without_torch(folder: Path) -> None:
    (folder / "run.sh").write_text(MEGATRON)
    script = (
        "import sys\nfrom poise.cli.main import main\n"
        f"codes = [main(['check', *words]) for words in (['{folder}'], ['{folder}/run.sh', '--json'], ['bloom-176b'], "
        "['--list'])]\n"
        "assert codes == [0, 0, 0, 0], codes\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
