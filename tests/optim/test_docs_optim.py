"""What the pages on optimizers and schedules say: their code runs and prints what they show, their tables are true."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import poise.optim as po
from poise.optim.build import CLIPPERS, RULES, OptimConfig
from poise.optim.chain import Chain
from poise.optim.facts import gradient_kernel
from poise.optim.rules.adamw import AdamWRule
from poise.optim.transform import Link
from poise.optim.wrap.low_precision import LowPrecisionStates

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("optim", "schedules")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def rows_of(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table under a head row that begins with ``head``."""
    lines = text_of(page).split(f"\n| {head}", 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("page", PAGES)
def test_every_code_block_runs_and_prints_what_the_page_shows(page: str) -> None:
    found = [(match[1], match[2], match.start()) for match in FENCE.finditer(text_of(page))]
    assert sum(kind == "python" for kind, _, _ in found) >= 5
    names: dict[str, Any] = {"__name__": "docs"}
    for place, (kind, code, start) in enumerate(found):
        if kind != "python":
            continue
        line = text_of(page).count("\n", 0, start) + 2
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            source = "\n" * (line - 1) + code  # so that an error names the line of the page
            exec(compile(source, f"docs/{page}.md", "exec", dont_inherit=True), names)
        shown = found[place + 1][1] if place + 1 < len(found) and found[place + 1][0] == "text" else ""
        if "'native'" in shown and gradient_kernel(False) is None:
            continue  # no compiler here
        assert printed.getvalue() == shown, f"docs/{page}.md, line {line}, prints\n{printed.getvalue()}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        name, _, anchor = target.partition("#")
        path = DOCS / name if name else DOCS / f"{page}.md"
        assert path.is_file(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, f"{target}: {sorted(anchors)}"


def test_every_public_name_is_on_a_page() -> None:
    both = text_of("optim") + text_of("schedules")
    missing = [name for name in po.__all__ if name != "METHODS" and not re.search(rf"\b{name}\b", both)]
    assert not missing


def test_every_method_is_named_with_its_paper() -> None:
    text = text_of("optim") + text_of("schedules")
    for module in po.METHODS:
        card = importlib.import_module(module).CARD
        numbers = re.findall(r"arXiv (\d{4}\.\d{5})", card.citation)
        assert not numbers or any(number in text for number in numbers), f"{card.name}: {numbers}"


@pytest.mark.parametrize("row", rows_of("optim", "rule "), ids=lambda row: row[0])
def test_bytes_of_state(row: list[str]) -> None:
    names = re.findall(r"`(\w+)`", row[0])
    assert names and all(name in po.__all__ for name in names)
    if not row[2].isdigit():
        return  # of a package that need not be here
    p = nn.Parameter(torch.zeros(256, 512))
    optimizer = getattr(po, names[0])([("p", p)], path="plain")
    p.grad = torch.ones_like(p)
    optimizer.step()
    own = [value for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
    total = sum(value.numel() * value.element_size() for value in own)
    assert round(total / p.numel(), 1) == pytest.approx(float(row[2]), abs=0.05)


@pytest.mark.parametrize("row", rows_of("optim", "link "), ids=lambda row: row[0])
def test_stages(row: list[str]) -> None:
    around = {"Cautious", "MomentReset", "LowPrecisionStates"}
    for name in re.findall(r"`(\w+)", row[0]):
        kind = getattr(po, name)
        if name in ("QKClip", "UnitRows"):
            assert row[1] == "hook" and not isinstance(kind, Link)
        elif name in around:
            assert row[1] == "around" and kind(AdamWRule()).stage == "direction"
        else:
            assert row[1] == kind.stage
            link = kind(1.0) if name == "ClipGlobalNorm" else kind()
            assert ("plain path" in row[2]) == (not link.pointwise)


def mean_v(rule: Link) -> list[float]:
    """Return the mean second moment at steps 99, 100, 400 and 700, with a spike at step 100."""
    p, noise, seen = nn.Parameter(torch.zeros(500)), torch.Generator().manual_seed(0), []
    chain = Chain([("p", p)], rule, lr=1e-3)
    for step in range(1, 701):
        p.grad = torch.randn(500, generator=noise) * (1000 if step == 100 else 1)
        chain.step()
        if step in (99, 100, 400, 700):
            seen.append(float(chain.state[p]["exp_avg_sq"].float().mean()))
    return seen


def test_the_table_of_second_moments() -> None:
    adam = AdamWRule(beta2=0.999)
    rules: dict[str, Link] = {
        "fp32": adam,
        "bf16, nearest": LowPrecisionStates(adam, rounding="nearest"),
        "bf16, stochastic": LowPrecisionStates(adam),
    }
    table = {row[0]: [float(cell) for cell in row[1:]] for row in rows_of("optim", "v in ")}
    assert list(table) == list(rules)
    for name, rule in rules.items():
        assert table[name] == pytest.approx(mean_v(rule), rel=0.02), name


def test_the_recipe() -> None:
    (toml,) = [body for kind, body, *_ in FENCE.findall(text_of("optim")) if kind == "toml"]
    settings = tomllib.loads(toml)["optim"]
    OptimConfig(**settings)
    for key, known in (("name", RULES), ("clip", CLIPPERS)):
        line = next(line for line in toml.splitlines() if line.startswith(key))
        assert {settings[key], *line.partition("#")[2].split()} == set(known)
