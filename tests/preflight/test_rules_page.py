"""The page of the rules is that of the rules."""

from __future__ import annotations

from pathlib import Path

from poise.preflight import rules_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "preflight.md"


def test_the_page_holds_every_rule_as_it_is() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert rules_page.with_table(text) == text, "run python -m poise.preflight.rules_page docs/preflight.md"
    assert "| `init-std-width` | critical |" in text
