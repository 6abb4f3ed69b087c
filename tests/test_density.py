"""Plain code, measured: syntax nodes for each line of code in every room, and three ways of packing lines."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "visft_ds"
DENSEST = 7.4  #: nodes a line, without Load, Store and Del; torchtitan has 3.8, DETR 6.3, scikit-learn 6.2


def _lines_of_code(source: str, tree: ast.AST) -> int:
    """Number of lines with code: no blank ones, comments and docstrings."""
    lines = {
        number
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def _is_packed(node: ast.AST) -> bool:
    """Return True for values assigned at once that are no swap, a loop over a conditional expression, or nested
    ones.
    """
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
            return False
        names = {ast.unparse(name) for name in target.elts}
        return names.isdisjoint(ast.unparse(value) for value in node.value.elts)
    if isinstance(node, ast.For | ast.comprehension):
        return isinstance(node.iter, ast.IfExp)
    return isinstance(node, ast.IfExp) and sum(isinstance(inner, ast.IfExp) for inner in ast.walk(node)) > 1


def test_every_room_is_plain_code() -> None:
    nodes: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    packed = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        inner = path.relative_to(PACKAGE)
        room = inner.parts[0] if len(inner.parts) > 1 else "modules"
        everything = list(ast.walk(tree))
        nodes[room] += sum(not isinstance(node, ast.expr_context) for node in everything)
        lines[room] += _lines_of_code(source, tree)
        packed += [f"{inner}:{getattr(node, 'lineno', '')}" for node in everything if _is_packed(node)]
    assert packed == []
    dense = {
        room: round(nodes[room] / lines[room], 2) for room in nodes if nodes[room] > DENSEST * lines[room]
    }
    assert dense == {}
