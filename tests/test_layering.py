"""The shape of the code: imports point downwards, packages stay in their rooms."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = "visft_ds"
#: Package -> the only places that may import it.
RESERVED = {
    "deepspeed": ("parallel",),
    "webdataset": ("data",),
    "tifffile": ("files", "shards"),
    "pycocotools": ("tasks",),
    "timm": ("interop", "pretrained", "models.timm_backbone", "models.lora", "evals.judge"),
    "peft": ("interop",),
    "open_clip": ("interop", "evals.judge"),
    "huggingface_hub": ("interop", "merge", "pretrained"),
    "triton": ("ops",),
    "flash_attn": ("ops",),
    "flash_attn_interface": ("ops",),
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


def room_of(module: str) -> str | None:
    """Room, or module beside the rooms, that a dotted name of the package belongs to; None for anything else."""
    package, _, inner = module.partition(".")
    room = inner.split(".")[0]
    is_ours = (ROOT / PACKAGE / room).is_dir() or (ROOT / PACKAGE / f"{room}.py").is_file()
    return room if package == PACKAGE and room and is_ours else None


def test_imports_point_down() -> None:
    """Rooms can be put in an order in which each imports earlier ones only: no exception, also inside functions."""
    uses: dict[str, dict[str, str]] = {}
    for path in CODE:
        upper = room_of(module_name(path))
        if upper is None:
            continue
        for target in imports(path):
            lower = room_of(target)
            if lower is not None and lower != upper:
                uses.setdefault(upper, {}).setdefault(lower, f"{module_name(path)} imports {target}")
    try:
        order = list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        ring = error.args[1]
        pytest.fail("\n".join(uses[upper][lower] for lower, upper in pairwise(ring)))
    assert len(order) > 20


@pytest.mark.parametrize(
    ("package", "module", "target"),
    [
        ("torch", "model", "torch"),
        ("deepspeed", "parallel.engine", "deepspeed"),
        ("peft", "interop.export", "peft.PeftModel"),
        ("webdataset", "data.open_webdataset", "webdataset"),
        ("tifffile", "files", "tifffile"),
        ("pycocotools", "tasks.average_precision", "pycocotools.cocoeval"),
        ("flash-attn", "ops.attention", "flash_attn"),
        ("tensorboard", "monitor.metrics", "torch.utils.tensorboard.SummaryWriter"),
    ],
)
def test_each_package_is_imported_where_it_works(package: str, module: str, target: str) -> None:
    """As docs/architecture.md says; it comes with the base installation, flash-attn with an extra."""
    assert target in imports(ROOT / PACKAGE / f"{module.replace('.', '/')}.py")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = project["dependencies"]
    if package == "flash-attn":
        required = project["optional-dependencies"]["gpu"]
    assert package in {Requirement(text).name for text in required}
    assert f"| {package} |" in (ROOT / "docs/architecture.md").read_text()


def test_reserved_packages_stay_in_their_rooms() -> None:
    wrong = []
    for path in CODE:
        inner = module_name(path).partition(".")[2]
        for package in {target.split(".")[0] for target in imports(path)} & RESERVED.keys():
            if not any(inner == room or inner.startswith(f"{room}.") for room in RESERVED[package]):
                wrong.append(f"{module_name(path)} imports {package}")
    assert wrong == []


def imported_at_once(path: Path) -> set[str]:
    """Dotted names that importing a file imports: not those inside functions, nor those for types alone."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.If):
            waiting += ast.iter_child_nodes(node)
    return found


def test_predictions_import_nothing_that_takes_seconds() -> None:
    """Of other packages; torchvision brings torch's compiler along."""
    paths = {module_name(path): path for path in CODE}
    waiting = ["visft_ds.predict.cli", "visft_ds.predict.command"]
    waiting += [
        f"visft_ds.tasks.{task}.spec" for task in ("detection", "segmentation", "captioning", "semantic")
    ]
    seen: set[str] = set()
    packages: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in paths:
            continue
        seen.add(name)
        for target in imported_at_once(paths[name]):
            package = target.split(".")[0]
            packages.add(package)
            if package == PACKAGE:
                waiting += [target, target.rpartition(".")[0]]
    assert len(seen) > 50
    slow = {"torchvision", "deepspeed", "timm", "pycocotools", "webdataset", "scipy", "peft", "tensorboard"}
    assert not packages & slow


def test_the_page_of_a_room_names_its_modules() -> None:
    """The first lines of its `__init__.py`, by which a reader finds where a change goes."""
    for page in (ROOT / PACKAGE).glob("*/**/__init__.py"):
        text = ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or ""
        words = set(re.findall(r"\w+", text))
        modules = {path.stem for path in page.parent.glob("*.py")} - {"__init__"}
        assert not modules - words, page
