"""Golden values of Megatron's functional tests, in their three layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from poise.core.errors import UserError
from poise.postmortem.log import Log, read_log
from poise.postmortem.readers import golden_values
from poise.postmortem.readers.source import Source


def frame(values: Any, start: int = 0) -> dict[str, Any]:
    return {"start_step": start, "end_step": 15, "step_interval": 5, "values": values}


def read(tmp_path: Path, content: Any, indent: int | None = None) -> Log:
    path = tmp_path / "golden_values.json"
    path.write_text(json.dumps(content, indent=indent))
    log = read_log(path)
    assert log.format == "golden_values"
    return log


@pytest.mark.parametrize("indent", [None, 4])
def test_the_old_layout(tmp_path: Path, indent: int | None) -> None:
    content = {"lm loss": frame([10.5, 10.25, 10.0]), "num-zeros": frame([3, 2, 1]), "iteration_timing_avg": 0.1}
    log = read(tmp_path, content, indent)
    assert [x.tolist() for x in log.series["loss"]] == [[0, 5, 10], [10.5, 10.25, 10.0]]
    assert log.series["num-zeros"][1].tolist() == [3.0, 2.0, 1.0]


def test_the_new_layout(tmp_path: Path) -> None:
    loss = {"1": 10.5, "5": "nan", "10": 10.0}
    content = {
        "iteration-time": frame({"1": 9.5, "5": 0.25, "10": 0.25}, 1),
        "lm loss": frame(loss, 1),
        "num-zeros": frame({"1": "nan", "5": "nan", "10": 7}, 1),
    }
    log = read(tmp_path, content)
    steps, values = log.series["loss"]
    assert steps.tolist() == [1, 5, 10]
    assert values[[0, 2]].tolist() == [10.5, 10.0] and math.isnan(values[1])
    assert log.series["iteration-time"][1].tolist() == [9.5, 0.25, 0.25]
    assert log.series["num-zeros"][0].tolist() == [10]  # "nan" says that it was not logged


def test_steps_alone(tmp_path: Path) -> None:
    log = read(tmp_path, {"lm loss": {"10": 9.0, "2": 10.0}, "note": "text", "mixed": {"1": 2, "a": 3}})
    assert [x.tolist() for x in log.series["loss"]] == [[2, 10], [10.0, 9.0]]
    assert set(log.series) == {"loss"}


def test_a_file_cut_off_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "golden_values.json"
    path.write_text(json.dumps({"lm loss": frame({"1": 10.5, "5": 9.5})})[:-9])
    with pytest.raises(UserError, match="no whole JSON object"):
        read_log(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.5}\n',
        '{"train_loss": {"mean": 2.5}}',
        '{"values": [1, 2]}',
        '{"num-zeros": {"values": {"1": 5}}}',
        "[1, 2]",
        "{",
        "step,loss\n1,2\n",
    ],
)
def test_other_json_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert golden_values.sniff(Source(path)) == 0.0
