"""The plain mask head on several maps in whole runs: resumed, under every engine, both stages; photographs by
heart.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.coco_tree import ON_PHOTOS, PHOTOS
from tests.ranks import run_ranks
from tests.tiny import STEPS, command, equal, losses, records
from visft_ds import evaluate, fit, load
from visft_ds.config import resolve
from visft_ds.shards.cli import main as make_shards

HEAD = {"type": "plain", "hidden_dim": 32, "num_heads": 2, "blocks": 2, "num_queries": 10}
PLAIN: dict[str, object] = {
    "visft.tasks": "segmentation",
    "visft.tasks.segmentation.head": HEAD,
    "visft.tasks.segmentation.image.fixed_size": 64,
    "visft.model.preset": "timm:test_vit",  # with a class token
    "visft.model.overrides": {"image_size": 64},
    "visft.model.out_indices": [0, 2],
    "visft.run.eval_every": 0,
}


@pytest.mark.slow
def test_a_run_resumed_in_the_middle_of_annealing_is_the_same(shards: Path, tmp_path: Path) -> None:
    """From a checkpoint half-way, masks come and go by the same draws; means and spreads are those that it
    holds.
    """
    whole, again = tmp_path / "whole", tmp_path / "again"
    extra = {**PLAIN, "scheduler.params.total_num_steps": 4, "visft.run.save_every": 2}
    run_ranks(["launchers/train.py", *command(shards, whole, extra=extra)], 1)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    run_ranks(["launchers/train.py", *command(shards, again, extra=extra)], 1)
    assert equal(again, whole, step=4)
    heads = load_file(whole / "export/segmentation.safetensors")
    for level in range(2):
        assert heads[f"laterals.{level}.channels.mean"].abs().max() > 0.01
        assert (heads[f"laterals.{level}.channels.spread"] - 1).abs().max() > 0.01
    assert sum(name.startswith("loss/segmentation/") for name in losses(whole)[0]) == 3 * 3 + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_both_stages_are_the_same_under_every_engine(shards: Path, tmp_path: Path) -> None:
    """One process, and ZeRO-3 on two; then what comes out is evaluated, and predicts."""
    kept: dict[str, object] = {"visft.lora.rank": 2, "visft.heads.path": str(tmp_path / "1zero1/export")}
    for stage in (1, 2):
        extra = PLAIN | (kept if stage == 2 else {})
        for engine, world in {"zero1": 1, "zero3": 2}.items():
            given = command(shards, tmp_path / f"{stage}{engine}", stage=stage, extra=extra)
            run_ranks(["launchers/train.py", f"--engine={engine}", *given], world)
        ours, theirs = (losses(tmp_path / f"{stage}{engine}") for engine in ("zero3", "zero1"))
        assert len(theirs) == STEPS and len(theirs[0]) == (12 if stage == 1 else 6), theirs[0]
        for one, other in zip(ours, theirs, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
    alone, divided = (
        load_file(tmp_path / f"1{engine}/export/segmentation.safetensors") for engine in ("zero1", "zero3")
    )
    measured = [name for name in alone if ".channels." in name]
    assert len(measured) == 4 and all(torch.equal(alone[name], divided[name]) for name in measured)
    adapters = load_file(tmp_path / "2zero3/export/adapter/adapter_model.safetensors")
    assert any("blocks.0." in name for name in adapters) and not any("blocks.3." in name for name in adapters)
    found = evaluate(tmp_path / "2zero3", data=shards, split="train", limit=4)
    assert found.metrics["mask/AP"] >= 0
    assert load(tmp_path / "2zero3/export").backbone.backbone.layers_read == (0, 2)


@pytest.mark.slow
@ON_PHOTOS
def test_photographs_are_learnt_by_heart(tmp_path: Path) -> None:
    """On maps of three strides of a network whose weights are real."""
    assert make_shards([str(PHOTOS), "--out", str(tmp_path / "shards")]) == 0
    head = {"type": "plain", "num_queries": 40, "hidden_dim": 64, "num_heads": 4, "blocks": 3}
    settings = {
        "visft.tasks": "segmentation",
        "visft.tasks.segmentation.head": head,
        "visft.tasks.segmentation.loss.train_num_points": 512,
        "visft.model.out_indices": [2, 4, 6],
        "visft.features": {"views": 1, "cache": str(tmp_path / "features")},
        "visft.shared.image.fixed_size": 224,
        "visft.shared.image.zoom": None,
        "visft.shared.image.flip": 0.0,
        "visft.shared.batch_size": 8,
        "optimizer.params.lr": 3e-3,
        "scheduler.params.total_num_steps": 850,
        "visft.run.save_every": 850,
        "visft.run.eval_every": 850,
    }
    assert fit(data=tmp_path / "shards", out=tmp_path / "run", settings=settings).finished
    (learnt,) = [record["mask/AP50"] for record in records(tmp_path / "run") if "mask/AP50" in record]
    assert learnt >= 0.64


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        ("pipeline", ["visft.model.out_indices=[0, 1]", "pipeline.stages=2"], "not for a pipeline"),
        (
            "pipeline",
            ['visft.tasks.segmentation.head={"type": "plain"}', "pipeline.stages=2"],
            "not for a pipeline",
        ),
        ("zero1", ["visft.tasks.segmentation.head.type=plain"], "not an option of a plain head"),
        ("zero1", ["visft.tasks.segmentation.head.type=plane"], "mask2former or plain"),
    ],
)
def test_settings_that_do_not_fit(engine: str, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(stage=1, engine=engine, model="debug", settings=settings)
