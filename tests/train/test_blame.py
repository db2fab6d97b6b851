"""From a step to its documents."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from poise.cli.main import main
from poise.core.errors import UserError
from poise.core.journal import read
from poise.train.blame import Tracer


def test_a_row_is_what_the_documents_say(straight: Path, text_folder: Path) -> None:
    tracer = Tracer(straight)
    blame = tracer.blame(7)
    record = next(r for r in read(straight / "journal.jsonl") if r["type"] == "step" and r["step"] == 7)
    assert (blame.loss, blame.grad_norm) == (record["loss"], record["grad_norm"])
    assert [row.sample for row in blame.rows] == [record["sample"] + i for i in range(len(blame.rows))]
    for row in blame.rows:
        spans = [one.span for one in row.documents]
        assert spans[0][0] == 0
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        for one in row.documents:
            source = (text_folder / one.origin).read_bytes()[one.offset : one.offset + one.bytes].decode()
            part = tracer._tokenizer.decode(tracer._loader.row(row.sample)[slice(*one.span)].tolist())
            assert part.replace("<|endoftext|>", "")[:40] in source


def test_the_last_try_counts_and_the_earlier_ones_are_told(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    records = read(run / "journal.jsonl")
    seven = next(r for r in records if r["type"] == "step" and r["step"] == 7)
    again = [{"type": "rollback", "time": 0, "step": 40, "to": 6}, {**seven, "sample": seven["sample"] + 100}]
    with (run / "journal.jsonl").open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in again)
    blame = Tracer(run).blame(7)
    assert blame.rows[0].sample == seven["sample"] + 100
    assert blame.earlier == (seven["sample"],)


def test_a_window_adds_up(straight: Path) -> None:
    tracer = Tracer(straight)
    whole = sum(seen.tokens for seen in tracer.around(10, 5))
    rows = [row for step in range(6, 11) for row in tracer.blame(step).rows]
    assert whole == 32 * len(rows) == 32 * 4 * 5, "the inputs"
    last = [one for row in rows for one in row.documents if one.span[1] == 33]
    assert len(last) == len(rows), "rows have one token more, which is only a target"


def test_the_command(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(straight), "--step", "7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 7: loss ")
    assert ".md (document " in out
    assert main(["blame", str(straight), "--step", "7", "--row", "0", "--window", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (row,) = record["rows"]
    assert len(row["text"]) > 30
    assert record["window"][0]["tokens"] >= record["window"][-1]["tokens"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "99"], "step 99 is not among the run's steps 1 to 40"),
        (["--step", "7", "--row", "12"], "--row is 12, but step 7 has rows 0 to "),
        (["--step", "7", "--window", "0"], "--window is 0"),
        ([], "--step"),
    ],
)
def test_mistakes_are_one_line(straight: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(straight), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("poise blame: ")
    assert said in error
    assert error.count("\n") == 1


def test_data_that_has_been_moved_is_given(
    straight: Path, odd_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(straight, run, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = (run / "recipe.toml").read_text()
    kept = Path(next(line for line in recipe.splitlines() if line.startswith("dir =")).partition('"')[2].strip('"'))
    (run / "recipe.toml").write_text(recipe.replace(f'"{kept}"', f'"{gone}"'))
    words = ["blame", str(run), "--step", "7"]
    for given, said in (
        ([], "give --data DIR if it has been moved"),
        (["--data", str(gone)], "holds no prepared data"),
        (["--data", str(odd_tokens)], "its documents are others"),
    ):
        assert main([*words, *given]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main([*words, "--data", str(kept)]) == 0
    capsys.readouterr()
    assert Tracer(run, kept).blame(7) == Tracer(straight).blame(7)


def test_data_that_has_gone_or_changed_is_refused(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        Tracer(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    text = (run / "journal.jsonl").read_text()
    fingerprint = next(r["data"]["fingerprint"] for r in read(run / "journal.jsonl") if r["type"] == "run")
    (run / "journal.jsonl").write_text(text.replace(fingerprint, "0" * 32))
    with pytest.raises(UserError, match="its documents are others"):
        Tracer(run)
    recipe = (run / "recipe.toml").read_text()
    kept = next(line for line in recipe.splitlines() if line.startswith("dir ="))
    (run / "recipe.toml").write_text(recipe.replace(kept, f'dir = "{tmp_path / "gone"}"'))
    with pytest.raises(UserError, match="is gone"):
        Tracer(run)
