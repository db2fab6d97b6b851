"""Our row-wise stages as one step of a datatrove pipeline, for its executors (local, Slurm, Ray, HF Jobs).

What needs all documents at once (duplicates, the tokenizer) is not a row-wise stage: use datatrove's own blocks for
it, or ``poise data prepare`` on what the pipeline wrote. Needs ``pip install 'poise[datatrove]'`` (0.10).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from poise.core.errors import UserError
from poise.data import record
from poise.data.readers import Document

if TYPE_CHECKING:
    _Step = Any
else:
    try:
        from datatrove.pipeline.base import PipelineStep as _Step
    except ImportError:  # told when a step is made, so that this module can always be imported
        _Step = None

_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_GIVEN: Final = frozenset(record.RECORD_SCHEMA.names)


class PoiseStages(_Step or object):  # type: ignore[misc]
    """Run stages on datatrove's documents, in blocks.

    A document that is kept goes on with its text as the stages left it, and with every column they added (``scores``,
    ``language``, ``masked``, ...) in its metadata. One that got a reason is dropped, counted as ``dropped_<reason>``
    and given to ``exclusion_writer`` with the reason in its metadata as ``filter_reason``, as datatrove's own filters
    do. The kept documents stay in their order.

    Args:
        stages: pure functions of a record batch with ``record.RECORD_SCHEMA``; they must be picklable.
        exclusion_writer: a datatrove writer for what is dropped; None forgets it.
        source: name of the source that the stages see.

    Raises:
        UserError: datatrove is not installed.
    """

    type = "🔻 - FILTER"
    name = "poise stages"

    def __init__(self, stages: Sequence[record.Stage], exclusion_writer: Any = None, source: str = "datatrove") -> None:
        if _Step is None:
            raise UserError("a datatrove pipeline needs datatrove; pip install 'poise[datatrove]'")
        super().__init__()
        self.stages, self.exclusion_writer, self.source = tuple(stages), exclusion_writer, source

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield the kept documents; called by datatrove's executors."""
        with self.exclusion_writer if self.exclusion_writer is not None else contextlib.nullcontext():
            for documents in _blocks(data or ()):
                self.stat_update("batches")
                with self.track_time("batch"):
                    batch = record.run(record.of([_ours(d, self.source) for d in documents]), self.stages)
                assert batch.num_rows == len(documents), "a stage added or removed rows"
                for document, reason in _taken_over(documents, batch):
                    self.stat_update("total")
                    if reason is None:
                        self.stat_update("forwarded")
                        self.update_doc_stats(document)
                        yield document
                        continue
                    self.stat_update("dropped", f"dropped_{reason}")
                    if self.exclusion_writer is not None:
                        document.metadata["filter_reason"] = reason
                        self.exclusion_writer.write(document, rank)


def _blocks(documents: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield datatrove's documents in blocks as large as ours."""
    block: list[Any] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= record.BLOCK_BYTES or len(block) == record.BLOCK_DOCUMENTS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _ours(document: Any, source: str) -> Document:
    """Return a datatrove document as the stages see it."""
    metadata = document.metadata
    text = document.text if document.text.isascii() else _LONE_SURROGATE.sub("\ufffd", document.text)
    origin, url = metadata.get("file_path") or document.id, metadata.get("url")
    return Document(
        text=text,
        source=source,
        origin=_LONE_SURROGATE.sub("\ufffd", str(origin)),
        offset=0,
        replaced_bytes=0,
        id=_LONE_SURROGATE.sub("\ufffd", str(document.id)),
        url=url if isinstance(url, str) and not _LONE_SURROGATE.search(url) else None,
    )


def _taken_over(documents: Sequence[Any], batch: pa.RecordBatch) -> Iterator[tuple[Any, str | None]]:
    """Yield the documents with what the stages made of them, and the reasons."""
    added = {name: batch.column(name) for name in batch.schema.names if name not in _GIVEN}
    texts, reasons = batch.column("text"), batch.column(record.REASON).to_pylist()
    value: Callable[[Any], Any] = lambda column: column.as_py()  # noqa: E731
    for row, (document, reason) in enumerate(zip(documents, reasons, strict=True)):
        document.text = texts[row].as_py()
        document.metadata.update({name: value(column[row]) for name, column in added.items()})
        yield document, reason
