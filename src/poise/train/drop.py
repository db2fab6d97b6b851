"""What is taken out of the rest of a run: by a person after ``poise blame``, or by the guard."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poise.core.errors import UserError
from poise.core.host import Curator
from poise.train.host import no_document
from poise.train.position import last_step
from poise.train.state import Run


@dataclass(frozen=True, slots=True)
class Drop:
    """What a person takes out of the rest of a run: ranges (first, last) of samples, and documents by number."""

    samples: tuple[tuple[int, int], ...] = ()
    documents: tuple[int, ...] = ()

    @classmethod
    def asked_before(cls, records: Sequence[Mapping[str, Any]]) -> Drop:
        """Return what a person asked for at earlier resumes, and what the guard took out: checkpoints may be older.

        A range that a rollback left out is not among it: it was passed over, once.
        """
        restarts = [record for record in records if record["type"] == "restart"]
        drops = [record for record in records if record["type"] == "drop"]
        ranges = [one for record in restarts for one in record.get("drop_samples", ())]
        ranges += [record["samples"] for record in drops if "samples" in record]
        documents = [one for record in restarts for one in record.get("drop_documents", ())]
        documents += [one for record in drops for one in record.get("documents", ())]
        unique = dict.fromkeys((int(first), int(last)) for first, last in ranges)
        return cls(tuple(unique), tuple(dict.fromkeys(map(int, documents))))

    def and_also(self, other: Drop) -> Drop:
        """Return both together."""
        return Drop(self.samples + other.samples, self.documents + other.documents)

    def check(self, run: Run) -> None:
        """Raise a ``UserError`` where the training text has no such document."""
        for document in self.documents:
            if not 0 <= document < run.loader.document_count:
                raise UserError(no_document(document, run.loader.document_count))

    def too_much(self, run: Run) -> str:
        """Return in a line why a run's budget cannot be used up without these samples; empty where it can.

        Only a mixture with limits of epochs has an end.
        """
        end = None if run.loader.mix is None else run.loader.mix.total
        if end is None:
            return ""
        without = dataclasses.replace(run.position, skips=[*run.position.skips, *self.samples])
        last, asked = last_step(run.recipe, without, end), run.recipe.train.steps
        if last >= asked:
            return ""
        return (
            f"the mixture ends after {end:,} samples, by its limits of epochs; without what is dropped that is enough "
            f"for step {last} and not for {asked}: use --train.steps {last}, or drop less"
        )

    def apply(self, run: Run) -> None:
        """Take it out from the next step on."""
        assert isinstance(run.host, Curator)
        if self.documents:
            run.host.drop_documents(self.documents)
        for first, last in self.samples:
            run.host.drop_data(first, last)
