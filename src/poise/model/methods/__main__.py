"""Print ``docs/methods.md``."""

import sys

from poise.model.methods_page import table_markdown

sys.stdout.write(table_markdown())
