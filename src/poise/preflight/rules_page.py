"""The table of rules in docs/preflight.md; ``python -m poise.preflight.rules_page docs/preflight.md`` writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from poise.preflight.check import RULES

BEGIN: Final = "<!-- rules: written by python -m poise.preflight.rules_page -->"
END: Final = "<!-- end of rules -->"


def table_markdown() -> str:
    """Return every rule in a row."""
    lines = ["| rule | at most | what it looks for | from |", "|---|---|---|---|"]
    lines += [f"| `{rule.id}` | {rule.severity} | {rule.title} | {rule.source} |" for rule in RULES]
    return "\n".join(lines)


def with_table(page: str) -> str:
    """Return the page with its table replaced by the present one."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table_markdown()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
