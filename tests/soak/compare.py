"""Whether two runs left the same: weights, moments and averages bit for bit, the numbers of every step, the
export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from visft_ds.checkpoint.format import newest_checkpoint, saved_steps
from visft_ds.monitor.metrics import read_metrics
from visft_ds.run.folder import locked
from visft_ds.run_files import EXPORT_RECORD_FILE, METRICS_FILE

#: What may differ between two records of a step: times, and what the loader did since its start.
_OF_THE_MOMENT = ("time", "images_per_second", "memory/", "data_wait_seconds", "data_seconds/")


def differences(reference: Path, run: Path, total_steps: int) -> list[str]:
    """What is different in `run`, or wrong with it; nothing where it is the undisturbed run."""
    return [
        *_of_checkpoints(reference / "checkpoints", run / "checkpoints", total_steps),
        *_of_exports(reference / "export", run / "export"),
        *_of_records(reference / METRICS_FILE, run / METRICS_FILE, total_steps),
        *_left_behind(run),
    ]


def _of_checkpoints(reference: Path, run: Path, total_steps: int) -> Iterator[str]:
    if saved_steps(reference) != saved_steps(run):
        yield f"checkpoints of steps {saved_steps(run)}, expected {saved_steps(reference)}"
    (one, _), (other, skipped) = newest_checkpoint(reference), newest_checkpoint(run)
    assert one is not None and one.step == total_steps, one
    yield from skipped
    if other is None or other.step != total_steps:
        yield f"the newest checkpoint is {other and other.path}, expected step {total_steps}"
        return
    expected, found = one.load(), other.load()
    if (expected.updates, expected.loss_scale) != (found.updates, found.loss_scale):
        yield f"{found.updates} updates, expected {expected.updates}"
    parts = {
        "parameters": (expected.parameters, found.parameters),
        "moments": (expected.moments, found.moments),
    }
    for part, (those, these) in parts.items():
        if those.keys() != these.keys():
            yield f"{part}: other names: {sorted(those.keys() ^ these.keys())}"
        for name in those.keys() & these.keys():
            if not torch.equal(those[name], these[name]):
                yield f"{part} {name}: up to {(those[name] - these[name]).abs().max():.3g} apart"


def _of_exports(reference: Path, run: Path) -> Iterator[str]:
    expected, found = (
        {
            path.relative_to(root): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name != EXPORT_RECORD_FILE  # says when and where
        }
        for root in (reference, run)
    )
    for path in sorted(expected.keys() ^ found.keys()):
        yield f"export/{path}: {'missing' if path in expected else 'there, not expected'}"
    for path in sorted(expected.keys() & found.keys()):
        if expected[path] != found[path]:
            yield f"export/{path}: other bytes"


def _of_records(reference: Path, run: Path, total_steps: int) -> Iterator[str]:
    """Each step once, with the same losses, rates and norms; each evaluation once, with the same numbers."""
    (expected, expected_val), (found, found_val) = _records(reference), _records(run)
    steps = [record["step"] for record in found]
    if steps != list(range(1, total_steps + 1)):
        twice = [step for step, count in Counter(steps).items() if count > 1]
        missing = sorted(set(range(1, total_steps + 1)) - set(steps))
        yield f"metrics.jsonl: {len(steps)} steps, missing {missing[:8]}, more than once {twice[:8]}"
    by_step = {record["step"]: record for record in found}
    other = [record["step"] for record in expected if by_step.get(record["step"], record) != record]
    if other:
        yield f"metrics.jsonl: {len(other)} steps with other numbers, the first is {other[0]}"
    if Counter(record["step"] for record in found_val) != Counter(record["step"] for record in expected_val):
        yield f"metrics.jsonl: evaluations of {[record['step'] for record in found_val]}"
    judged = {record["step"]: record for record in found_val}
    other = [record["step"] for record in expected_val if judged.get(record["step"], record) != record]
    if other:
        yield f"metrics.jsonl: evaluations with other numbers: {other}"


def _records(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(steps, evaluations) without what is of the moment."""
    steps, evaluations = [], []
    for record in read_metrics(path):
        lasting = {name: value for name, value in record.items() if not name.startswith(_OF_THE_MOMENT)}
        if "loss/loss" in record:
            steps.append(lasting)
        elif any(name.startswith("val/") for name in record):
            evaluations.append(lasting)
    return steps, evaluations


def _left_behind(run: Path) -> Iterator[str]:
    for path in sorted(run.rglob("*")):
        if path.suffix in (".tmp", ".old") or ".tmp-" in path.name:
            yield f"left behind: {path.relative_to(run)}"
    try:
        with locked(run, patience=0):
            pass
    except ValueError as error:
        yield str(error)
