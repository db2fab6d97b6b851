"""What a published configuration is: its settings, each with the source's own words, and how the run went."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from poise.preflight.settings import Settings

Outcome = Literal["stable", "spiked", "unstable"]
Mark = Literal["verified", "secondary"]

Fact = tuple[str, Any, str]
"""A field of ``Settings``, its value, and how the source says it."""

_FIELDS = frozenset(field.name for field in fields(Settings)) - {"source", "format", "said", "notes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published training run.

    Attributes:
        name: what ``poise check NAME`` takes.
        title: one line: whose run, size, what is special about it.
        outcome: ``stable`` needed no intervention because of its loss; ``spiked`` went on, with spikes or divergences
            that cost an intervention or more tokens; ``unstable`` failed, or was saved only by another configuration.
        what: what happened, with the numbers that the source gives.
        mark: ``verified`` if every field was read in the source named; ``secondary`` if only elsewhere.
        sources: ``repository: path @ commit`` or ``arXiv id, section``.
        settings: what the source says; everything else is ``None``.
    """

    name: str
    title: str
    outcome: Outcome
    what: str
    mark: Mark
    sources: tuple[str, ...]
    settings: Settings


def published(name: str, facts: tuple[Fact, ...], notes: tuple[str, ...] = ()) -> Settings:
    """Return the settings that the facts say, each with the source's words in ``said``.

    Args:
        name: of the preset, for messages.
        facts: a later fact replaces an earlier one of the same field.
        notes: what the reader of a verdict should know about the facts.
    """
    unknown = {field for field, _, _ in facts} - _FIELDS
    assert not unknown, f"preset {name}: Settings has no {sorted(unknown)}"
    assert all(words for _, _, words in facts), f"preset {name}: a fact without words"
    return Settings(
        source=name,
        format="preset",
        **{field: value for field, value, _ in facts},
        said={field: words for field, _, words in facts},
        notes=notes,
    )
