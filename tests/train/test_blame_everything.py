"""From a step to its documents where nothing is plain: ramps, mixtures, packing, drops, tries, damaged journals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.conftest import Seen

from poise.cli.main import main
from poise.core.errors import UserError
from poise.core.types import IGNORE
from poise.data.feed.skips import samples_of
from poise.train.blame import Tracer


@pytest.fixture(scope="module")
def folder(stormy: Seen) -> Path:
    return stormy.run.store.folder.parent


@pytest.fixture(scope="module")
def tracer(folder: Path) -> Tracer:
    return Tracer(folder)


def test_rows_are_the_batches_that_were_trained_on(stormy: Seen, tracer: Tracer) -> None:
    """Tokens, what counted, source, loss and length, of every step and of tries that were undone."""
    records = [r for r in stormy.records() if r["type"] == "step"]
    times: dict[int, int] = {}
    assert [r["step"] for r in records] == [step for step, _ in stormy.tries]
    for record, (step, some) in zip(records, stormy.tries, strict=True):
        times[step] = times.get(step, 0) + 1
        blame = tracer.blame(step, times[step])
        assert blame.seq_len == some[0].inputs.shape[1]
        assert [row.sample for row in blame.rows] == list(samples_of(record, 4))
        inputs = torch.cat([batch.inputs.reshape(-1, 32) for batch in some])
        targets = torch.cat([batch.targets.reshape(-1, 32) for batch in some])
        sources = tracer._loader.source_of([row.sample for row in blame.rows])
        for row, ids, wanted, loss, source in zip(
            blame.rows, inputs, targets, record["row_losses"], sources, strict=True
        ):
            assert tracer._loader.row(row.sample)[:-1].tolist() == ids.tolist()
            counts = wanted != IGNORE
            assert row.counted == pytest.approx(float(counts.float().mean()))
            assert row.loss == pytest.approx(loss) if np.isfinite(loss) else row.loss is None
            assert row.source == ("web", "books")[source]
            for repeat in row.repeats:
                first, last = repeat.span
                assert not (repeat.masked and counts[first + repeat.period : last - 1].any()), repeat


def test_tries_are_told_and_undone_ones_marked(tracer: Tracer, stormy: Seen) -> None:
    eight = [tracer.blame(8, attempt) for attempt in (1, 2)]
    assert [(one.tries, one.undone) for one in eight] == [(2, True), (2, False)]
    assert eight[0].rows[0].sample in eight[1].earlier
    assert [tracer.blame(25, attempt).undone for attempt in (1, 2)] == [True, False]
    with pytest.raises(UserError, match="step 3 has no try 2; it was done once"):
        tracer.blame(3, 2)


def test_a_window_has_the_steps_that_led_to_the_try(stormy: Seen, tracer: Tracer) -> None:
    """Before the rollback other samples were shown than in the same steps afterwards."""
    records = [r for r in stormy.records() if r["type"] == "step"]
    back = next(i for i, r in enumerate(records) if i and r["step"] < records[i - 1]["step"])
    for attempt, upto in ((1, records[:back]), (2, records)):
        latest = {r["step"]: r for r in upto}
        loader = tracer._loader
        expected: dict[int, int] = {}
        for step in range(22, 26):
            for sample in samples_of(latest[step], 4):
                for one in loader.documents(sample):
                    inputs = min(one["span"][1], 32) - one["span"][0]
                    expected[one["document"]] = expected.get(one["document"], 0) + inputs
        found = {one.document: one.tokens for one in tracer.around(25, 4, attempt)}
        assert found == expected, attempt


def with_journal(folder: Path, to: Path, edit: Any) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoints"))
    text = (to / "journal.jsonl").read_text()
    (to / "journal.jsonl").write_text(edit(text))
    return to


def test_steps_that_a_rollback_has_undone_can_still_be_asked_for(folder: Path, tmp_path: Path) -> None:
    """The run went back from 27 to 20 and was looked at when it was at 22 again."""

    def cut(text: str) -> str:
        lines = text.splitlines(keepends=True)
        back = next(i for i, line in enumerate(lines) if '"type":"rollback"' in line)
        again = next(i for i, line in enumerate(lines) if i > back and '"step":22,' in line)
        return "".join(lines[: again + 1])

    tracer = Tracer(with_journal(folder, tmp_path / "run", cut))
    assert tracer.blame(26).undone and not tracer.blame(22).undone and not tracer.blame(20).undone
    assert tracer.around(26, 3)


def test_torn_lines_and_spaces_in_the_journal_do_no_harm(folder: Path, stormy: Seen, tmp_path: Path) -> None:
    def tear(text: str) -> str:
        lines = text.splitlines()
        torn = next(i for i, line in enumerate(lines) if line.startswith('{"type":"step"') and '"step":40,' in line)
        spaced = [json.dumps(json.loads(line)) for line in lines[:torn]]
        half = lines[torn][: len(lines[torn]) // 2]
        inner = lines[torn][: lines[torn].index('"source_losses":{')] + '"source_losses":{"web":1.0}'  # ends in a brace
        return "\n".join([*spaced[:9], half, inner, "\x00\x00", *spaced[9:], half])

    tracer = Tracer(with_journal(folder, tmp_path / "run", tear))
    assert list(tracer.steps)[-1] in (39, 40)
    plain = Tracer(folder)
    assert tracer.blame(39) == plain.blame(39) and tracer.blame(8, 1) == plain.blame(8, 1)
    assert tracer.around(39, 30)
    with pytest.raises(UserError, match="step 40 is not among"):
        tracer.blame(40)


def test_what_is_odd_is_said(tracer: Tracer, stormy: Seen, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """The text that repeats itself, and the one that was there three times."""
    origins = [row["origin"] for row in tracer._tokens.split("train").table.select(["origin"]).to_pylist()]
    found: dict[str, tuple[int, Any]] = {}
    for step in tracer.steps:
        for row in tracer.blame(step).rows:
            for one in row.documents:
                found.setdefault(one.origin, (step, row))
    noise = next(name for name in found if "noise" in name)
    step, row = found[noise]
    (document,) = [one for one in row.documents if one.origin == noise]
    assert origins[document.document] == noise
    assert any("repeats itself" in line for line in document.odd)
    assert document.facts["scores"]["compression"] > 3
    assert row.repeats and "spam and eggs" in row.repeats[0].text * 2
    assert main(["blame", str(folder), "--step", str(step), "--row", str(row.row)]) == 0
    out = capsys.readouterr().out
    assert "odd: " in out and "[[x" in out and "compression " in out
    copied = [name for name in found if "copy-" in name]
    if copied:  # it may be held out
        (clone,) = [one for one in found[copied[0]][1].documents if one.origin == copied[0]]
        assert clone.facts["cluster_size"] == 3 and any("2 near or equal copies" in line for line in clone.odd)


def test_what_is_masked_at_a_short_length_is_odd(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is that of the step's length, not that of the full one."""
    monkeypatch.setattr("poise.train.blame.periodic.threshold", lambda length: 40 * length // 8)
    noise = next(
        (step, row.sample)
        for step in tracer.steps
        for row in tracer.blame(step).rows
        if any("noise" in one.origin for one in row.documents) and row.repeats
    )
    for length, odd in ((8, True), (32, False)):
        monkeypatch.setattr(Tracer, "_length", lambda self, record, samples, length=length: length)
        (row,) = [one for one in tracer.blame(noise[0]).rows if one.sample == noise[1]]
        seen = [one for one in tracer.around(noise[0], 1) if "noise" in one.origin]
        said = [one.odd for one in row.documents if "noise" in one.origin] + [one.odd for one in seen]
        assert len(said) > 1
        assert all(any("repeats itself" in line for line in lines) == odd for lines in said), length
        assert any(repeat.masked for repeat in row.repeats) == odd


def test_the_command_shows_tries_lengths_and_losses(
    folder: Path, capsys: pytest.CaptureFixture[str], stormy: Seen
) -> None:
    assert main(["blame", str(folder), "--step", "8", "--try", "1", "--window", "2"]) == 0
    out = capsys.readouterr().out
    assert "done 2 times, this is try 1" in out and "this try does not count" in out
    assert "each sample was cut into sequences of 8" in out and "highest loss: row " in out
    assert main(["blame", str(folder), "--step", "25", "--try", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["undone"], record["attempt"], record["tries"]) == (True, 1, 2)
    assert main(["blame", str(folder), "--step", "8", "--try", "5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_after_a_restart_only_what_the_checkpoint_knew_is_dropped(folder: Path, stormy: Seen, tmp_path: Path) -> None:
    """A drop that was made after the checkpoint is gone with the steps that were lost."""
    lines = (folder / "journal.jsonl").read_text().splitlines()
    step = next(line for line in lines if '"type":"step"' in line and '"step":30,' in line)
    restart = {"type": "restart", "time": 0.0, "step": 29, "reason": "", "dropped": [1]}
    run = with_journal(folder, tmp_path / "run", lambda text: text + json.dumps(restart) + "\n" + step + "\n")
    tracer = Tracer(run)
    places = [at for at, _ in tracer._log.tries(30)]
    assert tracer._log.dropped(places[0]) == (*range(9), *range(30, 36))
    assert tracer._log.dropped(places[-1]) == (1,)
    assert tracer._log.dropped(0) == ()
