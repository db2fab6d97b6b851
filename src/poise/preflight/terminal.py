"""A report on a terminal, in one screen: what was read, what is wrong, why, what to write instead.

Text of the configuration goes through ``Pen``: no markup and no escape sequence in it takes effect, and what the
terminal's encoding lacks is written in ASCII. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from poise.core.types import Severity
from poise.dashboard.text import count, number, plural
from poise.preflight.check import RULES, Report
from poise.preflight.measure_findings import MEASURED
from poise.preflight.settings import Finding, Settings

STYLE: Final[Mapping[Severity, str]] = {"critical": "bold red", "warning": "yellow", "note": "dim"}

EXPLAINED: Final = 4
"""Findings whose reason is said without ``--all``, the gravest; notes never."""

SOURCE: Final = 90
"""Characters of sources that are shown without ``--all``, in whole ones; one at least."""

MOST_NOTES: Final = 3
"""Remarks of the reader that are shown without ``--all``."""

MOST_MISSING: Final = 6
"""Fields that are named for want of which rules did not judge."""

FORMATS: Final[Mapping[str, str]] = {
    "recipe": "poise recipe",
    "hf": "Hugging Face configuration",
    "megatron": "Megatron-LM arguments",
    "torchtitan": "torchtitan configuration",
    "model": "model in memory",
    "preset": "published configuration",
    "mlperf": "MLPerf settings",
}


class Pen:
    """Makes texts that a console can show: plain, and in its encoding."""

    def __init__(self, console: Console) -> None:
        self._encoding = console.encoding

    def __call__(self, text: str, style: str = "") -> Text:
        """Return a text for rich, without markup and without control characters."""
        text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
        try:
            text.encode(self._encoding)
        except (UnicodeEncodeError, LookupError):
            text = text.replace("–", "-").encode("ascii", "replace").decode()
        return Text(text, style=style)

    def line(self, *parts: tuple[str, str]) -> Text:
        """Return a text of several (text, style)."""
        return Text.assemble(*(self(text, style) for text, style in parts))


class Hanging:
    """A text whose lines but the first are further in."""

    def __init__(self, text: Text, first: int, rest: int) -> None:
        self._text, self._first, self._rest = text, first, rest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self._text.wrap(console, max(10, options.max_width - self._rest))
        for i, line in enumerate(lines):
            yield Text(" " * (self._rest if i else self._first)) + line


def show(
    report: Report,
    settings: Settings,
    console: Console,
    *,
    everything: bool = False,
    measured: Sequence[str] = (),
) -> None:
    """Print a report.

    Args:
        report: of ``settings``.
        settings: what was read.
        console: where to; its width is used.
        everything: say why for every finding, with all sources; name all rules, print all remarks.
        measured: lines on what was measured, in front of the findings; two blanks in front are kept.
    """
    pen = Pen(console)
    for one in _parts(report, settings, pen, everything, measured):
        console.print(one)


def _parts(
    report: Report, settings: Settings, pen: Pen, everything: bool, measured: Sequence[str]
) -> Iterator[Text | Hanging]:
    yield Hanging(pen.line((report.source, "bold"), (f": {facts(settings)}", "")), 0, 2)
    yield _headline(report, pen)
    for line in measured:
        inner = line.lstrip(" ")
        yield Hanging(pen(inner), len(line) - len(inner), len(line) - len(inner) + 2)
    for i, found in enumerate(report.findings):
        fully = everything or (found.severity != "note" and i < EXPLAINED)
        if fully or i in (0, EXPLAINED) or found.severity != report.findings[i - 1].severity:
            yield Text()
        yield from _finding(found, pen, fully, everything)
    yield Text()
    yield Hanging(pen(judged(report, everything), "dim"), 0, 2)
    shown = report.notes if everything else report.notes[:MOST_NOTES]
    for note in shown:
        yield Hanging(pen(f"note: {note}", "dim"), 0, 2)
    if len(shown) < len(report.notes):
        yield pen(f"and {plural(len(report.notes) - len(shown), 'more remark')}; --all shows them", "dim")


def facts(settings: Settings) -> str:
    """Return what was read, in one line: format, size, learning rate, batch, shape."""
    s = settings
    says = [FORMATS.get(s.format, s.format)]
    # The size of a mixture of experts is only known where it is said: the shape speaks of one expert.
    if s.n_params and (s.params is not None or not s.n_experts):
        says.append(f"{count(s.n_params)} weights")
    if s.d_model is not None and s.n_layers is not None:
        says.append(f"width {s.d_model} x {plural(s.n_layers, 'layer')}")
    if s.lr is not None:
        says.append(f"{s.optimizer or 'optimizer not said'}, lr {number(s.lr)}")
    if s.batch_tokens is not None:
        says.append(f"{count(s.batch_tokens)} tokens a step")
    if s.total_steps is not None:
        says.append(plural(s.total_steps, "step"))
    return ", ".join(says)


def _headline(report: Report, pen: Pen) -> Text:
    counts = {severity: n for severity, n in report.counts.items() if n}
    if not counts:
        return pen("nothing found that is known to break", "bold green")
    words: list[tuple[str, str]] = []
    for severity, n in counts.items():
        words += [(", ", "")] * bool(words)
        words.append((str(n) + " critical" if severity == "critical" else plural(n, severity), STYLE[severity]))
    return pen.line(*words)


def _finding(found: Finding, pen: Pen, fully: bool, everything: bool) -> Iterator[Hanging]:
    titles = {one.id: one.title for one in RULES} | {name: title for name, (title, _) in MEASURED.items()}
    head = pen.line((found.severity, STYLE[found.severity]), (f"  {titles.get(found.rule, '')}", "bold"))
    yield Hanging(head + pen(f"  ({found.rule})", "dim"), 0, 4)
    yield Hanging(pen(found.what), 2, 4)
    if fully:
        yield Hanging(pen.line(("why: ", "bold"), (found.why, "")), 2, 4)
    yield Hanging(pen.line(("do:  ", "bold"), (found.mend, "")), 2, 4)
    if fully:
        yield Hanging(pen(f"[{found.source if everything else short_source(found.source)}]", "dim"), 2, 4)


def short_source(source: str) -> str:
    """Return the first sources of several.

    >>> short_source("Marin 32B retrospective; " + "x" * 90)
    'Marin 32B retrospective; ...'
    """
    parts = source.split("; ")
    kept = parts[:1]
    for part in parts[1:]:
        if len("; ".join([*kept, part])) > SOURCE:
            return "; ".join([*kept, "..."])
        kept.append(part)
    return "; ".join(kept)


def judged(report: Report, everything: bool) -> str:
    """Return how many rules found nothing, and what the others would have to know."""
    text = f"passed {plural(len(report.passed), 'rule')}"
    if everything and report.passed:
        text += f": {', '.join(report.passed)}"
    if not report.not_judged:
        return text
    if everything:
        rules = "; ".join(f"{rule} (needs {', '.join(missing)})" for rule, missing in report.not_judged)
        return f"{text}; not judged: {rules}"
    missing = Counter(name for _, names in report.not_judged for name in names)
    named = [name for name, _ in missing.most_common(MOST_MISSING)]
    more = ", ..." if len(missing) > len(named) else ""
    return f"{text}; not judged: {len(report.not_judged)}, as it is not said: {', '.join(named)}{more} (--all)"


def rule_lines() -> Iterator[tuple[str, Severity, str, str]]:
    """Yield (id, severity, title, source) of every rule, and of what ``--model`` measures."""
    for one in RULES:
        yield one.id, one.severity, one.title, one.source
    for name, (title, severity) in MEASURED.items():
        yield name, severity, title, "measured with --model"


def show_rules(console: Console) -> None:
    """Print every rule."""
    pen = Pen(console)
    for name, severity, title, source in rule_lines():
        console.print(Hanging(pen.line((f"{severity:<9}", STYLE[severity]), (name, "bold"), (f"  {title}", "")), 0, 11))
        console.print(Hanging(pen(source, "dim"), 11, 13))


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns; the last one is free.

    >>> columns([("a", "b", "c d"), ("aaa", "b", "e")])
    ['a    b  c d', 'aaa  b  e']
    """
    table = list(rows)
    if not table:
        return []
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
