"""Messages never assume that the current folder is a checkout: commands in them are those that are installed."""

from __future__ import annotations

import ast
import re

from tests.test_layering import own_syntax

#: Modules whose strings may name the scripts of a checkout, and why.
MAY = {
    "visft_ds/config/removed.py": "the name under which a removed command is looked up",
    "visft_ds/experiments/ablations/plan.py": "commands of the plan, run from the checkout",
    "visft_ds/experiments/ablations/scales.py": "the same",
    "visft_ds/resilience/supervisor.py": "recognises the command that it supervises",
}


def usage_texts(tree: ast.Module) -> set[int]:
    """Strings of a help: docstrings, and constants that a parser prints below its flags."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found |= {id(part) for part in ast.walk(node.body[0])}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(("EPILOG", "USAGE")):
            found |= {id(part) for part in ast.walk(node.value)}
    return found


def test_printed_texts_name_installed_commands() -> None:
    found = []
    for name, tree in own_syntax().items():
        if name in MAY or name.endswith("/cli.py"):  # flags and their help are printed under the name that was called
            continue
        usage = usage_texts(tree)
        found += [
            f"{name}:{node.lineno}: {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in usage
            if re.search(r"\b(tools|launchers)/", node.value)
        ]
    assert found == []
