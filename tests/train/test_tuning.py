"""Runs on a model of timm, from the command: towers that end early, norms that train, merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.coco_tree import write_shards
from tests.random_tower import header_of
from tests.ranks import run_ranks
from tests.tiny import TINY, words_of
from visft_ds.export.cli import main as export
from visft_ds.interop.layouts import load_backbone
from visft_ds.interop.weights import save_tensors
from visft_ds.merge.cli import main as merge
from visft_ds.models.timm_backbone import build_timm
from visft_ds.predict.model import load
from visft_ds.predict.model import load_backbone as load_features

pytest.importorskip("timm")
pytestmark = pytest.mark.slow
SETTINGS = {
    **{key: value for key, value in TINY.items() if not key.startswith("visft.model.")},
    "scheduler.params.total_num_steps": 3,
    "scheduler.params.warmup_num_steps": 1,
    "visft.run.save_every": 3,
    "visft.mode": "sampled",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("coco"), train=12, val=12)


def _train(shards: Path, out: Path, stage: int, **more: object) -> Path:
    places = ["--data", str(shards), "--out", str(out)]
    run_ranks(
        [
            "launchers/train.py",
            "--stage",
            str(stage),
            "--model",
            "debug_convnext",
            *places,
            *words_of({**SETTINGS, **more}),
        ],
        world=1,
    )
    return out


def test_a_tower_that_ends_after_a_block(shards: Path, tmp_path: Path) -> None:
    """Both stages with kept features, predictions of the run, merged weights, and heads that want the same
    block.
    """
    model: dict[str, object] = {
        "visft.model.preset": "timm:test_efficientnet",
        "visft.model.out_indices": [3],
    }
    base, drawn = tmp_path / "base.safetensors", build_timm("test_efficientnet", seed=1)
    save_tensors(base, {**drawn.state_dict(), **drawn.left_out}, header_of(drawn))
    model["visft.model.weights"] = str(base)
    features = {"views": 1, "cache": str(tmp_path / "features")}
    first = _train(shards, tmp_path / "one", 1, **model, **{"visft.features": features})
    heads: dict[str, object] = {"visft.heads.path": str(first / "export"), "visft.lora.rank": 2}
    heads["visft.lora.targets"] = ["blocks.[23].*.conv_pw", "blocks.[23].*.conv_pwl"]
    second = _train(shards, tmp_path / "two", 2, **model, **heads)
    images = torch.rand(1, 3, 96, 64)
    run = load_features(second)
    assert run.width == 48 and run.backbone.layers_read == (3,)
    out = tmp_path / "merged"
    assert export([str(second), "--out", str(out), "--format", "timm"]) == 0
    merged = load_features(out)
    assert merged.backbone.layers_read == (3,) and torch.allclose(merged(images), run(images), atol=1e-5)
    assert torch.equal(load(second, tasks="detection").backbone(images), run(images))
    assert torch.allclose(
        load(out, tasks="detection", heads=first / "export").backbone(images), run(images), atol=1e-5
    )
    with pytest.raises(
        AssertionError, match=r"was trained on block 3, and the backbone is read after the last block"
    ):
        _train(shards, tmp_path / "other", 2, **{**model, "visft.model.out_indices": []}, **heads)


def test_norms_of_a_resnet_train_and_all_else_is_as_in_the_base(shards: Path, tmp_path: Path) -> None:
    """Statistics, too, and matrices that the engine has in 16 bits; a merge moves nothing but what
    trained.
    """
    base, drawn = tmp_path / "base.safetensors", build_timm("test_resnet", seed=1)
    save_tensors(base, {**drawn.state_dict(), **drawn.left_out}, header_of(drawn))
    more: dict[str, object] = {
        "visft.model.preset": "timm:test_resnet",
        "visft.model.weights": str(base),
        "visft.model.precision": "bf16",
        "visft.lora": None,
        "visft.param_groups": [{"name": "norms", "params": "backbone.*bn*"}],
        "visft.heads.start": "random",
    }
    run, out = _train(shards, tmp_path / "norms", 2, **more), tmp_path / "merged.safetensors"
    trained = run / "export" / "trained_backbone.safetensors"
    assert merge([str(run), "--out", str(out)]) == 0
    before, after = load_file(base), load_file(trained)
    assert any(name.endswith("running_mean") for name in after)
    for values in (after, load_file(out)):
        changed = {name for name, value in values.items() if not torch.equal(value, before[name])}
        assert changed and all(".bn" in f".{name}" and name.endswith(("weight", "bias")) for name in changed)
    assert torch.equal(load_backbone(trained).get_parameter("bn1.weight"), after["bn1.weight"])
