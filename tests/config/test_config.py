"""Configuration: merging, messages, what follows from it, tasks and batches, command line."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.options import known_keys
from tests.ranks import python
from visft_ds.config import ResolvedConfig, changed, derive_batches, resolve
from visft_ds.config.record import differences
from visft_ds.config.resolve import (
    CONFIG_ROOT,
    NOT_IDENTITY,
)
from visft_ds.config.schema import PRESETS, BackboneOverrides
from visft_ds.config.tree import Tree, flatten, load_json, parse_assignment
from visft_ds.prepare.model import deepspeed_dict
from visft_ds.prepare.settle import settle
from visft_ds.settings.task_schema import SHARED

TASKS = ("detection", "segmentation", "captioning")


def debug(*settings: str, stage: int = 2) -> ResolvedConfig:
    return resolve(stage=stage, model="debug", settings=settings)


def recipe(*settings: str, stage: int = 1) -> ResolvedConfig:
    return resolve(stage=stage, model="eva_e", settings=settings)


def complaint(*settings: str, stage: int = 2) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the text
        debug(*settings, stage=stage)
    return str(caught.value)


# Layers


def test_later_layers_win_and_each_value_knows_its_source() -> None:
    tree, layer = Tree(), {"x": {"y": [1], "z": 1}, "w": None}
    tree.lay(layer, "a.json")
    tree.lay({"x": {"z": 2}, "w": {"v": 3}}, "b.json")
    tree.assign("x.y.0", 5, "--set")
    assert tree.values == {"x": {"y": [5], "z": 2}, "w": {"v": 3}}
    assert layer == {"x": {"y": [1], "z": 1}, "w": None}
    assert [tree.source(key) for key in ("x.y.0", "x.z", "w.v", "n")] == ["--set", "b.json", "b.json", None]


def test_a_first_item_is_added_to_a_list_that_no_layer_has() -> None:
    (added,) = debug('visft.data.sets.0={"name": "more", "root": "there"}').visft.data.sets
    assert (added.name, added.root) == ("more", "there")


def test_a_model_file_replaces_values_of_a_stage() -> None:
    config = debug()
    assert config.sources["optimizer.params.lr"].endswith("debug.json (override)")
    assert config.optimizer.params.lr != resolve(stage=2).optimizer.params.lr


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": }', "[1]"])
def test_unreadable_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=r"f\.json: cannot be read as a configuration"):
        load_json(tmp_path / "f.json")


# --set


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("null", None), ("b=c", "b=c"), ("", "")])
def test_values_of_set_are_json_or_text(text: str, value: Any) -> None:
    assert parse_assignment(f"a={text}") == ("a", value)


# Messages


def test_all_errors_at_once_with_value_source_and_nearest_key() -> None:
    text = complaint(
        "visft.tasks.detection.batchsize=8",
        'optimizer.params.lr="1e-5"',
        "visft.seed=true",
        "visft.tasks.detection.batch_size=0",
        "visft.model.preset=eva_ee",
        "zero_optimisation.stage=2",
        "train_batch_size=8",
        "visft.run.evry=5",
        "lr=1e-5",
        "visft.save_every=5",
        "visft.optimizer.params.lr=1e-5",
        "visft.tasks.detection.image.max=5",
    )
    assert text.startswith("the configuration has 12 errors:")
    for part in (
        "visft.tasks.detection.batchsize (--set): unknown key; did you mean visft.tasks.detection.batch_size?",
        'optimizer.params.lr = "1e-5" (--set): ',
        "zero_optimisation (--set): unknown key; did you mean zero_optimization?",
        "train_batch_size = 8 (--set): follows from other keys; state visft.tasks.<task>.batch_size",
        "run.evry (--set): unknown key; did you mean visft.run.log_every?",
        "lr (--set): unknown key; did you mean optimizer.params.lr?",
        "visft.save_every (--set): unknown key; did you mean visft.run.save_every?",
        "visft.optimizer (--set): unknown key; did you mean optimizer?",
        "image.max (--set): unknown key; known: min_size_train, max_size_train",
    ):
        assert part in text


TIMM = "visft.model.preset=timm:resnet18"
FREE = ["visft.tasks.detection.image.fixed_size=null", "visft.shared.image.fixed_size=null"]


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (
            1,
            ['visft.lora={"rank": 4, "alpha": 1, "targets": ["q"]}'],
            "stage 1 trains heads on the unchanged",
        ),
        (1, ["visft.heads.path=x"], "which train new heads"),
        (2, ["visft.seed"], "KEY=VALUE"),
        (2, ["optimizer.params.lr.x=1"], "which has no x"),
        (
            2,
            ["optimizer.params.lr=1e9"],
            "optimizer.params.lr = 1000000000.0 (--set): must be at most 1: AdamW",
        ),
        (1, ['visft.param_groups.0={"name": "h", "params": "heads.*", "lr": 2}'], "param_groups.0.lr = 2 "),
        (2, ["visft.param_groups.2=1"], "has no 2"),
        (2, [TIMM], "model.overrides.width"),
        (
            1,
            ["pipeline.stages=2", "visft.tasks=semantic"],
            "before the first step, is not for a pipeline: use",
        ),
        (2, ["visft.tasks.detection.image.zoom=[0.5, 1]", *FREE], "is for squares: set fixed_size"),
        (2, ["visft.shared.image.zoom=[0.5, 1]", *FREE], "is for squares: set fixed_size"),
        (2, ["visft.shared.image.keep_shape=true", *FREE], "set fixed_size, the long side"),
        (1, ["visft.mode=shared", "visft.shared.image.paste=2", *FREE], "labels of captioning know nothing"),
        (1, ["visft.tasks.detection.image.zoom=[1.4, 0.5]"], "must be [smallest, largest]"),
        (2, ["visft.run.keep_best=box/AP", "visft.run.eval_every=750"], "a multiple of save_every"),
        (2, ["visft.run.keep_best=box/Ap", "visft.run.eval_every=500"], "did you mean box/AP?"),
        (2, ["visft.tasks.detection.head.num_heads=7"], "is not a multiple of num_heads = 7"),
        (2, ["zero_optimization.offload_param.device=cpu"], "needs zero_optimization.stage = 3"),
        (2, ["zero_optimization.offload_optimizer.device=cpu"], "zero_force_ds_cpu_optimizer: must be false"),
        (2, ["visft.tasks.captioning.steps=null"], "captioning.steps = null (--set): missing"),
        (2, ["visft.mode=shared", "visft.shared=null"], 'missing: mode "shared" needs'),
        (2, ["visft.tasks=detektion"], "did you mean detection"),
        (2, ["visft.data.num_workers=100000"], "num_workers"),
        (2, ["visft.tasks=[]"], "no task is on"),
        (2, ["visft.tasks="], "no settings of a task ''; known: semantic"),
        # The first list has thrown the settings of captioning away; the second must not end in an empty run.
        (
            2,
            ["visft.tasks=detection", "visft.tasks=detection,captioning"],
            "no settings of a task 'captioning'",
        ),
        (1, ["visft.model.overrides.depth=2147483648"], "depth"),
    ],
)
def test_settings_that_are_refused(stage: int, settings: list[str], message: str) -> None:
    assert message in complaint(*settings, stage=stage)


def test_metrics_that_can_be_named_are_those_that_an_evaluation_gives() -> None:
    from faster_coco_eval import mask as coco_mask

    from visft_ds.data.depth import encoded
    from visft_ds.tasks import TASKS

    corner = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "segmentation": [[0, 0, 4, 0, 4, 4]]}
    caption = {"image_id": 1, "caption": "a cat"}
    truth = {"images": [{"id": 1, "width": 8, "height": 8}], "categories": [{"id": 1, "name": "cat"}]}
    for task, spec in TASKS.items():
        words = task == "captioning"
        annotations = [caption if words else corner]
        head = spec.settings("head", {})
        results = [caption] if words else []
        image = truth["images"][0]
        if task == "depth":
            depth = encoded(np.ones((8, 8), np.float32))
            image = {**image, "depth": depth}
            results = [{"image_id": 1, "depth": depth}]
        labels = {**truth, "images": [image], "annotations": annotations}
        if task == "panoptic":
            counts = coco_mask.encode(np.asfortranarray(np.ones((8, 8), np.uint8)))
            segment = {"image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": counts}
            categories = [{"id": 1, "name": "cat", "isthing": 1}]
            labels |= {"annotations": [segment], "categories": categories}
        found = spec.measure(labels, results, head, False)
        named = tuple(name for name in found if "/AR" not in name)  # which has a number in it
        assert named == spec.config.metrics and spec.config.main in found


# What follows from a configuration


def test_a_resolved_configuration_given_back_is_the_same(tmp_path: Path) -> None:
    first = resolve(stage=2, model="debug", engine="zero3_offload", settings=["visft.seed=3"])
    (tmp_path / "own.json").write_text(json.dumps(first.to_dict()))
    second = settle(["--deepspeed_config", str(tmp_path / "own.json")]).config
    assert second.to_dict() == first.to_dict() and second.identity() == first.identity()


def test_the_identity_holds_what_decides_the_result() -> None:
    base = debug()
    same = ["visft.run.out=x", "visft.data.root=x", "visft.shared.micro_batch=1", "zero_optimization.stage=2"]
    same += [
        "visft.tasks.captioning.decoding.beam_size=3",
        "visft.tasks.captioning.vocabulary.file=words.json",
    ]
    for setting in same:
        assert debug(setting).identity() == base.identity(), setting
    for other in ("optimizer.params.lr=1", "visft.tasks.detection.image.flip=0.25", "visft.mode=shared"):
        assert len(base.identity().items() - debug(other).identity().items()) == 1


def test_a_key_that_a_release_adds_is_compared_with_its_default() -> None:
    """A run of an earlier release lacks a switch, a loss and a setting of Adam, and its export has no null."""
    new = (
        "visft.heads.train_mode",
        "visft.tasks.detection.loss.giou",
        "optimizer.params.eps",
    )
    here = debug()
    assert here.identity().keys() >= set(new)
    there = {key: value for key, value in here.identity().items() if key not in new}
    assert differences(there, here) == [] == differences({**there, "visft.gone": None}, here)
    changed = differences(there, debug("visft.heads.train_mode=true"))
    assert changed == ["visft.heads.train_mode: false -> true"]
    default = here.identity()["visft.tasks.detection.loss.giou"]
    changed = debug("visft.tasks.detection.loss.giou=5.5", "visft.seed=7")
    told = f"visft.tasks.detection.loss.giou: {default} -> 5.5"
    assert differences(there, changed) == ["visft.seed: 0 -> 7", told]
    assert differences({**there, "visft.gone": 3}, here) == ["visft.gone: 3 -> (absent)"]


def test_lists_and_tasks_that_differ_are_named_whole() -> None:
    short, two = "visft.tasks.detection.image.min_size_train", "visft.lora.targets"
    few, many = debug(f"{short}=[48]", f'{two}=["q"]'), debug(f"{short}=[48,64]", f'{two}=["q","v"]')
    assert differences(few.identity(), many) == [
        f'{two}.1: (absent) -> "v"',
        f"{short}.1: (absent) -> 64",
    ]
    assert differences(many.identity(), few) == [f'{two}.1: "v" -> (absent)', f"{short}.1: 64 -> (absent)"]
    boxes = debug("visft.tasks=detection")
    assert "visft.tasks.captioning: (set) -> (absent)" in differences(debug().identity(), boxes)
    assert "visft.tasks.captioning: (absent) -> (set)" in differences(boxes.identity(), debug())
    assert len(differences(debug().identity(), boxes)) < 8


@pytest.mark.parametrize(
    ("stage", "settings", "processes", "advice"),
    [
        (2, (), 64, "add --batch-size 64 --lr 2.8e-5 (for Adam"),
        (2, (), 64, "square root of 64 / 8; the published batch is 8), or start 1 or 2 or 4 or 8 processes"),
        (1, (), 16, "batch_size=16 --set visft.tasks.segmentation.batch_size=16 --lr 7.1e-5 ("),
        # Micro-batches of captions would be of 11 with one accumulation for all, and 8 are allowed.
        (2, (), 6, "batch_size=12 --set visft.tasks.captioning.batch_size=72 --lr 1.2e-5 ("),
        (2, ("optimizer.params.lr=1e-4",), 64, "--batch-size 64 --set optimizer.params.lr=2.8e-4 ("),
        # --batch-size and --lr would do nothing: the first stands behind --set, the second is not of this
        # group.
        (
            1,
            ("visft.tasks=semantic", "visft.tasks.semantic.batch_size=2"),
            4,
            "add --set visft.tasks.semantic.batch_size=4 (",
        ),
        (1, ("visft.tasks=semantic",), 64, "in visft.param_groups by the same factor; the configured batch"),
    ],
)
def test_batches_that_do_not_divide_are_told_what_to_add(
    stage: int, settings: tuple[str, ...], processes: int, advice: str
) -> None:
    with pytest.raises(ValueError, match="cannot be divided among") as caught:
        derive_batches(resolve(stage=stage, settings=settings), processes)
    assert advice in str(caught.value)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", None)])
def test_the_dict_for_deepspeed(precision: Any, dtype: str | None) -> None:
    sizes = ["visft.tasks.detection.batch_size=24", "visft.tasks.detection.micro_batch=4"]
    config = debug("visft.model.precision=auto", "visft.tasks=detection", *sizes)
    result = deepspeed_dict(config, derive_batches(config, 2), precision)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [result[key] for key in keys] == [24, 4, 3]
    assert result["gradient_clipping"] == config.gradient_clipping and result["steps_per_print"] > 10**8
    assert result["zero_optimization"]["reduce_bucket_size"] == 30_000_000
    autocast = (
        None if dtype is None else {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    )
    assert result.get("torch_autocast") == autocast


# Options are keyword arguments of the classes they configure


def test_presets_and_overrides_match_the_backbone() -> None:
    from visft_ds.models import eva_vit

    assert set(PRESETS) == set(eva_vit.PRESETS)
    assert {
        *BackboneOverrides.model_fields,
        "class_token",
    } == eva_vit.EvaViTConfig.__dataclass_fields__.keys()


# Which tasks are on


@pytest.mark.parametrize(
    "given", ["detection,captioning", "captioning, detection", '["captioning", "detection"]']
)
def test_a_list_of_names_turns_the_other_tasks_off(given: str) -> None:
    config = recipe(f"visft.tasks={given}")
    assert list(config.visft.tasks.enabled()) == ["detection", "captioning"]  # one order, whatever was typed
    assert config.visft.tasks.segmentation is None
    assert [group.name for group in config.visft.param_groups] == ["detection", "captioning"]
    assert config.total_steps == 250_000
    assert config.sources["visft.tasks.segmentation"].startswith("--tasks ")


def test_a_setting_does_not_turn_a_task_on_that_was_not_named() -> None:
    config = recipe("visft.tasks=detection", "visft.tasks.captioning.batch_size=4")
    assert list(config.visft.tasks.enabled()) == ["detection"]


def test_groups_of_heads_that_are_off_are_dropped_and_others_stay() -> None:
    groups = (
        'visft.param_groups=[{"name": "a", "params": "heads.captioning.*"}, '
        '{"name": "b", "params": "heads.captioning.fc.*"}, '
        '{"name": "c", "params": "heads.detection.*,heads.captioning.*"}, '
        '{"name": "d", "params": "backbone.*.lora_*"}, {"name": "e", "params": "heads.*.nothing"}]'
    )
    kept = debug("visft.tasks=detection,segmentation", groups).visft.param_groups
    assert [group.name for group in kept] == ["c", "d", "e"] and kept[0].params == "heads.detection.*"
    assert len(debug(groups).visft.param_groups) == 5


# How the steps are shared out


def test_the_length_follows_from_the_updates() -> None:
    steps = [
        f"visft.tasks.{task}.steps={number}" for task, number in zip(TASKS, (3000, 2500, 4000), strict=True)
    ]
    assert recipe(*steps).total_steps == 9500
    assert recipe(*steps, "visft.mode=shared").total_steps == 4000  # every step teaches all of them
    assert recipe(*steps, "scheduler.params.total_num_steps=2500").total_steps == 2500
    assert [stream.share for stream in recipe(*steps).visft.streams().values()] == [3000, 2500, 4000]


def test_a_warm_up_longer_than_the_run_shrinks_to_a_tenth_of_it() -> None:
    steps = [f"visft.tasks.{task}.steps=700" for task in TASKS]
    assert recipe(*steps).scheduler.params.warmup_num_steps == 2000  # of 2100 steps
    config = recipe(*steps, "visft.tasks=detection,captioning", stage=1)
    assert (config.total_steps, config.scheduler.params.warmup_num_steps) == (1400, 140)
    (decision,) = config.decisions
    assert (
        decision.key == "scheduler.params.warmup_num_steps" and "2000 steps would be longer" in decision.why
    )


def test_a_length_that_follows_from_nothing() -> None:
    # In mode "shared" there is nothing to share out: neither is needed beside a length.
    bare = [f"visft.tasks.{task}.steps=null" for task in TASKS]
    assert debug(*bare, "visft.mode=shared").total_steps == 300
    assert "missing: state it" in complaint(
        *bare, "visft.mode=shared", "scheduler.params.total_num_steps=null"
    )


# Streams and batches


def test_sampled_tasks_have_a_stream_each_and_shared_ones_have_one() -> None:
    sampled = debug("visft.tasks.detection.image.flip=0").visft.streams()
    assert {name: stream.tasks for name, stream in sampled.items()} == {task: (task,) for task in TASKS}
    assert sampled["detection"].image["flip"] == 0 and sampled["captioning"].image["size"] == 112
    config = debug("visft.mode=shared", "visft.tasks=captioning,detection", "visft.shared.image.flip=0.25")
    (stream,) = config.visft.streams().values()
    assert (stream.name, stream.tasks) == (SHARED, ("detection", "captioning"))
    assert (stream.batch_size, stream.micro_batch, stream.image["flip"]) == (8, 8, 0.25)  # at most a batch


@given(
    shares=st.tuples(*[st.integers(1, 24)] * 3),
    micro=st.tuples(*[st.integers(1, 8)] * 3),
    world=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_the_common_accumulation_is_the_smallest_that_exists(
    shares: tuple[int, ...], micro: tuple[int, ...], world: int
) -> None:
    sizes = [
        f"visft.tasks.{task}.batch_size={share * world}" for task, share in zip(TASKS, shares, strict=True)
    ]
    limits = [f"visft.tasks.{task}.micro_batch={most}" for task, most in zip(TASKS, micro, strict=True)]
    config = debug(*sizes, *limits)
    pairs = list(zip(shares, micro, strict=True))
    possible = [a for a in range(1, min(shares) + 1) if all(s % a == 0 and s // a <= m for s, m in pairs)]
    if not possible:
        with pytest.raises(ValueError, match=f"too small.* x accumulation {math.gcd(*shares)} x"):
            derive_batches(config, world)
        return
    batches = derive_batches(config, world)
    assert batches.accumulation == possible[0]
    assert [batches.micro[task] for task in TASKS] == [share // possible[0] for share in shares]


# What is written down and compared


def test_every_exception_of_the_identity_fits_a_key() -> None:
    """A glob that fits nothing is a key that was renamed and is now compared without anybody wanting it."""
    keys = [*known_keys(), *(key for key, _ in flatten(debug().to_dict()))]
    assert [glob for glob in NOT_IDENTITY if not fnmatch.filter(keys, glob)] == []


# Command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "missing --stage 1"),
        (["--stage", "1", "--modle", "debug"], "did you mean --model?"),
        (["--stage", "1", "--engine", "zero4"], "did you mean zero"),
        (["--deepspeed_config", str(CONFIG_ROOT / "stage1.json"), "--model", "debug"], "leave out --model"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settle(argv)


def test_flags_reach_the_configuration() -> None:
    words = "--local_rank=1 --stage 1 --model debug --engine zero2 --data d --out o --resume must --dry-run"
    arguments, config, _ = settle([*words.split(), "--set", "visft.seed=4"])
    assert (config.visft.data.root, config.visft.run.out, config.visft.seed) == ("d", "o", 4)
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert (arguments.resume, arguments.dry_run, config.sources["visft.data.root"]) == (
        "must",
        True,
        "--data",
    )


def test_configuration_needs_no_tensor_library() -> None:
    """A wrong key must be reported in a second, also where torch takes ten to import."""
    code = (
        "import sys; from visft_ds.prepare.settle import settle; from visft_ds.prepare.inputs import *;"
        "import visft_ds.monitor.console, visft_ds.monitor.metrics;"
        "missing_inputs(settle(['--stage', '2']).config);"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    python("-c", code)


def test_a_changed_configuration_is_refused_what_set_is_refused() -> None:
    config = debug("visft.run.eval_every=500")
    with pytest.raises(ValueError, match=r"visft\.run\.keep_best"):
        changed(config, ["visft.run.keep_best=box/Ap"])
