"""One JSON document: columns as arrays, records in a list, TensorBoard's lists of three numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.core.errors import UserError
from poise.postmortem import Log, read_log
from poise.postmortem.readers import json_file
from poise.postmortem.readers.source import Source

STEPS = list(range(10, 210, 10))
LOSSES = [round(6.0 - i / 8, 3) for i in range(20)]


def read(tmp_path: Path, document: Any, name: str = "run.json") -> Log:
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_log(path)


def losses(log: Log, name: str = "loss") -> dict[int, float]:
    return dict(zip(*(x.tolist() for x in log.series[name]), strict=True))


@pytest.mark.parametrize(
    "document",
    [
        {"step": STEPS, "loss": LOSSES, "lr": [0.1] * 20, "host": "a"},
        {
            "config": {"lr": 0.1, "betas": [0.9, 0.95]},
            "metrics": [{"step": s, "loss": x} for s, x in zip(STEPS, LOSSES, strict=True)],
        },
        {"run": {"history": {"iter": STEPS, "train_loss": LOSSES}}},
        [{"it": s, "train": {"loss": x}} for s, x in zip(STEPS, LOSSES, strict=True)],
        [[1.7e9 + s, s, x] for s, x in zip(STEPS, LOSSES, strict=True)],
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_documents(tmp_path: Path, document: Any, indent: int | None) -> None:
    log = read(tmp_path, json.dumps(document, indent=indent))
    assert log.format == "json" and losses(log) == dict(zip(STEPS, LOSSES, strict=True))


def test_arrays_without_steps_are_counted_and_those_of_another_length_left_out(tmp_path: Path) -> None:
    log = read(tmp_path, {"train_losses": LOSSES, "val_losses": LOSSES[:3]})
    assert losses(log) == dict(enumerate(LOSSES, 1)) and log.step_unit == "rows" and "val_loss" not in log.series
    assert any("'val_losses' has 3 values and not 20" in note for note in log.notes)


def test_folders_have_their_own_steps(tmp_path: Path) -> None:
    log = read(tmp_path, {"train": {"step": STEPS, "loss": LOSSES}, "val": {"step": [100, 200], "loss": [4.0, 3.0]}})
    assert losses(log) == dict(zip(STEPS, LOSSES, strict=True)) and losses(log, "val_loss") == {100: 4.0, 200: 3.0}


def test_nan_in_a_document(tmp_path: Path) -> None:
    log = read(tmp_path, '{"step": [1, 2, 3, 4], "loss": [2.5, nan, null, inf]}')
    steps, values = log.series["loss"]
    assert steps.tolist() == [1, 2, 4] and np.isnan(values[1]) and values[2] == math.inf


def test_a_scalars_export_is_called_by_its_file(tmp_path: Path) -> None:
    points = [[1.7e9 + s, s, x] for s, x in zip(STEPS, LOSSES, strict=True)]
    assert set(read(tmp_path, points, "run-a-tag-train_grad_norm.json").series) == {"grad_norm"}
    with pytest.raises(UserError, match="no loss in"):
        read(tmp_path, points, "run-a-tag-reward.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.4}\n',
        '{"train": {"loss": 2.5}, "step": 1}\n{"train": {"loss": 2.4}, "step": 2}\n',
        '{"name": "x", "betas": "y"}',
        "[" * 5000,
        '{"a": [1, 2',
        '{"labels": ["a", "b", "c"]}',
    ],
)
def test_other_documents_are_not_its(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    assert json_file.sniff(Source(tmp_path / "x")) == 0.0


def test_a_long_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="write it as JSON lines"):
        read(tmp_path, {"step": STEPS, "loss": LOSSES})
