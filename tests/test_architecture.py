"""The house rules that can be checked: arrows between rooms, no cycles, files of a readable size."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from poise.cli.methods import all_cards
from poise.model import methods

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "poise"

TOPICS = {"data", "model", "optim", "guard", "hardware", "dashboard"}
ALLOWED = {
    "core": set[str](),
    **{room: {"core"} for room in TOPICS},
    "train": {"core", *TOPICS},
    "integrations": {"core", "guard", "optim"},
    "postmortem": {"core", "guard", "dashboard"},
    "studies": {"core", "train", *TOPICS},
    "preflight": {"core", "train", "studies", *TOPICS},
    "cli": {"core", "train", "postmortem", "studies", "preflight", *TOPICS},
}
"""Which rooms a room may import, besides itself."""

FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    """Rooms of poise that a file imports anywhere, also inside functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "poise" and len(parts) > 1 and (SOURCE / parts[1]).is_dir():
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_arrows_point_one_way(path: Path) -> None:
    room = room_of(path)
    if not room:
        return  # the face names every room, lazily
    wrong = imports_of(path) - {room} - ALLOWED[room]
    assert not wrong, f"{path.relative_to(ROOT)}: room '{room}' may not import {sorted(wrong)}"


def test_every_room_has_a_rule_and_a_page() -> None:
    rooms = {p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists()}
    assert rooms == set(ALLOWED)
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")}
    assert TOPICS | {"train", "integrations", "postmortem"} <= pages


def test_room_faces_are_tables_or_empty() -> None:
    for path in SOURCE.rglob("__init__.py"):
        if path.parent == SOURCE:
            continue
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 120, f"{path.relative_to(ROOT)} has grown beyond a table"


def test_files_are_of_a_readable_size() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_detectors_import_no_torch() -> None:
    for path in (SOURCE / "guard" / "detectors").glob("*.py"):
        assert "import torch" not in path.read_text(encoding="utf-8"), path.name


def test_import_poise_costs_no_torch() -> None:
    code = "import sys, poise; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_costs_no_torch() -> None:
    code = "import sys\nfrom poise.cli.main import main\nmain(['--help'])\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_every_public_name_exists() -> None:
    import poise

    missing = []
    for name in poise.__all__:
        try:
            if isinstance(getattr(poise, name), ModuleType):
                missing.append(f"{name}: is a room, not the name it should be")
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert not missing


def test_every_method_has_card_and_docs_line() -> None:
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name, card in all_cards().items():
        for field in ("title", "citation", "formula", "acts", "cost", "off", "differs"):
            assert getattr(card, field).strip(), f"{name}: the card's {field} is empty"
        if card.kind == "model":
            assert f"`{name}`" in table, f"docs/methods.md has no line for {name}"


def test_every_model_method_file_is_registered() -> None:
    files = {p.stem for p in (SOURCE / "model" / "methods").glob("*.py")} - {"__init__", "__main__"}
    assert set(methods.METHODS) == files
    assert {card.name for card in methods.cards()} == set(methods.METHODS)


def test_the_drop_in_needs_only_torch_and_numpy() -> None:
    """Guard and optimizers work where none of the trainer's packages is installed."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'pyarrow', 'tokenizers', 'rich', 'plotly'):\n"
        "    sys.modules[name] = None\n"
        "import torch, poise\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "guard = poise.Guard.for_run(model, optimizer)\n"
        "loss = model(torch.ones(1, 2)).sum()\n"
        "loss.backward()\n"
        "sys.exit(not guard.allows(loss))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
