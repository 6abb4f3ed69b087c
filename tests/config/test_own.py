"""The recipe for photographs of one's own: what their number and labels decide, and what replaces it."""

from __future__ import annotations

from pathlib import Path

import pytest

from visft_ds.config import ResolvedConfig
from visft_ds.config.flags import SMALL_DATA
from visft_ds.prepare import settle as recipe
from visft_ds.prepare.settle import settle
from visft_ds.run import report


def _resolved(shards: Path, *flags: str) -> ResolvedConfig:
    return settle(["--data", str(shards), *flags]).config


def test_photographs_alone_choose_the_recipe(shards: Path) -> None:
    """Twelve of them with captions and without a validation split."""
    config = _resolved(shards)
    visft = config.visft
    assert (visft.stage, visft.model.name, visft.mode, config.total_steps) == (
        1,
        SMALL_DATA,
        "shared",
        recipe.STEPS,
    )
    assert visft.tasks.enabled()["detection"].head.model_dump()["type"] == "dense"
    assert visft.features is not None and visft.features.views == recipe.VIEWS
    assert visft.features.cache == "runs/stage1-small_data/features"
    assert (visft.run.eval_every, visft.run.keep_best) == (0, None)
    assert visft.shared is not None and visft.shared.image.zoom == recipe.ZOOM_WITH_CAPTIONS
    reasons = {key: why for key, _, why in config.decisions}
    assert reasons["scheduler.params.total_num_steps"] == "the recipe for 12 photographs"
    assert "fewer than a batch of 16" in reasons["visft.shared.batch_size"]


def test_flags_replace_what_the_recipe_chose(shards: Path) -> None:
    given = ("--tasks", "detection", "--steps", "90", "--batch-size", "4", "--out", "here")
    config = _resolved(shards, *given, "--set", "visft.data.val=train")
    visft = config.visft
    assert (config.total_steps, visft.run.eval_every, visft.run.save_every) == (90, 30, 30)
    assert (
        visft.run.keep_best == "box/AP50"
        and visft.features is not None
        and visft.features.cache == "here/features"
    )
    assert visft.shared is not None and (visft.shared.batch_size, visft.shared.image.zoom) == (4, (0.5, 1.4))
    assert _resolved(shards, "--epochs", "4", "--set", "visft.data.val=train").visft.run.eval_every == 2
    assert _resolved(shards, "--set", "visft.features=null").visft.features is None


@pytest.mark.parametrize(
    ("name", "layers", "side"),
    [("convnext_atto", (2,), 320), ("resnet18", (3,), 320), ("vit_small_patch14_dinov2", (), 308)],
)
def test_other_backbones_are_read_where_a_cell_is_16_pixels(
    shards: Path, name: str, layers: tuple[int, ...], side: int
) -> None:
    visft = _resolved(shards, "--backbone", f"timm:{name}").visft
    assert visft.model.out_indices == layers
    assert visft.shared is not None and visft.shared.image.fixed_size == side


def test_a_detr_for_few_photographs_is_warned_of(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, sets = settle(["--data", str(shards), "--set", "visft.tasks.detection.head.type=detr"])
    assert sets is not None
    for most, is_warned in ((12, True), (11, False)):
        monkeypatch.setattr(report, "FEW_FOR_DETR", most)
        report.warn_of_detr(config, sets)
        assert ("DETR memorises 12 photographs" in capsys.readouterr().out) == is_warned


def test_the_demos_recipe_reads_the_weights_that_pip_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--stage", "1", "--model", "efficientnet_lite0", "--data", "nowhere"]
    assert settle(words).config.visft.model.weights.endswith(".pth")
    stated = settle([*words, "--set", "visft.model.weights=mine.safetensors"]).config
    assert stated.visft.model.weights == "mine.safetensors"
