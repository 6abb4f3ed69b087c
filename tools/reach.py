"""How far is it to the first loss? Counts what runs between the command and the first loss.

    python tools/reach.py                                 # stage 1 of the debug model on a toy set of its own
    python tools/reach.py --stage 2 --data SHARDS ...     # any command of launchers/train.py

Prints, as one line of JSON, the distinct functions of the package entered in any thread until the engine's first
`train_step` returns, their lines, the files they stand in, and the modules of the package that were imported.
"""

import ast
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != ROOT / "tools"]
PACKAGE = str(ROOT / "visft_ds") + os.sep

_seen: set[tuple[str, int, str]] = set()  #: (file, first line, qualified name) of each piece of code that was entered
_stdout = 1


def _on_event(frame: FrameType, event: str, _: Any) -> None:
    code = frame.f_code
    if not code.co_filename.startswith(PACKAGE):
        return
    if event == "call":
        _seen.add((code.co_filename, code.co_firstlineno, getattr(code, "co_qualname", code.co_name)))
    elif event == "return" and code.co_name == "train_step" and "parallel" in Path(code.co_filename).parts:
        sys.setprofile(None)
        _report()


def measure(seen: set[tuple[str, int, str]]) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of functions, lines, files and imported modules; files by room."""
    lengths: dict[tuple[str, int], int] = {}
    for path in {key[0] for key in seen}:
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([line.lineno for line in node.decorator_list], default=node.lineno)
                lengths[path, first] = (node.end_lineno or node.lineno) - node.lineno + 1
    entered = {(path, line) for path, line, name in seen if (path, line) in lengths and "<" not in name.split(".")[-1]}
    files = {path for path, _ in entered}
    numbers = {
        "functions": len(entered),
        "lines": sum(lengths[place] for place in entered),
        "files": len(files),
        "modules": sum(name == "<module>" for _, _, name in seen),
    }
    return numbers, dict(Counter(path.removeprefix(PACKAGE).split(os.sep)[0] for path in files).most_common())


def _report() -> None:
    numbers, rooms = measure(set(_seen))
    os.write(_stdout, json.dumps({**numbers, "files by room": rooms}).encode() + b"\n")
    os._exit(0)


def _train_on_toys(folder: Path) -> int:
    """Count a command that trains stage 1 on 24 drawn pictures."""
    coco, shards = folder / "coco", folder / "shards"
    annotations = coco / "annotations"
    toy = ["--out", coco, "--train", 24, "--val", 1, "--size", 56, "--workers", 1]
    pack = ["build", "--images", coco / "train2017", "--out", shards, "--split", "train"]
    pack += ["--instances", annotations / "instances_train2017.json"]
    pack += ["--captions", annotations / "captions_train2017.json"]
    settings = {
        "scheduler.params.total_num_steps": 4,
        "scheduler.params.warmup_num_steps": 1,
        "visft.run.rehearsal": "false",
    }
    count = ["--stage", 1, "--model", "debug", "--data", shards, "--out", folder / "run"]
    count += [f"--set={name}={value}" for name, value in settings.items()]
    from visft_ds.shards.cli import main as build
    from visft_ds.toy.cli import main as draw

    with contextlib.redirect_stdout(sys.stderr):
        draw([*map(str, toy)])
        build([*map(str, pack)])
    return subprocess.run([sys.executable, __file__, *map(str, count)], check=False).returncode


def main(argv: list[str]) -> int:
    """Train until the first loss is there, and print what that took. Returns only where training ends before it."""
    if not argv:
        with tempfile.TemporaryDirectory() as folder:
            return _train_on_toys(Path(folder))
    global _stdout
    _stdout = os.dup(1)
    os.dup2(2, 1)  # what training prints goes to stderr, the numbers alone to stdout
    threading.setprofile(_on_event)
    sys.setprofile(_on_event)
    from visft_ds.launch import main as train

    return train(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
