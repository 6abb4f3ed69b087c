"""The shape of the code: imports point downwards, packages stay in their rooms."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "visft_ds"
#: Modules that stand on another floor than the rest of their room.
APART = (
    "planner.trace",
    "resilience.processes",
    "resilience.stop",
    "run.folder",
    "interop.cli",
    "interop.command",
)
#: Package -> the only places that may import it.
RESERVED = {
    "deepspeed": ("parallel",),
    "webdataset": ("data",),
    "timm": ("interop", "pretrained", "models.timm_backbone", "evals.judge"),
    "peft": ("interop",),
    "open_clip": ("interop", "evals.judge"),
    "huggingface_hub": ("interop", "pretrained"),
    "triton": ("ops",),
    "flash_attn": ("ops",),
}
CODE = sorted(path for folder in (PACKAGE, "tools", "launchers") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit(module: str) -> str | None:
    """Room or module that a dotted name of the package belongs to; None for the package itself and other
    packages.
    """
    package, _, inner = module.partition(".")
    apart = [name for name in APART if inner == name or inner.startswith(f"{name}.")]
    first = inner.split(".")[0]
    known = first and ((ROOT / PACKAGE / first).is_dir() or (ROOT / PACKAGE / f"{first}.py").is_file())
    return None if package != PACKAGE or not known else apart[0] if apart else first


def test_imports_point_down() -> None:
    uses: dict[str, dict[str, str]] = {}
    for path in CODE:
        own = unit(module_name(path))
        for target in imports(path) if own else ():
            other = unit(target)
            if own is not None and other is not None and other != own:
                uses.setdefault(own, {}).setdefault(other, f"{module_name(path)} imports {target}")
    try:
        assert len(list(TopologicalSorter(uses).static_order())) > 20
    except CycleError as error:
        ring = error.args[1]
        pytest.fail("\n".join(uses[upper][lower] for lower, upper in pairwise(ring)))


def test_reserved_packages_stay_in_their_rooms() -> None:
    wrong = []
    for path in CODE:
        inner = module_name(path).partition(".")[2]
        for package in {target.split(".")[0] for target in imports(path)} & RESERVED.keys():
            if not any(inner == place or inner.startswith(f"{place}.") for place in RESERVED[package]):
                wrong.append(f"{module_name(path)} imports {package}")
    assert wrong == []
