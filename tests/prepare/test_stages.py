"""Stage 2 is handed the heads of stage 1, ours or published ones, or refuses them with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.published import save_published_head
from tests.tiny import TINY
from visft_ds.checkpoint.export import save_base
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.data.shards import Category
from visft_ds.interop.heads import HeadInfo, head_file, save_head
from visft_ds.prepare.model import PreparedModel, prepare_model
from visft_ds.tasks import BUILT_IN, TASKS, config_class
from visft_ds.tasks.vocabulary import Vocabulary

WORDS = Vocabulary(("a", "red", "circle", "square"))
CATEGORIES = (Category(0, 1, "person"), Category(1, 2, "bicycle"))
#: What the published form takes for granted: the schema's defaults.
PUBLISHED: dict[str, Any] = {f"visft.tasks.{task}.head": TASKS[task].options("head", {}) for task in BUILT_IN}
PUBLISHED["visft.tasks.segmentation.head.labelling"] = "published"


def configured(stage: int, extra: dict[str, Any] | None = None) -> ResolvedConfig:
    values = {**TINY, **(extra or {})}
    return resolve(stage=stage, model="debug", settings=[f"{k}={json.dumps(v)}" for k, v in values.items()])


def prepared(config: ResolvedConfig, heads: Path | None = None, words: Vocabulary = WORDS) -> PreparedModel:
    return prepare_model(
        config.visft, config.optimizer.params, heads_from=heads, categories=CATEGORIES, vocabulary=words
    )


def write_own(folder: Path, model: PreparedModel, config: ResolvedConfig, mode: str = "shared", **more: str) -> Path:
    """Heads as a run of stage 1 exports them."""
    infos = {}
    for task, settings in config.visft.tasks.enabled().items():
        options = settings.head.model_dump(mode="json")
        extra: dict[str, Any] = {"base_weights": model.base.identity, "mode": mode, **more}
        if task == "captioning":
            options["vocabulary_size"] = WORDS.size
            extra["vocabulary"] = WORDS.to_dict()
        infos[task] = HeadInfo(task, 32, options, [], extra)
    for task, head in model.module.heads.items():
        save_head(head_file(folder, task), infos[task], head.state_dict())
    return folder


@pytest.fixture(scope="module")
def stage1() -> tuple[ResolvedConfig, PreparedModel]:
    config = configured(1, {**PUBLISHED, "visft.seed": 4})
    return config, prepared(config)


def test_published_heads_start_stage_2(stage1: tuple[ResolvedConfig, PreparedModel], tmp_path: Path) -> None:
    _, first = stage1
    for task, head in first.module.heads.items():
        save_published_head(head, task, tmp_path / f"eva_g_{config_class(task).published}_heads.ckpt")
    second = prepared(configured(2, PUBLISHED), tmp_path)
    theirs, ours = first.module.heads.state_dict(), second.module.heads.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())
    with pytest.raises(ValueError, match=r"was trained with grid 14 \(here 4\)"):
        prepared(configured(2, {**PUBLISHED, "visft.tasks.captioning.head.grid": 4}), tmp_path)
    with pytest.raises(ValueError, match=r"was trained with labelling published \(here contiguous\)"):
        prepared(configured(2, {**PUBLISHED, "visft.tasks.segmentation.head.labelling": "contiguous"}), tmp_path)
    with pytest.raises(ValueError, match="the captioning head has 8 ids, the vocabulary 7"):
        prepared(configured(2, PUBLISHED), tmp_path, Vocabulary(("a", "red", "circle")))


def test_a_head_of_other_words_is_refused(stage1: tuple[ResolvedConfig, PreparedModel], tmp_path: Path) -> None:
    config, first = stage1
    heads = write_own(tmp_path, first, config)
    assert any(name.startswith("heads loaded strictly") for name in prepared(configured(2, PUBLISHED), heads).notes)
    other = Vocabulary(("a", "red", "circle", "triangle"))
    with pytest.raises(ValueError, match=r"'square'.*'triangle'"):
        prepared(configured(2, PUBLISHED), heads, other)


def test_random_base_weights_in_a_file_are_the_same_base(
    stage1: tuple[ResolvedConfig, PreparedModel], tmp_path: Path
) -> None:
    """Heads learnt before there was a file; its content says so. Weights of another seed are noted."""
    config, first = stage1
    heads = write_own(tmp_path, first, config)
    save_base(first.base, first.module.backbone, tmp_path / "base.safetensors")
    second = prepared(configured(2, {**PUBLISHED, "visft.model.weights": str(tmp_path / "base.safetensors")}), heads)
    assert second.base.identity == first.base.identity and not any("warning" in note for note in second.notes)
    other = prepared(configured(2, {**PUBLISHED, "visft.model.weights_seed": 1}), heads)
    assert sum("was trained on other base weights" in note for note in other.notes) == 3


def test_heads_of_other_images_are_noted(stage1: tuple[ResolvedConfig, PreparedModel], tmp_path: Path) -> None:
    config, first = stage1
    notes = prepared(configured(2, PUBLISHED), write_own(tmp_path, first, config)).notes
    assert sum("learnt from images of mode shared, this run is sampled" in note for note in notes) == 3


@pytest.mark.parametrize("active", [False, True])
def test_frozen_heads_drop_nothing_unless_asked_to(active: bool) -> None:
    model = prepared(configured(2, {"visft.heads.active_dropout": active})).module
    model.train()
    dropouts = [module for module in model.heads.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    assert dropouts and all(module.training == active for module in dropouts)
    assert model.backbone.training and not any(p.requires_grad for p in model.heads.parameters())
