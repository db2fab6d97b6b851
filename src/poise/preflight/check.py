"""``check``: what is known to break about a configuration, by rules with source and mend. No torch.

>>> from poise.preflight.settings import Settings
>>> report = check(Settings(source="mine", format="preset", warmup_steps=2000, total_steps=1000))
>>> [(one.rule, one.severity) for one in report.findings]
[('warmup-total', 'critical')]
"""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final

from poise.core.types import Severity
from poise.preflight.rules import FILES
from poise.preflight.rules.base import RANK, Rule
from poise.preflight.rules.values import UNUSABLE, cleaned
from poise.preflight.settings import Finding, Settings

RULES: Final[tuple[Rule, ...]] = tuple(
    one for name in FILES for one in importlib.import_module(f"poise.preflight.rules.{name}").RULES
)
"""All rules, in the order of ``rules.FILES``."""


@dataclass(frozen=True, slots=True)
class Report:
    """What ``check`` found.

    Attributes:
        source: file or preset that was judged.
        format: how it was read.
        findings: broken rules, the gravest first.
        passed: ids of rules that judged and found nothing.
        not_judged: (rule id, fields that the source does not say), for the rules that need them.
        notes: of the reader, and of ours.
    """

    source: str
    format: str
    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    not_judged: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Severity | None:
        """The gravest severity; nothing where no rule is broken."""
        return self.findings[0].severity if self.findings else None

    @property
    def counts(self) -> dict[Severity, int]:
        """Findings by severity, all three, the gravest first."""
        found = Counter(one.severity for one in self.findings)
        severities: tuple[Severity, ...] = ("critical", "warning", "note")
        return {severity: found[severity] for severity in severities}

    def at_least(self, severity: Severity) -> bool:
        """Return whether there is a finding of this severity or a graver one."""
        return self.worst is not None and RANK[self.worst] <= RANK[severity]

    def record(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "source": self.source,
            "format": self.format,
            "worst": self.worst,
            "counts": dict(self.counts),
            "findings": [asdict(one) | {"fields": list(one.fields)} for one in self.findings],
            "passed": list(self.passed),
            "not_judged": [{"rule": rule, "missing": list(missing)} for rule, missing in self.not_judged],
            "notes": list(self.notes),
        }


def check(settings: Settings) -> Report:
    """Judge a configuration by every rule whose fields it says.

    Values that cannot be meant (``nan``, negative sizes) are reported once and are ``None`` for the other rules.
    """
    usable = cleaned(settings)
    findings: list[Finding] = []
    passed: list[str] = []
    not_judged: list[tuple[str, tuple[str, ...]]] = []
    for one in RULES:
        seen = settings if one is UNUSABLE else usable
        missing = tuple(name for name in one.needs if getattr(seen, name) is None)
        if missing:
            not_judged.append((one.id, missing))
            continue
        found = one.judge(seen)
        if found is None:
            passed.append(one.id)
        else:
            findings.append(found)
    findings.sort(key=lambda found: RANK[found.severity])
    return Report(
        settings.source, settings.format, tuple(findings), tuple(passed), tuple(not_judged), tuple(settings.notes)
    )
