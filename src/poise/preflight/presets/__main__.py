"""``python -m poise.preflight.presets [PAGE]``: print the table of presets and findings, or write it into a page."""

from __future__ import annotations

import sys
from pathlib import Path

from poise.preflight.presets.table import table_markdown, with_table

if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.stdout.write(table_markdown())
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
