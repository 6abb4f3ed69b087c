"""Runs that release 0.1 wrote (tests/golden/runs-0.1): each is evaluated and merged, those of stage 1 are resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.freeze import entries
from tests.freeze.cases import Case, Outcome, Words
from tests.freeze.entries import Entries

FOLDER = Path(__file__).parents[1] / "golden/runs-0.1"
RUNS = ("stage1", "qv", "linears", "dora", "full", "convnext1", "convnext2", "pipeline")
#: One of each kind of file, with those they need: the fast tests read these.
FEW = ("stage1", "dora", "convnext1", "convnext2")
#: Stage 2 of release 0.1 shared its steps out by ratios, which are no settings any more.
RESUMED = ("stage1", "convnext1")


def cases(runs: Sequence[str] = RUNS) -> list[Case]:
    """A case for each run."""
    return [_case(name) for name in runs]


def norms(path: Path) -> Entries:
    """L2 norm of every tensor (fp32) of a .safetensors file: hashes would be those of one kind of processor."""
    found: Entries = {}
    for name, facts, content in entries.raw_tensors(path):
        assert facts["dtype"] == "F32", f"{path}: {name} is {facts['dtype']}"
        found[name] = float(np.linalg.norm(np.frombuffer(content, np.float32).astype(np.float64)))
    return found


def _resume(run: Path) -> Words:
    """The command that wrote a run, as its record has it."""
    command: list[str] = json.loads((run / "run.json").read_text(encoding="utf-8"))["command"]
    return ("launchers/train.py", *command[1:])


def _case(name: str) -> Case:
    heads = {"convnext2": "convnext1", "stage1": "", "convnext1": ""}.get(name, "stage1")
    merged = None if not heads else Path(f"{name}-merged.safetensors")
    commands: list[Words] = [("tools/evaluate.py", "--run", name, "--out", f"{name}-evaluation", "--images", "0")]
    if merged is not None:
        commands.append(("tools/merge_lora.py", "--adapter", name, "--out", str(merged), "--verify"))
    if name in RESUMED:
        commands.append((*_resume(FOLDER / name), "--resume", "must"))

    def before() -> None:
        for folder in ("shards", heads, name):
            if folder and not Path(folder).exists():
                shutil.copytree(FOLDER / folder, folder)
        metrics = Path(name, "metrics.jsonl")
        steps = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics.write_text("".join(steps[:2]), encoding="utf-8")  # the others come from the resume or not at all

    def read(outcomes: Sequence[Outcome]) -> Entries:
        found = _evaluated(Path(f"{name}-evaluation"))
        if merged is not None:
            found |= {f"merged/{key}": value for key, value in norms(merged).items()}
        if name not in RESUMED:
            return found
        steps = entries.metrics(Path(name, "metrics.jsonl"))
        found |= {key: value for key, value in steps.items() if "/loss/" in key}
        saved = norms(Path(name, "checkpoints/step_00000004/parameters.safetensors"))
        return found | {f"step4/{key}": value for key, value in saved.items()}

    needs = tuple(() if not heads else (heads,))
    return Case(name, tuple((words,) for words in commands), read, needs, before)


def _evaluated(folder: Path) -> Entries:
    """Numbers of an evaluation, and what of the predictions tells it from another one where nothing is found yet."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    found: Entries = {f"evaluation/{name}": value for name, value in metrics.items() if name.count("/") == 1}
    for path in sorted(folder.glob("*_results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        found[f"evaluation/{path.stem}/count"] = len(results)
        if results and "score" in results[0]:
            found[f"evaluation/{path.stem}/score"] = sum(result["score"] for result in results) / len(results)
    return found
