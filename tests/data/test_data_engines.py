"""Our stages inside datatrove and Ray give the rows that they give in one process."""

from __future__ import annotations

import builtins
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from poise.core.errors import UserError
from poise.data import record
from poise.data.engines import datatrove as on_datatrove
from poise.data.engines import ray as on_ray
from poise.data.engines.datatrove import PoiseStages
from poise.data.engines.ray import Apply, conform, map_stages
from poise.data.readers import Document


@dataclass(frozen=True)
class Lower:
    """Edits the text and adds a column."""

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        text = batch.column("text")
        changed = pc.utf8_lower(text)
        moved = pc.not_equal(text, changed).cast(pa.int32())
        return record.set_column(record.set_column(batch, "text", changed), "masked", moved)


@dataclass(frozen=True)
class Long:
    """Scores texts by their length and drops the short ones."""

    at_least: int

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        length = np.asarray(pc.utf8_length(batch.column("text")))
        scores = pa.StructArray.from_arrays([pa.array(length.astype(np.float32))], ["characters"])
        batch = record.set_column(batch, "scores", scores)
        return record.drop(batch, length < self.at_least, "lengths.short")


STAGES = (Lower(), Long(20))


def rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"text": "Größe " * int(rng.integers(1, 9)) + str(n), "id": f"doc{n}", "url": f"http://x/{n}"}
        for n in range(count)
    ]


