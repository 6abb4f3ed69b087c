"""The shape of the code: who imports whom, and what no file may contain.

Floors are computed: a unit stands one floor above the highest it imports. `python -m tests.test_layering` prints the
picture that CONTRIBUTING.md shows.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "visft_ds"

#: Modules that stand on another floor than the rest of their room; every other unit is a room, or a module outside any.
APART = (
    "parallel.distributed",
    "resilience.processes",
    "resilience.errors",
    "resilience.signals",
    "run.folder",
    "tasks.registry",
    "interop.cli",
    "interop.command",
)
#: Package -> the only places of visft_ds, tools and launchers that may import it.
RESERVED = {
    "deepspeed": ("visft_ds.parallel",),
    "webdataset": ("visft_ds.data", "visft_ds.profiling.data_compare"),
    "timm": (
        "visft_ds.interop",
        "visft_ds.pretrained",
        "visft_ds.models.timm_backbone",
        "visft_ds.evals.benchmarks",
        "visft_ds.profiling.peft",
    ),
    "peft": ("visft_ds.interop", "visft_ds.profiling.peft"),
    "open_clip": ("visft_ds.interop", "visft_ds.evals.benchmarks", "visft_ds.experiments.contrastive"),
    "huggingface_hub": ("visft_ds.interop", "visft_ds.pretrained"),
    "triton": ("visft_ds.ops",),
    "flash_attn": ("visft_ds.ops",),
    "jinja2": ("visft_ds.evals.page",),
    "matplotlib": ("visft_ds.evals.charts", "visft_ds.experiments.ablations.write"),
}
#: Rooms and modules whose functions may take a run's whole configuration: where it is resolved, planned and turned into
#: parts, and commands over a run. All others are handed what they need of it.
CONFIGURED = (
    *("config", "prepare", "run", "planner", "train", "launch", "api"),
    *("evals.evaluate", "evals.model", "interop.command", "predict.model", "profiling", "experiments"),
    "resilience.nan_debug",
)
CODE = sorted(path for folder in (PACKAGE, "tools", "launchers") for path in (ROOT / folder).rglob("*.py"))
#: Commands and the modules that are imported when one of them is given.
TABLE = ROOT / PACKAGE / "cli.py"
#: A docstring begins with what the thing is or does, not with a question about it.
QUESTION = re.compile(r"\s*(What|Which|Whether|How|Where|One)\b")
TEXT_SUFFIXES = {".py", ".md", ".json", ".toml", ".txt", ".sh", ".sbatch", ".example", ".cfg"}
SKIPPED_FOLDERS = {"data", "runs", "demo", "weights", "build", "dist", "__pycache__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names a file imports anywhere, also inside functions; `from a import b` gives a.b. TABLE has texts."""
    for node in ast.walk(syntax(path)):
        if path == TABLE and isinstance(node, ast.Constant) and str(node.value).startswith(f"{PACKAGE}."):
            yield str(node.value)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, not relative"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit(module: str) -> str | None:
    """The unit a dotted name of the package belongs to; None for the package itself."""
    inner = module.removeprefix(PACKAGE).removeprefix(".")
    apart = [name for name in APART if inner == name or inner.startswith(f"{name}.")]
    first = inner.split(".")[0]
    known = (ROOT / PACKAGE / first).is_dir() or (ROOT / PACKAGE / f"{first}.py").is_file()
    return apart[0] if apart else first if first and known else None


@cache
def uses() -> dict[str, dict[str, str]]:
    """Unit -> the units it imports, each with the first import that says so."""
    found: dict[str, dict[str, str]] = {}
    for path in (path for path in CODE if path.is_relative_to(ROOT / PACKAGE)):
        module = module_name(path)
        own = unit(module)
        if own is None:
            continue
        below = found.setdefault(own, {})
        for target in imports(path):
            other = unit(target) if target.split(".")[0] == PACKAGE else None
            if other is not None and other != own:
                below.setdefault(other, f"{module} imports {target}")
    return found


