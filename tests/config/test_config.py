"""Configuration: merging, overriding, messages, derived batches, preflight, command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visft_ds.config import (
    ResolvedConfig,
    changed,
    deepspeed_dict,
    derive_batches,
    identity_differences,
    resolve,
    resolve_arguments,
    schema,
)
from visft_ds.config.layers import Tree, apply_override, assign, load_json, merge, parse_assignment


def debug(*settings: str, stage: int = 2) -> ResolvedConfig:
    return resolve(stage=stage, model="debug", settings=settings)


def complaint(*settings: str, stage: int = 2) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the text
        debug(*settings, stage=stage)
    return str(caught.value)


# Layers


def test_a_leaf_set_by_two_files_names_both_and_the_key() -> None:
    with pytest.raises(ValueError, match="2 values are set by two files") as caught:
        merge([("a.json", {"x": {"y": 1, "z": 1}}), ("b.json", {"x": {"y": 1}, "w": [1]}), ("c.json", {"w": [2]})])
    text = str(caught.value)
    assert "x.y: set by a.json and by b.json" in text and "w: set by b.json and by c.json" in text
    assert "x.z" not in text


@pytest.mark.parametrize("second", [{"x": 1}, {"x": {"y": {"z": 1}}}])
def test_an_object_against_a_value_is_a_conflict(second: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set by a\.json and by b\.json"):
        merge([("a.json", {"x": {"y": 2}}), ("b.json", second)])


def test_merge_does_not_alias_its_inputs() -> None:
    layer = {"x": {"y": [1]}}
    tree = merge([("a.json", layer)])
    assign(tree, "x.y.0", 5, "--set")
    assert layer == {"x": {"y": [1]}} and tree.values == {"x": {"y": [5]}}
    assert tree.source("x.y.0") == "--set" and tree.source("x.y") == "a.json"


def test_override_replaces_and_is_listed() -> None:
    config = debug()
    entries = {entry.key: entry for entry in config.replaced}
    lr = entries["optimizer.params.lr"]
    assert (lr.old, lr.new) == (1e-5, config.optimizer.params.lr)
    assert lr.source.endswith("debug.json (override)")
    assert config.sources["optimizer.params.lr"] == lr.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" stands twice'),
        ('{"a": }', r":1:7: not JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[1]", "must hold one JSON object"),
    ],
)
def test_unreadable_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_json(tmp_path / "f.json")


def test_override_must_be_an_object() -> None:
    with pytest.raises(ValueError, match=r'm\.json: "override" is \[1\]'):
        apply_override(Tree(), [1], "stage1", "m.json")
    with pytest.raises(ValueError, match="of the stages stage1 and stage2"):
        apply_override(Tree(), {"stage3": {}}, "stage1", "m.json")


# --set


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-5", 1e-5),
        ("a=true", True),
        ("a=null", None),
        ("a=[1, 2]", [1, 2]),
        ("a=b=c", "b=c"),
        ("a=", ""),
    ],
)
def test_values_of_set_are_json_or_text(text: str, value: Any) -> None:
    assert parse_assignment(text) == ("a", value)


def test_set_reaches_defaults_lists_and_null_objects() -> None:
    config = debug(
        "visft.data.num_workers=9",
        "visft.param_groups.0.lr=0.5",
        "visft.model.overrides.depth=2",
        "visft.seed=1",
        "visft.seed=2",
    )
    assert config.visft.data.num_workers == 9 and config.visft.param_groups[0].lr == 0.5
    assert config.visft.model.backbone_options()["depth"] == 2
    assert config.visft.seed == 2  # the last one counts


@pytest.mark.parametrize("text", ["visft.seed", "=3"])
def test_set_without_key_or_value(text: str) -> None:
    assert "must be KEY=VALUE" in complaint(text)


def test_set_through_something_without_keys() -> None:
    assert "has no keys" in complaint("optimizer.params.lr.x=1")
    assert "is a list of 1; give a position below 1" in complaint("visft.param_groups.1.lr=1")


# Messages


def test_all_errors_at_once_with_value_source_and_advice() -> None:
    text = complaint(
        "visft.tasks.detection.batchsize=8",
        'optimizer.params.lr="1e-5"',
        "visft.seed=true",
        "visft.tasks.detection.batch_size=0",
        "visft.model.preset=eva_ee",
        "zero_optimisation.stage=2",
        "lr=1",
        "aio.block_size=auto",
    )
    assert text.startswith("the configuration has 8 errors:")
    for part in (
        "visft.tasks.detection.batchsize = 8 (--set): unknown key; did you mean visft.tasks.detection.batch_size?",
        'optimizer.params.lr = "1e-5" (--set): must be a number; it is a text: write 1e-5 without quotes',
        "visft.seed = true (--set): must be a whole number",
        "visft.tasks.detection.batch_size = 0 (--set): must be greater than or equal to 1",
        "must be 'eva_e', 'eva_g', 'debug' or 'timm:NAME'; did you mean eva_e?",
        'zero_optimisation = {"stage": 2} (--set): unknown key; did you mean zero_optimization?',
        "lr = 1 (--set): unknown key; did you mean optimizer.params.lr",
        'aio.block_size = "auto" (--set): "auto" is a word of other trainers',
    ):
        assert part in text


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("train_batch_size=8", "state visft.tasks.<task>.batch_size; derived values are printed"),
        ("train_micro_batch_size_per_gpu=8", "state visft.tasks.<task>.micro_batch"),
        ("gradient_accumulation_steps=8", "state visft.tasks.<task>.batch_size"),
        ("bf16.enabled=true", "state visft.model.precision"),
        ("fp16.enabled=true", "state visft.model.precision"),
        ("zero_optimization.cpu_offload=true", 'state "offload_optimizer": {"device": "cpu"}'),
        ("train_batchsize=8", "did you mean train_batch_size? That key may not be set"),
        ("override.x=1", "only a file in ds_configs/models may replace values"),
    ],
)
def test_keys_that_are_ours_say_where_to_go(setting: str, advice: str) -> None:
    assert advice in complaint(setting)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (1, ['visft.lora={"rank": 4, "alpha": 1, "targets": ["q"]}'], "stage 1 trains heads on the unchanged backbone"),
        (1, ["visft.heads.path=x"], "stage 1 trains new heads"),
        (2, ['visft.lora.targets=["q", "fc3"]'], "'fc2' with preset debug; did you mean fc"),
        (2, ["visft.model.preset=timm:resnet18"], "has its own shape: only image_size may be set, not width, depth, "),
        (2, ["visft.model.preset=timm:resnet18"], "--backbone timm:resnet18 in place of --set drops them"),
        (2, ["visft.model.preset=timm:resnet18", "visft.model.recompute=mlp"], "must be auto, none or block with timm"),
        (2, ["visft.model.preset=timm:"], "or 'timm:NAME'"),
        (2, ["scheduler.type=WarmupLR", "scheduler.params.cos_min_ratio=0.1"], "WarmupLR has no cosine"),
        (
            2,
            ['visft.param_groups=[{"name": "a", "params": "x"}, {"name": "a", "params": "y"}]'],
            "two groups are called a",
        ),
        (2, ["visft.param_groups=[]"], "the list should have at least 1 item"),
        (2, ["visft.run.keep_best=box/AP", "visft.run.eval_every=0"], "needs an evaluation during training"),
        (2, ["visft.run.keep_best=box/AP", "visft.run.eval_every=750"], "a step that is evaluated must be saved"),
        (
            2,
            ["visft.run.keep_best=box/Ap"],
            'keep_best = "box/Ap" (--set): is no metric of this run\'s tasks; did you mean box/AP?',
        ),
        (2, ["visft.run.keep_best=val/caption/cider"], "did you mean caption/CIDEr? known: box/AP, box/AP50, "),
        (2, ["visft.run.keep_best=mask/AP", "visft.tasks=detection"], "known: box/AP, box/AP50, box/AP75, box/APs, "),
        (
            2,
            ["scheduler.params.total_num_steps=2000", "visft.run.trace=[2001, 2010]"],
            "its first step 2001 comes after the last one of the run, 2000",
        ),
        (2, ["visft.tasks.detection.head.num_heads=7"], "is no multiple of num_heads = 7"),
        (2, ["visft.tasks.detection.image.crop_range=[9, 8]"], r"must be [smallest, largest]"),
        (2, ["zero_optimization.offload_param.device=cpu"], "needs zero_optimization.stage = 3"),
        (2, ["zero_optimization.offload_optimizer.device=cpu"], "zero_force_ds_cpu_optimizer: must be false"),
    ],
)
def test_contradictions(stage: int, settings: list[str], message: str) -> None:
    assert message in complaint(*settings, stage=stage)


def test_metrics_that_can_be_named_are_those_that_an_evaluation_gives() -> None:
    from visft_ds.tasks import TASKS

    corner = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "segmentation": [[0, 0, 4, 0, 4, 4]]}
    caption = {"image_id": 1, "caption": "a cat"}
    truth = {"images": [{"id": 1, "width": 8, "height": 8}], "categories": [{"id": 1, "name": "cat"}]}
    for task, spec in TASKS.items():
        words = task == "captioning"
        annotations = [caption if words else corner]
        found = spec.measure({**truth, "annotations": annotations}, [caption] if words else [], False)
        assert tuple(found) == spec.config.metrics and spec.config.main in found


def test_whole_floats_are_counts() -> None:
    assert debug("scheduler.params.total_num_steps=1e3").scheduler.params.total_num_steps == 1000
    assert "must be" in complaint("scheduler.params.total_num_steps=1000.5")


# What follows from a configuration


def test_the_default_is_the_papers_recipe() -> None:
    _, config = resolve_arguments(["--stage", "2"])
    visft, params = config.visft, config.optimizer.params
    assert (visft.model.name, visft.model.preset) == ("eva_e", "eva_e")
    assert visft.lora is not None and (visft.lora.rank, visft.lora.alpha, visft.lora.targets) == (64, 1.0, ("q", "v"))
    assert (params.lr, params.weight_decay, params.betas, params.eps) == (1e-5, 1e-4, (0.9, 0.999), 1e-8)
    assert (config.gradient_clipping, config.scheduler.type) == (0.1, "WarmupCosineLR")
    assert (config.scheduler.params.warmup_num_steps, config.scheduler.params.total_num_steps) == (2000, 100_000)
    assert derive_batches(config, 8).equations() == [
        "detection: 8 images = 8 processes x 1 accumulation x 1",
        "segmentation: 8 images = 8 processes x 1 accumulation x 1",
        "captioning: 64 images = 8 processes x 1 accumulation x 8",
    ]
    stage1 = resolve_arguments(["--stage", "1"])[1]
    assert (stage1.optimizer.params.lr, stage1.scheduler.params.total_num_steps) == (5e-5, 400_000)
    assert stage1.visft.lora is None and stage1.visft.heads.path is None


def test_a_resolved_configuration_given_back_is_the_same(tmp_path: Path) -> None:
    first = resolve(stage=2, model="debug", engine="zero3_offload", settings=["visft.seed=3"])
    (tmp_path / "own.json").write_text(json.dumps(first.to_dict()))
    arguments, second = resolve_arguments(["--deepspeed_config", str(tmp_path / "own.json")])
    assert second.to_dict() == first.to_dict() and second.fingerprint() == first.fingerprint()
    assert (arguments.stage, arguments.model, arguments.engine) == (2, None, None)


def test_the_fingerprint_holds_what_decides_the_result() -> None:
    base = debug()
    for same in (
        "visft.run.out=x",
        "visft.run.log_every=1",
        "visft.data.root=x",
        "visft.tasks.detection.micro_batch=1",
        "visft.tasks.captioning.micro_batch=1",
        "visft.shared.micro_batch=1",
        "visft.tasks.captioning.decoding.beam_size=3",
        "visft.tasks.captioning.vocabulary.file=words.json",
        "zero_optimization.stage=2",
    ):
        assert debug(same).fingerprint() == base.fingerprint(), same
    for other in (
        "optimizer.params.lr=1",
        "visft.seed=1",
        "visft.lora.rank=3",
        "visft.tasks.detection.image.flip=0.25",
        "visft.tasks.captioning.updates=9",
        "visft.tasks.captioning.vocabulary.min_count=9",
        "visft.mode=shared",
        "visft.param_groups.0.lr=1",
    ):
        changed = debug(other)
        assert changed.fingerprint() != base.fingerprint(), other
        assert len(identity_differences(base.identity(), changed.identity())) == 1
    assert identity_differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == ['b: 2 -> "(absent)"', 'c: "(absent)" -> 3']


@settings(deadline=None)
@given(share=st.integers(1, 40), micro=st.integers(1, 12), world=st.integers(1, 9))
def test_batches_divide_evenly_and_accumulate_as_little_as_possible(share: int, micro: int, world: int) -> None:
    config = debug(
        "visft.tasks=detection",
        f"visft.tasks.detection.batch_size={share * world}",
        f"visft.tasks.detection.micro_batch={micro}",
    )
    batches = derive_batches(config, world)
    assert batches.dp * batches.accumulation * batches.micro["detection"] == share * world
    assert batches.micro["detection"] <= micro
    fewer = [a for a in range(1, batches.accumulation) if share % a == 0]
    assert all(share // a > micro for a in fewer)


def test_batches_that_do_not_divide_name_what_does() -> None:
    with pytest.raises(ValueError, match="would not be whole") as caught:
        derive_batches(debug("visft.tasks.detection.batch_size=8"), 6)
    assert "batch_size = processes x accumulation x micro" in str(caught.value)
    assert "use batch_size 6 or 12" in str(caught.value) and "use 1, 2, 4, 8 processes" in str(caught.value)
    with pytest.raises(ValueError, match="more processes than images"):
        derive_batches(debug("visft.tasks.detection.batch_size=8"), 9)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", None)])
def test_the_dict_for_deepspeed(precision: Any, dtype: str | None) -> None:
    config = debug(
        "visft.model.precision=auto",
        "visft.tasks=detection",
        "visft.tasks.detection.batch_size=24",
        "visft.tasks.detection.micro_batch=4",
    )
    result = deepspeed_dict(config, 2, precision)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [result[key] for key in keys] == [24, 4, 3]
    assert result["gradient_clipping"] == config.gradient_clipping and result["steps_per_print"] > 10**8
    assert result["zero_optimization"]["reduce_bucket_size"] == 30_000_000
    autocast = None if dtype is None else {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    assert result.get("torch_autocast") == autocast


# Options are keyword arguments of the classes they configure; those of tasks: test_task_schema


def test_presets_and_overrides_match_the_backbone() -> None:
    from dataclasses import fields

    from visft_ds.models.eva_vit import PRESETS, EvaViTConfig

    assert set(schema.PRESETS) == set(PRESETS)
    assert set(schema.BackboneOverrides.model_fields) == {field.name for field in fields(EvaViTConfig)}


# Command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--stage is missing"),
        (["--stage", "3"], "--stage 3: must be 1"),
        (["--stage", "1", "--modle", "debug"], "--modle: unknown flag; did you mean --model?"),
        (["--stage", "1", "--zzz=3"], "Anything else: --set KEY=VALUE"),
        (["--stage", "1", "--model", "eva-e"], "did you mean eva_e? There are: clip_vit_b, convnext_b, debug"),
        (["--stage", "1", "--engine", "zero4"], "did you mean zero"),
        (["--stage", "1", "--resume", "yes"], "must be auto"),
        (["--stage", "1", "--set"], "expected one argument"),
        (["--deepspeed_config", "x.json", "--model", "debug"], "leave out --model"),
        (["--deepspeed_config", "no_such_file.json"], "no_such_file.json: no such file"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_arguments(argv)


def test_flags_reach_the_configuration() -> None:
    arguments, config = resolve_arguments(
        [
            "--local_rank=1",
            "--stage",
            "1",
            "--model",
            "debug",
            "--engine",
            "zero2",
            "--data",
            "d",
            "--out",
            "o",
            "--resume",
            "must",
            "--dry-run",
            "--set",
            "visft.seed=4",
        ]
    )
    assert (config.visft.data.root, config.visft.run.out, config.visft.seed) == ("d", "o", 4)
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert (arguments.resume, arguments.dry_run, config.sources["visft.data.root"]) == ("must", True, "--data")


def test_configuration_needs_no_tensor_library() -> None:
    """A wrong key must be reported in a second, also where torch takes ten to import."""
    code = (
        "import sys; from visft_ds.config import *; import visft_ds.monitor.console, visft_ds.monitor.metrics;"
        "missing_inputs(resolve_arguments(['--stage', '2'])[1]);"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_changed_configuration_is_refused_what_set_is_refused() -> None:
    config = debug("visft.run.eval_every=500")
    for text in ("visft.run.keep_best=box/Ap", f"visft.run.trace=[{config.total_steps + 1}, {config.total_steps + 2}]"):
        with pytest.raises(ValueError, match=text.partition("=")[0]):
            changed(config, [text])
