"""The names that users may rely on: their signatures, the reference page, and what importing the package costs.

After a deliberate change, `python -m tests.test_api --write` writes tests/golden/api.txt and docs/api.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import visft_ds

ROOT = Path(__file__).parents[1]
SNAPSHOT, PAGE = ROOT / "tests/golden/api.txt", ROOT / "docs/api.md"
HEAD = """# Python reference

What `import visft_ds` offers (`AnyPath`: a text or a `Path`), written from the docstrings;
[getting started](getting-started.md#train-and-evaluate-from-python) has examples.
"""
#: Names that pages tell users to import from the module that has them.
BY_MODULE = (
    "visft_ds.config.resolve",
    "visft_ds.data.open_webdataset.open_split",
    "visft_ds.models.eva_vit.build_backbone",
)


class Bare(str):
    """An annotation that a signature shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def signature(thing: Any) -> inspect.Signature:
    """Parameters and result of a function, or of making an object, with annotations as they are written."""
    found = inspect.signature(thing)
    texts = [p.replace(annotation=_bare(p.annotation)) for p in found.parameters.values()]
    result = inspect.Signature.empty if inspect.isclass(thing) else _bare(found.return_annotation)
    return found.replace(parameters=texts, return_annotation=result)


def _bare(annotation: Any) -> Any:
    return Bare(annotation) if isinstance(annotation, str) else annotation


def own_functions(kind: type) -> dict[str, Any]:
    """Public methods and properties that a class defines itself, in the order of the source."""
    wanted = (property, staticmethod, classmethod)
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, wanted))
    }


def lines_of(name: str, thing: Any) -> Iterator[str]:
    """A name with its signature; of a class also those of its methods, and the names of its properties."""
    if not inspect.isclass(thing):
        yield f"{name}{signature(thing)}"
        return
    yield f"class {name}{signature(thing) if dataclasses.is_dataclass(thing) else ''}"
    for inner, value in own_functions(thing).items():
        if isinstance(value, property):
            yield f"{name}.{inner}: {value.fget.__annotations__['return']}"
        else:
            yield f"{name}.{inner}{signature(getattr(thing, inner))}"


def public() -> dict[str, Any]:
    """Every name by which users import something -> what it is."""
    names = {name: getattr(visft_ds, name) for name in sorted(visft_ds._PUBLIC)}
    parts = {name: name.rpartition(".") for name in BY_MODULE}
    return names | {name: getattr(import_module(module), last) for name, (module, _, last) in parts.items()}


def snapshot() -> str:
    return "".join(line + "\n" for name, thing in public().items() for line in lines_of(name, thing))


def reference() -> str:
    """The page, from docstrings: functions first, then the objects they take and return."""
    functions = sorted(public().items(), key=lambda item: ("." in item[0], inspect.isclass(item[1])))
    return HEAD + "".join(part for name, thing in functions for part in _described(name, thing))


def _described(name: str, thing: Any) -> Iterator[str]:
    yield f"\n## {name}\n\n"
    if inspect.isclass(thing):
        text = _fields(thing) if dataclasses.is_dataclass(thing) else ""
        yield f"{inspect.getdoc(thing)}\n" + (f"\n```python\n{text}```\n" if text else "")
        for inner, value in own_functions(thing).items():
            shown = "" if isinstance(value, property) else str(signature(getattr(thing, inner))).replace("self, ", "")
            head = f"`.{inner}{shown}`:\n"
            if len(head) > 121:
                head = (
                    "```python\n" + _wrapped(f".{inner}", getattr(thing, inner)).replace("    self,\n", "") + "```\n\n"
                )
            yield f"\n{head}{inspect.getdoc(value)}\n"
        return
    yield f"```python\n{_wrapped(name, thing)}```\n\n{_as_markdown(inspect.getdoc(thing) or '')}"


def _wrapped(name: str, function: Any) -> str:
    """The signature, in lines of at most 120 characters."""
    shown = signature(function)
    line = f"{name}{shown}\n"
    if len(line) <= 121:
        return line
    rows = [str(parameter) for parameter in shown.parameters.values()]
    by_name = [p.kind is inspect.Parameter.KEYWORD_ONLY for p in shown.parameters.values()]
    if any(by_name):
        rows.insert(by_name.index(True), "*")
    return f"{name}(\n" + "".join(f"    {row},\n" for row in rows) + f") -> {shown.return_annotation}\n"


def _as_markdown(doc: str) -> str:
    """A docstring with its sections ("Args:", "Raises:") as lists."""
    lines = []
    for line in inspect.cleandoc(doc).splitlines():
        if line in ("Args:", "Raises:", "Returns:"):
            lines += [f"*{line[:-1]}*", ""]
        elif line.startswith("    ") and not line.startswith("     ") and ": " in line:
            name, _, text = line.strip().partition(": ")
            lines.append(f"- `{name}`: {text}")
        else:
            lines.append(line.strip() if not line.startswith("        ") else "  " + line.strip())
    return "\n".join(lines) + "\n"


def _fields(kind: type) -> str:
    """The fields of a dataclass with their comments, as they stand in the source."""
    body = inspect.getsource(kind).partition('"""')[2].partition('"""\n')[2]
    fields = body.partition("    @property")[0].partition("    def ")[0]
    return textwrap.dedent(fields).strip() + "\n"


def test_public_names_have_the_recorded_signatures() -> None:
    assert snapshot() == SNAPSHOT.read_text(encoding="utf-8"), "python -m tests.test_api --write records them anew"


def test_the_reference_is_that_of_the_docstrings() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "python -m tests.test_api --write"


def test_public_names_are_seen_and_others_refused() -> None:
    assert set(visft_ds._PUBLIC) <= set(dir(visft_ds))
    for name, module in visft_ds._PUBLIC.items():
        assert getattr(visft_ds, name).__module__ == module, "name the module that defines it"
        assert not hasattr(visft_ds, "__path__") or not (ROOT / "visft_ds" / f"{name}.py").exists(), "would hide it"
    with pytest.raises(AttributeError, match="no attribute 'fti'"):
        visft_ds.fti  # noqa: B018


LOOK = """
import sys
before = set(sys.modules)
import visft_ds
dir(visft_ds)
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"visft_ds"})
visft_ds.fit, visft_ds.Callback
print("torch" in sys.modules)
"""


def test_importing_the_package_imports_nothing_of_others() -> None:
    """Below 0.05 s: a fraction of what the smallest library on top would take. `fit` is there without torch."""
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.stdout.splitlines() == ["", "False"], done.stdout + done.stderr


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        SNAPSHOT.write_text(snapshot(), encoding="utf-8")
        PAGE.write_text(reference(), encoding="utf-8")
    print(snapshot(), end="")