def in_one_process(given: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what the stages make of each row, by its id."""
    documents = [Document(row["text"], "notes", "", 0, 0, row["id"], row["url"]) for row in given]
    batch = record.run(record.of(documents), STAGES)
    names = ("text", "id", "masked", "scores", record.REASON)
    return {row["id"]: {name: row[name] for name in names} for row in batch.to_pylist()}


@pytest.fixture
def quiet() -> Iterator[None]:
    """Datatrove writes its log to standard error through loguru; keep it out of the tests' output."""
    loguru = pytest.importorskip("loguru")
    loguru.logger.remove()
    yield


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_datatrove_pipeline(kind: str, quiet: None, tmp_path: Path) -> None:
    """Real reader, executor and writers; what is dropped has its reason."""
    executor = pytest.importorskip("datatrove.executor.local")
    readers = pytest.importorskip("datatrove.pipeline.readers")
    writers = pytest.importorskip("datatrove.pipeline.writers")
    if kind == "jsonl":
        pytest.importorskip("orjson")  # datatrove needs it for this
    given = rows(60)
    (tmp_path / "in").mkdir()
    for part in (0, 1):
        _write(tmp_path / "in" / f"{part}.{kind}", given[part::2])
    reader = {"jsonl": readers.JsonlReader, "parquet": readers.ParquetReader}[kind]
    writer = {"jsonl": writers.JsonlWriter, "parquet": writers.ParquetWriter}[kind]
    dropped = writer(str(tmp_path / "dropped"), compression=None)
    pipeline = [
        reader(str(tmp_path / "in")),
        PoiseStages(STAGES, dropped, source="notes"),
        writer(str(tmp_path / "kept"), compression=None),
    ]
    stats = executor.LocalPipelineExecutor(
        pipeline, tasks=1, workers=1, logging_dir=str(tmp_path / "logs"), skip_completed=False
    ).run()
    want = in_one_process(given)
    kept, gone = ({row["id"]: row for row in _lines(tmp_path / name)} for name in ("kept", "dropped"))
    assert 5 < len(kept) < 55 and len(kept) + len(gone) == 60
    for name, row in want.items():
        found = (kept if row[record.REASON] is None else gone)[name]
        assert found["text"] == row["text"]
        assert found["metadata"]["scores"] == row["scores"]
        assert found["metadata"]["masked"] == row["masked"]
        assert found["metadata"]["url"] == f"http://x/{name[3:]}"  # what came with the document stays
        assert found["metadata"].get("filter_reason") == row[record.REASON]
    assert list(kept) == [row["id"] for row in given[0::2] + given[1::2] if row["id"] in kept]  # in their order
    counted = stats.stats[1].stats
    assert counted["total"].total == 60 and counted["forwarded"].total == len(kept)
    assert counted["dropped_lengths.short"].total == len(gone)


def _write(path: Path, given: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(given), path)


def _lines(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted(folder.iterdir()):
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else None
        found += pq.read_table(path).to_pylist() if lines is None else [json.loads(line) for line in lines]
    return found


def test_datatrove_blocks_do_not_matter(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut into blocks gives the same documents; a lone surrogate and odd metadata are no trouble."""
    data = pytest.importorskip("datatrove.data")
    given = [*rows(30), {"text": "a long enough text \ud800", "id": "\udc80", "url": 5}]

    def run() -> list[Any]:
        documents = [data.Document(row["text"], row["id"], metadata={"url": row["url"]}) for row in given]
        step = pickle.loads(pickle.dumps(PoiseStages(STAGES)))
        return [(d.text, d.id, d.metadata) for d in step.run(iter(documents))]

    whole = run()
    assert whole[-1][0] == "a long enough text \ufffd"
    monkeypatch.setattr(on_datatrove.record, "BLOCK_DOCUMENTS", 4)
    assert run() == whole
    monkeypatch.setattr(on_datatrove.record, "BLOCK_BYTES", 30)
    assert run() == whole
    assert list(PoiseStages(STAGES).run(None)) == []


def test_without_datatrove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_datatrove, "_Step", None)
    with pytest.raises(UserError, match=r"pip install 'poise\[datatrove\]'"):
        PoiseStages(STAGES)


def test_apply_gives_the_same_rows() -> None:
    """What Ray calls in its workers: any cut of the rows gives the same, other columns stay."""
    given = rows(50)
    table = pa.table({"body": [r["text"] for r in given], "id": [r["id"] for r in given], "year": list(range(50))})
    table = table.set_column(0, "body", table["body"].cast(pa.large_string()))
    apply = pickle.loads(pickle.dumps(Apply(STAGES, "body", "notes")))
    want = in_one_process(given)
    for size in (50, 7, 1):
        parts = [apply(table.slice(at, size)) for at in range(0, 50, size)]
        found = pa.concat_tables(parts).to_pylist()
        assert [row["year"] for row in found] == list(range(50))
        assert {row["id"]: {name: row[name] for name in want["doc0"]} for row in found} == want
        assert {row["source"] for row in found} == {"notes"} and "body" not in found[0]
    empty = apply(table.slice(0, 0))
    assert empty.num_rows == 0 and empty.schema == apply(table).schema


def test_large_tables_are_cut_by_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray.record, "BLOCK_BYTES", 100)
    seen: list[int] = []

    def note(batch: pa.RecordBatch) -> pa.RecordBatch:
        assert batch.column("text").offset == 0
        seen.append(sum(len(text) for text in batch.column("text").to_pylist()))
        return batch

    texts = ["x" * n for n in (60, 60, 10, 10, 300, 5)]
    assert Apply((note,))(pa.table({"text": texts}))["text"].to_pylist() == texts
    assert seen == [60, 80, 300, 5]


def test_conform() -> None:
    table = pa.table({"text": ["a", None], "offset": pa.array([3, None], pa.int32()), "score": [0.5, 1.0]})
    found = conform(table, "text", "here")
    assert found.column_names == [*record.RECORD_SCHEMA.names, "score"]
    assert found.schema.field("offset") == record.RECORD_SCHEMA.field("offset")
    assert found.to_pylist()[1] | {"score": 0} == {
        "text": "",
        "source": "here",
        "origin": "",
        "offset": 0,
        "replaced_bytes": 0,
        "id": None,
        "url": None,
        "reason": None,
        "score": 0,
    }
    with pytest.raises(UserError, match="no column 'text'; the data set has a: give"):
        conform(pa.table({"a": [1]}), "text", "")
    with pytest.raises(UserError, match=r"column 'text' is list<.*>, not string"):
        conform(pa.table({"text": [[1]]}), "text", "")


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("ray"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'poise\[ray\]'"):
        map_stages(None, STAGES)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_data(tmp_path: Path) -> None:
    """The real engine, two workers: the same rows."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    given = rows(500)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=None)
    try:
        dataset = ray.data.from_arrow(pa.Table.from_pylist(given)).repartition(4)
        found = map_stages(dataset, STAGES, source="notes", rows=64).take_all()
    finally:
        ray.shutdown()
    want = in_one_process(given)
    assert {row["id"]: {name: row[name] for name in want["doc0"]} for row in found} == want
    with pytest.raises(UserError, match=r"needs a ray.data.Dataset, not list"):
        map_stages([], STAGES)
