"""Decisions about data reach the host as they are meant, and a host that cannot follow is told so."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest

from poise.core.errors import UserError
from poise.core.host import Curator, Host
from poise.core.types import DropData
from poise.guard.responses.dispatch import carry_out


class Loop:
    """A host that writes down what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def rollback(self, at_most: int, drop_data: bool) -> int:
        raise AssertionError

    def drop_data(self, first: int, last: int) -> None:
        self.asked.append(("samples", first, last))

    def scale_lr(self, factor: float, rewarm: int = 0) -> None:
        raise AssertionError

    def reset_moments(self, places: Sequence[str] = ()) -> None:
        raise AssertionError

    def halt(self, reason: str) -> None:
        raise AssertionError


class Library(Loop):
    """One that also knows its documents; there are ten."""

    def drop_documents(self, documents: Sequence[int]) -> None:
        if max(documents) > 9:
            raise UserError(f"no document {max(documents)}")
        self.asked.append(("documents", *documents))


def test_samples_and_documents_reach_the_host() -> None:
    host = Library()
    assert isinstance(host, Host) and isinstance(host, Curator) and not isinstance(Loop(), Curator)
    assert carry_out(DropData(first=3, last=8, documents=(4, 2)), host) is None
    assert host.asked == [("samples", 3, 8), ("documents", 4, 2)]


def test_documents_alone_drop_no_samples() -> None:
    host = Library()
    carry_out(DropData(first=1, last=0, documents=(4,)), host)
    assert host.asked == [("documents", 4)]


@pytest.mark.parametrize(
    ("host", "documents", "said"),
    [
        (Loop(), (4,), "1 documents, which this loop cannot do"),
        (Library(), (12,), "drop documents, but no document 12"),
    ],
)
def test_what_cannot_be_done_is_a_warning_and_the_samples_go(
    host: Loop, documents: tuple[int, ...], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="poise"):
        carry_out(DropData(first=3, last=3, documents=documents), host)
    assert said in caplog.text and host.asked == [("samples", 3, 3)]
