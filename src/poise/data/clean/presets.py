"""Filter rules as data: what was published for web text, and choices of our own for books, code and manuals.

Web thresholds are not defaults for other text. A preset is a tuple of rules; the first one that fails is the reason.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from poise.core.errors import UserError, nearest
from poise.data.clean.features import ABOUT, FEATURES

_GOPHER_TEXT: Final = "Rae et al. 2021, arXiv 2112.11446, appendix A.1.1"
_GOPHER_TABLE: Final = "Rae et al. 2021, arXiv 2112.11446, table A1"
_C4_PAGE: Final = "Raffel et al. 2020, arXiv 1910.10683, section 2.2"
_FINEWEB: Final = "Penedo et al. 2024, arXiv 2406.17557, section 3.6"
_DEEPSEEK_CODER: Final = (
    "Guo et al. 2024, arXiv 2401.14196, section 2.1, after StarCoder (Li et al. 2023, arXiv 2305.06161)"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A document is dropped when a feature is outside of a range; values on the border are kept.

    Attributes:
        name: the rule's name in reasons: ``<preset>.<name>``.
        feature: one of ``features.FEATURES``.
        at_least: smallest value kept, or None.
        at_most: largest value kept, or None.
        why: the source of the threshold, or the reason for a choice of our own.
    """

    name: str
    feature: str
    at_least: float | None = None
    at_most: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if self.feature not in FEATURES:
            hint = nearest(self.feature, FEATURES)
            raise UserError(f"rule '{self.name}': no feature '{self.feature}'{hint}")
        if self.at_least is None and self.at_most is None:
            raise UserError(f"rule '{self.name}' has no limit: give at_least or at_most")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise UserError(f"rule '{self.name}': at_least {self.at_least} is over at_most {self.at_most}; swap them")

    def limits(self) -> str:
        """Return the range in words.

        >>> Rule("words", "words", at_least=50, at_most=100_000).limits()
        '50 to 100,000'
        >>> Rule("hash_ratio", "hash_ratio", at_most=0.1).limits()
        'at most 0.1'
        """
        if self.at_least is None:
            return f"at most {self.at_most:,}"
        if self.at_most is None:
            return f"at least {self.at_least:,}"
        return f"{self.at_least:,} to {self.at_most:,}"


_GOPHER: Final = (
    Rule("words", "words", at_least=50, at_most=100_000, why=_GOPHER_TEXT),
    Rule("mean_word_length", "mean_word_length", at_least=3, at_most=10, why=_GOPHER_TEXT),
    Rule("hash_ratio", "hash_ratio", at_most=0.1, why=_GOPHER_TEXT),
    Rule("ellipsis_ratio", "ellipsis_ratio", at_most=0.1, why=_GOPHER_TEXT),
    Rule("bullet_lines", "bullet_lines", at_most=0.9, why=_GOPHER_TEXT),
    Rule("ellipsis_lines", "ellipsis_lines", at_most=0.3, why=_GOPHER_TEXT),
    Rule("alpha_words", "alpha_words", at_least=0.8, why=_GOPHER_TEXT),
    Rule("stop_words", "stop_words", at_least=2, why=_GOPHER_TEXT),
)

_GOPHER_REPETITION: Final = tuple(
    Rule(feature, feature, at_most=limit, why=_GOPHER_TABLE)
    for feature, limit in (
        ("duplicate_paragraphs", 0.30),
        ("duplicate_paragraph_chars", 0.20),
        ("duplicate_lines", 0.30),
        ("duplicate_line_chars", 0.20),
        ("top_2gram", 0.20),
        ("top_3gram", 0.18),
        ("top_4gram", 0.16),
        ("duplicate_5grams", 0.15),
        ("duplicate_6grams", 0.14),
        ("duplicate_7grams", 0.13),
        ("duplicate_8grams", 0.12),
        ("duplicate_9grams", 0.11),
        ("duplicate_10grams", 0.10),
    )
)

_C4: Final = (
    Rule("lorem_ipsum", "lorem_ipsum", at_most=0, why=_C4_PAGE),
    Rule("curly_brackets", "curly_brackets", at_most=0, why=_C4_PAGE),
    Rule("sentences", "sentences", at_least=5, why=_C4_PAGE + " (the code published with it has 3)"),
)

_FINEWEB_RULES: Final = (
    Rule("terminal_lines", "terminal_lines", at_least=0.12, why=_FINEWEB),
    Rule("short_lines", "short_lines", at_most=0.67, why=_FINEWEB),
    Rule(
        "duplicate_line_text",
        "duplicate_line_text",
        at_most=0.01,
        why="the code FineWeb was made with (datatrove)",
    ),
    Rule("newlines_per_word", "newlines_per_word", at_most=0.3, why="the code FineWeb was made with (datatrove)"),
)