def floors() -> list[list[str]]:
    """Units by floor, lowest first.

    Raises:
        CycleError: units that import each other.
    """
    heights: dict[str, int] = {}
    for name in TopologicalSorter(uses()).static_order():
        heights[name] = 1 + max((heights[below] for below in uses().get(name, ())), default=-1)
    return [sorted(name for name in heights if heights[name] == floor) for floor in range(max(heights.values()) + 1)]


def picture() -> str:
    """The floors as text, highest first."""
    return "\n".join(f"{number:2}  {'  '.join(names)}" for number, names in reversed(list(enumerate(floors()))))


def test_imports_point_down() -> None:
    try:
        assert len(floors()) > 5
    except CycleError as error:
        ring = error.args[1]
        steps = [uses()[upper][lower] for lower, upper in pairwise(ring)]
        pytest.fail("these units import each other:\n" + "\n".join(steps))


def test_contributing_shows_the_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert picture() in text, f"CONTRIBUTING.md shows other floors; they are now:\n{picture()}"


def test_units_that_stand_apart_exist() -> None:
    modules = {module_name(path) for path in CODE}
    assert [name for name in APART if f"{PACKAGE}.{name}" not in modules] == []


def test_nothing_imports_experiments() -> None:
    """Experiments are programs on top; only command lines may know them, lazily."""
    wrong = [below["experiments"] for name, below in uses().items() if "experiments" in below and name != "cli"]
    assert wrong == []


def test_the_package_does_not_import_its_tools() -> None:
    outside = ("tools", "launchers", "tests")
    wrong = [
        f"{module_name(path)} imports {target}"
        for path in CODE
        for target in imports(path)
        if target.split(".")[0] in outside
    ]
    assert wrong == []


def test_reserved_packages_stay_where_they_belong() -> None:
    wrong = []
    for path in CODE:
        name = module_name(path)
        for target in {target.split(".")[0] for target in imports(path)} & RESERVED.keys():
            if not any(name == place or name.startswith(f"{place}.") for place in RESERVED[target]):
                wrong.append(f"{name} imports {target}; allowed in {', '.join(RESERVED[target])}")
    assert wrong == []


def test_no_file_is_a_drawer_for_leftovers() -> None:
    assert [str(path) for path in CODE if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def is_broad(handler: ast.ExceptHandler) -> bool:
    """Catches everything and does not raise it again."""
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(kind is None or (isinstance(kind, ast.Name) and kind.id.endswith("Exception")) for kind in kinds)
    last = handler.body[-1]
    return broad and not (isinstance(last, ast.Raise) and last.exc is None)


def is_lenient(call: ast.Call) -> bool:
    """`strict=False`, except for zip, where it is the way to say that lengths differ on purpose."""
    given = [word.value for word in call.keywords if word.arg == "strict"]
    lenient = any(isinstance(value, ast.Constant) and value.value is False for value in given)
    return lenient and not (isinstance(call.func, ast.Name) and call.func.id == "zip")


def test_nothing_is_tolerated_in_silence() -> None:
    """No `strict=False`, no except that swallows everything, no unfinished code."""
    wrong = []
    for path in CODE:
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Call) and is_lenient(node):
                wrong.append(f"{path}:{node.lineno}: strict=False")
            elif isinstance(node, ast.ExceptHandler) and is_broad(node):
                wrong.append(f"{path}:{node.lineno}: broad except")
            elif isinstance(node, ast.Name) and node.id == "NotImplementedError":
                wrong.append(f"{path}:{node.lineno}: unfinished")
        if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8")):
            wrong.append(f"{path}: a note to finish something")
    assert wrong == []


def questions(tree: ast.Module) -> list[str]:
    """First lines of the docstrings that begin with a question word, or with "One"."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text.splitlines()[0] for text in texts if QUESTION.match(text)]


def own_syntax() -> dict[str, ast.Module]:
    """File of the package -> its syntax."""
    return {str(path.relative_to(ROOT)): syntax(path) for path in CODE if path.is_relative_to(ROOT / PACKAGE)}


def test_docstrings_begin_with_a_noun_or_an_imperative_verb() -> None:
    found = {name: first for name, tree in own_syntax().items() if (first := questions(tree))}
    assert found == {}


def repeated_classes(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Name of a class -> the files that define it, for names that are defined more than once; private names too."""
    places: dict[str, list[str]] = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


