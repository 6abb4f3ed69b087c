"""What each stage trains, and heads of stage 1, ours or published ones, that stage 2 is given or refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.published import save_published_head
from tests.tiny import TINY
from visft_ds.checkpoint.export import describe_heads, save_base
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.data.shards import Category
from visft_ds.interop.heads import check_categories, head_file, save_head
from visft_ds.prepare.data import RunData
from visft_ds.prepare.model import PreparedModel, prepare_model, stage_name
from visft_ds.tasks import BUILT_IN, TASKS, config_class
from visft_ds.tasks.vocabulary import Vocabulary

WORDS = Vocabulary(("a", "red", "circle", "square"))
CATEGORIES = (Category(0, 1, "person"), Category(1, 2, "bicycle"))
#: What the published form takes for granted: the schema's defaults.
PUBLISHED: dict[str, Any] = {
    f"visft.tasks.{task}.head": TASKS[task].options("head", {}) for task in BUILT_IN[:3]
}
PUBLISHED["visft.tasks.segmentation.head.class_ids"] = "published"


def configured(stage: int, extra: dict[str, Any] | None = None, *settings: str) -> ResolvedConfig:
    values = [f"{key}={json.dumps(value)}" for key, value in {**TINY, **(extra or {})}.items()]
    return resolve(stage=stage, model="debug", settings=[*values, *settings])


STAGE1 = configured(1, {**PUBLISHED, "visft.seed": 4})


def prepared(config: ResolvedConfig, heads: Path | None = None, words: Vocabulary = WORDS) -> PreparedModel:
    return prepare_model(config, heads_from=heads, categories=CATEGORIES, vocabulary=words)


def write_own(folder: Path, model: PreparedModel, config: ResolvedConfig, words: Vocabulary = WORDS) -> Path:
    """Heads as a run of stage 1 exports them."""
    data = cast(RunData, SimpleNamespace(categories=(), vocabulary=words))
    facts = {"base_weights": model.base.identity, "mode": "shared"}
    infos = describe_heads(model.module.backbone, config.visft.tasks.enabled(), facts, data)
    for task, head in model.module.heads.items():
        save_head(head_file(folder, task), infos[task], head.state_dict())
    return folder


def test_depth_fits_data_of_any_categories(first: PreparedModel) -> None:
    """Its head has no classes that objects beside the depth maps could differ from."""
    tasks = resolve(stage=1, model="debug", settings=["visft.tasks=depth"]).visft.tasks.enabled()
    data = cast(RunData, SimpleNamespace(categories=[Category(0, 7, "emu")], vocabulary=None))
    infos = describe_heads(first.module.backbone, tasks, {}, data)
    check_categories(infos, [Category(0, 7, "ostrich")], "here", "Do it")


@pytest.fixture(scope="module")
def first() -> PreparedModel:
    return prepared(STAGE1)


def test_published_heads_start_stage_2(first: PreparedModel, tmp_path: Path) -> None:
    for task, head in first.module.heads.items():
        save_published_head(head, task, tmp_path / f"eva_g_{config_class(task).published}_heads.ckpt")
    second = prepared(configured(2, PUBLISHED), tmp_path)
    theirs, ours = first.module.heads.state_dict(), second.module.heads.state_dict()
    assert theirs.keys() == ours.keys() and all(
        torch.equal(theirs[name], value) for name, value in ours.items()
    )
    with pytest.raises(ValueError, match=r"was trained with encoded_image_size 14 \(here 4\)"):
        prepared(configured(2, {**PUBLISHED, "visft.tasks.captioning.head.encoded_image_size": 4}), tmp_path)
    with pytest.raises(ValueError, match=r"was trained with class_ids published \(here contiguous\)"):
        prepared(
            configured(2, {**PUBLISHED, "visft.tasks.segmentation.head.class_ids": "contiguous"}), tmp_path
        )
    with pytest.raises(ValueError, match="the captioning head has 8 ids, the vocabulary 7"):
        prepared(configured(2, PUBLISHED), tmp_path, Vocabulary(("a", "red", "circle")))


def test_a_head_of_other_words_is_refused(first: PreparedModel, tmp_path: Path) -> None:
    heads = write_own(tmp_path, first, STAGE1)
    notes = prepared(configured(2, PUBLISHED), heads).notes
    assert any(note.startswith("heads loaded strictly") for note in notes)
    assert sum("trained in mode shared, this run is in mode sampled" in note for note in notes) == 3
    other = Vocabulary(("a", "red", "circle", "triangle"))
    with pytest.raises(ValueError, match=r"'square'.*'triangle'"):
        prepared(configured(2, PUBLISHED), heads, other)


def test_random_base_weights_in_a_file_are_the_same_base(first: PreparedModel, tmp_path: Path) -> None:
    """Heads learnt before there was a file; its content says so. Weights of another seed are noted."""
    heads = write_own(tmp_path, first, STAGE1)
    save_base(first.base, first.module.backbone, tmp_path / "base.safetensors")
    second = prepared(
        configured(2, {**PUBLISHED, "visft.model.weights": str(tmp_path / "base.safetensors")}), heads
    )
    assert second.base.identity == first.base.identity and not any("warning" in note for note in second.notes)
    other = prepared(configured(2, {**PUBLISHED, "visft.model.weights_seed": 1}), heads)
    assert sum("was trained on other base weights" in note for note in other.notes) == 3


@pytest.mark.parametrize("active", [False, True])
def test_frozen_heads_drop_nothing_unless_asked_to(active: bool) -> None:
    model = prepared(configured(2, {"visft.heads.train_mode": active})).module
    model.train()
    dropouts = [
        module for module in model.heads.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0
    ]
    assert dropouts and all(module.training == active for module in dropouts)
    assert model.backbone.training and not any(p.requires_grad for p in model.heads.parameters())


#: Lines of docs/training.md -> endings of the names that train.
METHODS: dict[str, tuple[list[str], set[str]]] = {
    "lora": ([], {"lora_A", "lora_B"}),
    "bias": (["visft.lora=null", "visft.param_groups=backbone.*bias"], {"bias", "q_bias", "v_bias"}),
    "norms": (["visft.lora=null", "visft.param_groups=backbone.*norm*"], {"weight", "bias"}),
    "both": (
        ["visft.param_groups=backbone.*.lora_*,backbone.*norm*"],
        {"lora_A", "lora_B", "weight", "bias"},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_what_it_says(method: str) -> None:
    lines, endings = METHODS[method]
    model = prepared(configured(2, None, *lines))
    trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert trained == {name for group in model.groups for name in group.names}
    assert {name.rpartition(".")[2] for name in trained} == endings
    assert all(name.startswith("backbone.") for name in trained)
    assert model.module.train_backbone and not model.module.heads_active


def test_all_and_the_last_block() -> None:
    everything = prepared(configured(2, None, "visft.lora=null", "visft.param_groups=backbone.*")).groups[0]
    assert everything.count == sum(p.numel() for p in everything.parameters) > 20_000
    globs = "visft.param_groups=backbone.blocks.1.*, backbone.norm.*"
    last = prepared(configured(2, None, "visft.lora=null", globs)).groups[0]
    assert {name.split(".")[1] for name in last.names} == {"blocks", "norm"}
    assert not any(".blocks.0." in name for name in last.names) and len(last.names) == 15


def test_random_heads_train_along_and_need_no_stage_1() -> None:
    config = configured(2, None, "visft.heads.start=random")
    assert config.visft.heads.path is None and stage_name(config.visft) == "lora and heads"
    assert [(group.name, group.params) for group in config.visft.param_groups][1:] == [("heads", "heads.*")]
    own = 'visft.param_groups.1={"name": "h", "params": "heads.*", "lr": 1e-3}'
    groups = configured(2, None, "visft.heads.start=random", own).visft.param_groups
    assert [group.lr for group in groups] == [None, 1e-3]
    model = prepared(config)
    assert model.module.heads_active and all(p.requires_grad for p in model.module.heads.parameters())
