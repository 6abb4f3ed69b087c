"""The training command under the pipeline engine: the same run as under ZeRO, evaluation and resuming
included.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks
from tests.tiny import STEPS, THREE, command, losses, records, trained

pytestmark = pytest.mark.slow


#: Without dropout, whose masks depend on the rank; one evaluation at the end, on the training pictures.
SETTINGS: dict[str, object] = {
    "visft.mode": "sampled",
    "visft.tasks.detection.head.dropout": 0.0,
    "visft.tasks.captioning.head.dropout": 0.0,
    "visft.tasks.captioning.decoding.max_length": 5,
    "visft.run.eval_every": STEPS,
    "visft.run.visualizations": 1,
    "visft.data.val": "train",
}


def run(
    shards: Path, out: Path, *engine: str, world: int, stage: int = 1, heads: Path | None = None
) -> list[str]:
    """Train to the end; what the ranks printed."""
    extra = {**SETTINGS, **({"visft.heads.path": str(heads), "visft.lora.rank": 2} if heads else {})}
    return run_ranks(["launchers/train.py", *engine, *command(shards, out, stage=stage, extra=extra)], world)


def judged(out: Path) -> dict[str, float]:
    """The numbers of the evaluation."""
    return {k: v for record in records(out) for k, v in record.items() if k.startswith("val/")}


@pytest.fixture(scope="module")
def zero(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero") / "stage1"
    run(shards, out, world=2)
    return out


@pytest.mark.parametrize(("stages", "world"), [(2, 2), (3, 3), (2, 4)])
def test_the_same_run_as_under_zero(
    shards: Path, zero: Path, tmp_path: Path, stages: int, world: int
) -> None:
    """Losses by name, the numbers of the evaluation, names and shapes of the exported heads."""
    out = tmp_path / "stage1"
    printed = run(shards, out, "--engine=pipeline", f"--set=pipeline.stages={stages}", world=world)
    assert f"pipeline(s) of {stages} stages, " in printed[0] and "of the operations" in printed[0]
    assert len(losses(out)) == STEPS
    for one, other in zip(losses(out), losses(zero), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)  # eight steps of Adam on rounding
    assert {"val/box/AP", "val/caption/CIDEr"} <= judged(out).keys()
    assert judged(out) == pytest.approx(judged(zero), abs=1e-3)  # ranks of near ties may change places
    parameters, reference = trained(out), trained(zero)
    assert parameters.keys() == reference.keys()
    for task in THREE:
        exported, other = (load_file(folder / "export" / f"{task}.safetensors") for folder in (out, zero))
        assert exported.keys() == other.keys()
        assert all(tensor.shape == other[name].shape for name, tensor in exported.items())


def test_adapters_train_and_a_run_changes_its_engine(shards: Path, zero: Path, tmp_path: Path) -> None:
    """Stage 2: begun as a pipeline and ended under ZeRO-2, and the other way round."""
    ends = {}
    orders = {"straight": ("zero1", "zero1"), "from": ("pipeline", "zero2"), "to": ("zero2", "pipeline")}
    for name, (first, second) in orders.items():
        out = tmp_path / name
        run(shards, out, f"--engine={first}", world=2, stage=2, heads=zero / "export")
        if first != second:
            shutil.rmtree(out / "checkpoints" / f"step_{STEPS:08d}")
            printed = run(shards, out, f"--engine={second}", world=2, stage=2, heads=zero / "export")
            assert f"{STEPS}, from step {STEPS // 2}" in printed[0]
        ends[name] = trained(out)
    for name in ("from", "to"):
        for key, tensor in ends["straight"].items():
            # Adam makes whole steps of the rounding of gradients that are nearly zero: rate x steps is the
            # most.
            torch.testing.assert_close(ends[name][key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
