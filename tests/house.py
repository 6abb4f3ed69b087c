"""Size and reach of the code, as `tests/house.json` holds them: numbers that may fall and never rise.

    python -m tests.house           # measured beside recorded
    python -m tests.house --write   # record what was measured

The core is what training can reach by imports; experiments are `experiments/`; wings are the rest of the package.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.test_layering import CODE, PACKAGE, ROOT, imports, module_name

RECORD = Path(__file__).with_name("house.json")
MODULES = {module_name(path): path for path in CODE if path.is_relative_to(ROOT / PACKAGE)}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@cache
def imported(module: str) -> frozenset[str]:
    """Modules of the package that one imports anywhere, with the packages around them."""
    found = set()
    for target in imports(MODULES[module]):
        parts = target.split(".")
        found.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return frozenset(found & MODULES.keys())


def core() -> set[str]:
    """Modules that the training command can reach."""
    waiting, found = [f"{PACKAGE}.launch"], set()
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += imported(module) if module != PACKAGE else ()  # its public names are imported on demand
    return found


def measure_size() -> dict[str, int]:
    """Lines by zone, files of the package, lines of the tests, and the loop's imports and lines."""
    inside = core()
    wings = [name for name in MODULES if name not in inside and not name.startswith(f"{PACKAGE}.experiments")]
    train = MODULES[f"{PACKAGE}.train"]
    own = [name for name in imports(train) if name.split(".")[0] == PACKAGE]
    modules = {name if name in MODULES else name.rpartition(".")[0] for name in own}
    return {
        "package lines": sum(lines(path) for path in MODULES.values()),
        "package files": len(MODULES),
        "core lines": sum(lines(MODULES[name]) for name in inside),
        "wing lines": sum(lines(MODULES[name]) for name in wings),
        "tools lines": sum(lines(path) for path in CODE if path not in MODULES.values()),
        "test lines": sum(lines(path) for path in (ROOT / "tests").rglob("*.py")),
        "imports of the package in train.py": len(modules),
        "lines of train.py": lines(train),
    }


def measure_reach() -> dict[str, int]:
    """Functions, lines, files and modules before the first loss of the debug model (tools/reach.py)."""
    command = [sys.executable, str(ROOT / "tools" / "reach.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout, done.stderr
    numbers = json.loads(done.stdout)
    return {f"{name} to the first loss": numbers[name] for name in ("functions", "lines", "files", "modules")}


def shape() -> dict[str, str]:
    """Numbers that are printed and not limited."""
    functions = [
        (node, path)
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    total = sum(lines(path) for path in MODULES.values())
    importers = {name: sum(name in imported(other) for other in MODULES if other != name) for name in MODULES}
    return {
        "functions per 1,000 lines": f"{1000 * len(functions) / total:.0f}",
        "functions of more than 100 lines": str(sum((n.end_lineno or 0) - n.lineno >= 100 for n, _ in functions)),
        "files of more than 500 lines": str(sum(lines(path) > 500 for path in MODULES.values())),
        "modules with one importer": str(sum(count == 1 for count in importers.values())),
    }


def main(argv: list[str]) -> int:
    measured = {**measure_size(), **measure_reach()}
    recorded = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name, value in measured.items():
        print(f"{name:40} {value:8,}   recorded {recorded.get(name, 0):,}")
    for name, text in shape().items():
        print(f"{name:40} {text:>8}   not limited")
    if argv == ["--write"]:
        RECORD.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
