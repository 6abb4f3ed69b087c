"""The dense detection head in whole runs: the same under every engine; photographs learnt by heart, by DETR
as well.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.coco_tree import ON_PHOTOS, PHOTOS
from tests.ranks import run_ranks
from tests.tiny import STEPS, command, losses, records
from visft_ds import fit
from visft_ds.shards.cli import main as make_shards

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"),
]
DENSE = {
    "visft.tasks.detection.head.type": "dense",
    "visft.tasks.detection.head.width": 32,
    "visft.tasks": "detection",
    "visft.lora.rank": 2,
}
#: As small as the photographs allow; it learns only what lies where in these.
DETR = {
    "visft.tasks.detection.head": {"type": "detr", "num_queries": 40, "encoder_dim": 128, "decoder_dim": 128}
    | {"encoder_layers": 1, "decoder_layers": 3, "num_heads": 4, "ffn_dim": 256, "dropout": 0.0},
    "visft.shared.image.fixed_size": 224,
    "scheduler.params.total_num_steps": 700,
    "visft.run.save_every": 700,  # the last step is exported: on other photographs every one has 0
    "visft.run.eval_every": 700,
}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_same_run_under_every_engine(shards: Path, tmp_path: Path, stage: int) -> None:
    """One process, ZeRO-3 and a pipeline of two: losses of each step and the heads that come out."""
    extra: dict[str, object] = {key: value for key, value in DENSE.items() if stage == 2 or "lora" not in key}
    if stage == 2:
        extra["visft.heads.start"] = "random"
    engines = {"zero1": 1, "zero3": 2, "pipeline": 2}
    for engine, world in engines.items():
        given = command(shards, tmp_path / engine, stage=stage, extra=extra)
        run_ranks(["launchers/train.py", f"--engine={engine}", *given], world)
    expected = losses(tmp_path / "zero1")
    heads = load_file(tmp_path / "zero1/export/detection.safetensors")
    assert len(expected) == STEPS and {"loss/detection/ce", "loss/detection/giou"} <= expected[0].keys()
    for engine in engines:
        for one, other in zip(losses(tmp_path / engine), expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)  # eight steps of Adam on rounding
        for name, value in load_file(tmp_path / engine / "export/detection.safetensors").items():
            torch.testing.assert_close(value, heads[name], rtol=1e-3, atol=1e-4)


@ON_PHOTOS
@pytest.mark.parametrize("head", [{}, DETR], ids=["dense", "detr"])
def test_photographs_are_learnt_by_heart(tmp_path: Path, head: dict[str, object]) -> None:
    """COCO's with their many small objects, in one view each."""
    assert make_shards([str(PHOTOS), "--out", str(tmp_path / "shards")]) == 0
    settings = {"visft.tasks": "detection", "visft.run.eval_limit": 20, "visft.features.views": 1}
    settings |= {"visft.shared.image.zoom": None, "visft.shared.image.flip": 0.0}
    result = fit(data=tmp_path / "shards", out=tmp_path / "run", settings=settings | head)
    assert result.finished
    (learnt,) = [record["box/AP50"] for record in records(tmp_path / "run") if "box/AP50" in record]
    assert learnt > 0.6