def handed_a_whole_configuration(tree: ast.AST) -> list[str]:
    """Functions of a module with a parameter that is a run's whole configuration."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
        given = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        named = " ".join(ast.unparse(one.annotation) for one in given if one.annotation is not None)
        if re.search(r"\b(ResolvedConfig|VisftConfig)\b", named):
            found.append(function.name)
    return found


def test_only_preparing_planning_and_commands_take_a_whole_configuration() -> None:
    allowed = tuple(f"{PACKAGE}.{name}." for name in CONFIGURED)
    for path in (path for path in CODE if path.is_relative_to(ROOT / PACKAGE)):
        if not f"{module_name(path)}.".startswith(allowed):
            assert handed_a_whole_configuration(syntax(path)) == [], path


def test_class_names_are_unique() -> None:
    """A name in a traceback or a search belongs to one class."""
    assert repeated_classes(own_syntax()) == {}


def project_texts() -> Iterator[Path]:
    for path in sorted(ROOT.iterdir()):
        if path.name.endswith(".egg-info") or path.name in SKIPPED_FOLDERS:
            continue
        if path.is_dir() and (not path.name.startswith(".") or path.name == ".ci"):
            files = (file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
            yield from (file for file in files if file.suffix in TEXT_SUFFIXES or not file.suffix)
        elif path.is_file() and (path.suffix in TEXT_SUFFIXES or path.name in ("Makefile", ".gitignore")):
            yield path


def test_no_text_names_a_folder_of_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"(^|[^A-Za-z])/(work|root)/")
    wrong = []
    for path in project_texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if machine.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert wrong == []


def test_the_rules_catch_what_they_are_for(tmp_path: Path) -> None:
    """A rule that never fires would let everything pass."""
    calls = [ast.parse(text, mode="eval").body for text in ("m.load(x, strict=False)", "zip(a, b, strict=False)")]
    assert [isinstance(call, ast.Call) and is_lenient(call) for call in calls] == [True, False]
    bad = "try:\n    f()\nexcept (OSError, Exception):\n    pass\ntry:\n    g()\nexcept Exception:\n    raise\n"
    handlers = [node for node in ast.walk(ast.parse(bad)) if isinstance(node, ast.ExceptHandler)]
    assert [is_broad(handler) for handler in handlers] == [True, False]
    assert unit("visft_ds.parallel.distributed.rank") == "parallel.distributed"
    assert unit("visft_ds.parallel.engine") == "parallel" and unit("visft_ds") is None
    order = [name for floor in floors() for name in floor]
    assert order.index("models") < order.index("prepare") < order.index("train")
    tree = ast.parse('"""What it is."""\nclass Whole:\n    def f(self):\n        """One for all."""\n')
    assert questions(tree) == ["What it is.", "One for all."]
    assert questions(ast.parse('"""Whatever comes."""\ndef f():\n    """Which\'s end."""\n')) == ["Which's end."]
    whole = ast.parse("def f(config: ResolvedConfig | None): ...\ndef g(run: RunConfig, *, h: list[VisftConfig]): ...")
    assert handed_a_whole_configuration(whole) == ["f", "g"]
    assert handed_a_whole_configuration(ast.parse("def f(config: RunConfig) -> ResolvedConfig: ...")) == []
    twice = ast.parse("class A: pass\ndef f():\n    class B: pass\n")
    assert repeated_classes({"x": twice, "y": ast.parse("class B: pass")}) == {"B": ["x", "y"]}
    (tmp_path / "f.py").write_text("def f():\n    from visft_ds.train import main\n")
    assert list(imports(tmp_path / "f.py")) == ["visft_ds.train.main"]


if __name__ == "__main__":
    print(picture())
