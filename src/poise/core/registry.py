"""Cards: what a method is, in words a table can show."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

CardKind = Literal["model", "optimizer", "clipping", "detector", "response", "data"]


@dataclass(frozen=True, slots=True)
class Card:
    """One method's entry in ``poise methods``, in the docs table and in the legends of studies.

    Attributes:
        name: the name used in recipes.
        kind: the room it belongs to.
        title: one line for a reader who has never heard of it.
        citation: authors, year, title, arXiv number.
        formula: plain text.
        acts: when and where it acts.
        cost: time and memory, stated for training.
        off: how to switch it off.
        differs: how this implementation differs from the paper; "nothing known" if it does not.
    """

    name: str
    kind: CardKind
    title: str
    citation: str
    formula: str
    acts: str
    cost: str
    off: str
    differs: str = "nothing known"


def cards_of(modules: Iterable[str]) -> list[Card]:
    """Return the ``CARD`` of each module, in the given order."""
    cards = [importlib.import_module(name).CARD for name in modules]
    assert all(isinstance(card, Card) for card in cards)
    return cards
