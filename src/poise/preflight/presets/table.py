"""The table of what ``check`` says of each published configuration, as in ``docs/case-studies.md``."""

from __future__ import annotations

from poise.preflight.check import check
from poise.preflight.presets import PRESETS

BEGIN = "<!-- written by: python -m poise.preflight.presets docs/case-studies.md -->"
END = "<!-- end of the written table -->"


def table_markdown() -> str:
    """Return one row a preset: how the run went, and the rules that its settings break, by severity."""
    rows = ["| preset | the run | critical | warning | note |", "|---|---|---|---|---|"]
    for found in PRESETS.values():
        broken = check(found.settings).findings
        cells = [
            ", ".join(f"`{one.rule}`" for one in broken if one.severity == severity) or "–"
            for severity in ("critical", "warning", "note")
        ]
        rows.append(f"| `{found.name}` | {found.outcome} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """Return the page with a fresh table between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"the page has no line {BEGIN}"
    assert end, f"the page has no line {END} after {BEGIN}"
    return f"{before}{BEGIN}\n\n{table_markdown()}\n{END}{after}"