# Limits of our own stand well outside of what good text of the kind shows (the page on data gives what was measured),
# so they take only what nobody would train on. None of them asks for a language.
_BOOKS: Final = (
    Rule("words", "words", at_least=50, why="a fragment; no upper limit, books are long (Gopher: 100,000)"),
    Rule("mean_word_length", "mean_word_length", at_least=3, at_most=10, why="Gopher's limits; prose has 4 to 8"),
    Rule(
        "alpha_words",
        "alpha_words",
        at_least=0.7,
        why="tables and indexes; Gopher's 0.8 takes chapters with many notes",
    ),
    Rule("letters", "letters", at_least=0.35, why="noise of scanning, rows of dots; indented books go down to 0.43"),
    Rule("digits", "digits", at_most=0.2, why="tables of numbers; books have up to 0.07"),
    Rule("duplicate_lines", "duplicate_lines", at_most=0.3, why="Gopher's limit; running heads give up to 0.19"),
    Rule(
        "duplicate_5grams",
        "duplicate_5grams",
        at_most=0.35,
        why="Gopher's 0.15 takes scripture and verse, which reach 0.23",
    ),
    Rule("duplicate_10grams", "duplicate_10grams", at_most=0.2, why="refrains reach 0.08; copied passages lie above"),
    Rule("top_4gram", "top_4gram", at_most=0.16, why="Gopher's limit"),
    Rule("compression", "compression", at_most=5, why="repeated text; books have 1.4 to 3.6"),
)

_CODE: Final = (
    Rule("words", "words", at_least=5, why="an empty or nearly empty file"),
    Rule("mean_line", "mean_line", at_most=100, why=_DEEPSEEK_CODER),
    Rule("longest_line", "longest_line", at_most=1000, why=_DEEPSEEK_CODER),
    Rule("letters", "letters", at_least=0.25, why=_DEEPSEEK_CODER),
    Rule("digits", "digits", at_most=0.4, why="data written as code"),
    Rule(
        "duplicate_line_chars", "duplicate_line_chars", at_most=0.7, why="generated code; Gopher's 0.2 takes good code"
    ),
    Rule("compression", "compression", at_most=10, why="generated code and tables; good code has 1 to 7.6"),
)

_MANUALS: Final = (
    Rule("words", "words", at_least=10, why="a stub that only points elsewhere"),
    Rule(
        "mean_word_length", "mean_word_length", at_least=3, at_most=15, why="names and paths are long: up to 13.6 seen"
    ),
    Rule("alpha_words", "alpha_words", at_least=0.5, why="option tables go down to 0.58; Gopher takes them at 0.8"),
    Rule("letters", "letters", at_least=0.3, why="tables drawn with characters; indented manuals have 0.37 and more"),
    Rule("digits", "digits", at_most=0.3, why="dumps and tables of numbers; manuals have up to 0.2"),
    Rule(
        "duplicate_lines",
        "duplicate_lines",
        at_most=0.7,
        why="every entry has the same parts: up to 0.56 in good manuals",
    ),
    Rule(
        "duplicate_10grams",
        "duplicate_10grams",
        at_most=0.5,
        why="Gopher's 0.1 takes a reference in fixed forms (0.36)",
    ),
    Rule("top_4gram", "top_4gram", at_most=0.25, why="fixed forms reach 0.23"),
    Rule("compression", "compression", at_most=8, why="repeated text; manuals have 1.2 to 4.7"),
)

PRESETS: Final[dict[str, tuple[Rule, ...]]] = {
    "gopher": _GOPHER,
    "gopher_repetition": _GOPHER_REPETITION,
    "c4": _C4,
    "fineweb": _FINEWEB_RULES,
    "web": _GOPHER_REPETITION + _GOPHER + _C4 + _FINEWEB_RULES,
    "books": _BOOKS,
    "code": _CODE,
    "manuals": _MANUALS,
}
"""Rules by preset. ``web`` is FineWeb's published chain, in its order; the last three are choices of our own."""


def rules(preset: str) -> tuple[Rule, ...]:
    """Return the rules of a preset.

    Raises:
        UserError: there is no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"no filter preset '{preset}'{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def presets_page() -> str:
    """Return all rules as one Markdown table."""
    rows = ["| preset | rule | keeps a document whose | is | source |", "|---|---|---|---|---|"]
    for preset, members in PRESETS.items():
        for rule in members:
            about = ABOUT[rule.feature].replace("|", "\\|")
            rows.append(f"| {preset} | `{rule.name}` | {about} | {rule.limits()} | {rule.why} |")
    return "\n".join(rows) + "\n"


HEAD: Final = """# Filters for text

What each preset of `poise data prepare --filters` keeps; everything else is dropped, with the name of the first rule
that it fails as the reason, and kept in `dropped/`. `web` is the published set for web pages (`gopher_repetition`,
`gopher`, `c4` and `fineweb` together). Its limits are no defaults for other text: of good manuals, books and code it
drops most. `books`, `code` and `manuals` have limits of our own, chosen on such text; the last column says why. Word
rules need a language with spaces between words. `poise data prepare ... --dry-run` shows what a preset would drop
before it does. The table is written by `python -m poise.data.clean.presets docs/filters.md`.

"""
"""The page above its table."""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(HEAD + presets_page(), encoding="utf-8")
