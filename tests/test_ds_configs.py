"""Every file in ds_configs/ is used, valid, and says only what the schema and DeepSpeed know."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest

from visft_ds.config import deepspeed_dict, derive_batches, resolve
from visft_ds.config.deepspeed_keys import REFUSED, REFUSED_ZERO, DeepSpeedKeys
from visft_ds.config.layers import CONFIG_ROOT, leaves
from visft_ds.config.resolve import available
from visft_ds.config.schema import Recipe
from visft_ds.config.validate import known_keys

FILES = sorted(CONFIG_ROOT.rglob("*.json"))


def given_keys(values: Any, prefix: str = "") -> set[str]:
    """Dotted keys of all leaves, "*" for a position in a list."""
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        return set().union(*(given_keys(item, f"{prefix}*.") for item in values))
    if isinstance(values, dict) and values:
        return set().union(*(given_keys(value, f"{prefix}{key}.") for key, value in values.items()))
    return {prefix[:-1]}


def scalar_keys() -> list[str]:
    """Every known key that is no object, the first entry standing for a list of objects."""
    prefixes = tuple(f"{key}." for key in known_keys())
    parents = {prefix[:-1] for prefix in prefixes if any(key.startswith(prefix) for key in known_keys())}
    return [key.replace("*", "0") for key in known_keys() if key not in parents]


@pytest.mark.parametrize(
    ("stage", "engine", "model"), list(product((1, 2), available("engines"), available("models"))), ids=str
)
def test_every_combination_resolves(stage: int, engine: str, model: str) -> None:
    config = resolve(stage=stage, engine=engine, model=model)
    assert config.visft.stage == stage and config.visft.model.name == model
    assert config.visft.run.out == f"runs/stage{stage}-{model}"
    assert derive_batches(config, 8).dp == 8
    precision = "bf16" if config.visft.model.precision == "auto" else config.visft.model.precision
    assert not {"visft", "optimizer", "scheduler"} & deepspeed_dict(config, 8, precision).keys()


def test_files_are_where_the_layers_look_for_them() -> None:
    folders = {path.relative_to(CONFIG_ROOT).parent.as_posix() for path in FILES}
    assert folders == {".", "engines", "models"}
    assert {path.stem for path in FILES if path.parent == CONFIG_ROOT} == {"stage1", "stage2"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_known(path: Any) -> None:
    values = json.loads(path.read_text())
    overridden = {key for stage in values.pop("override", {}).values() for key in stage}
    assert (given_keys(values) | overridden) <= set(known_keys())


def test_stage_engine_and_model_files_keep_to_their_subject() -> None:
    for path in FILES:
        values = json.loads(path.read_text())
        engine_file = path.parent.name == "engines"
        assert ("zero_optimization" in values) == engine_file, path
        assert ("visft" in values) != engine_file, path
        assert "override" not in values or path.parent.name == "models", path


def test_no_default_of_the_schema_is_repeated_in_a_file() -> None:
    """A value that stands in two places gets changed in one of them. Debug states small sizes on purpose."""
    full = dict(leaves(resolve(stage=2, model="eva_e").to_dict()))
    given = {key for path in FILES if path.stem != "debug" for key in given_keys(json.loads(path.read_text()))}
    assert full["visft.tasks.detection.head.num_queries"] == 100  # a default that is in no file
    defaults = {
        key
        for key in known_keys()
        if key.startswith("visft.tasks.detection.") and key.split(".")[3] in ("head", "loss")
    }
    assert not given & defaults


def test_every_misspelt_key_is_reported_with_its_right_name() -> None:
    """All keys of the schema and of DeepSpeed, each with a letter too many, in one configuration."""
    leaf_keys = scalar_keys()
    with pytest.raises(ValueError, match="errors:") as caught:
        resolve(stage=2, settings=[f"{key}x=1" for key in leaf_keys])
    lines = {line.strip().split(" ")[0]: line for line in str(caught.value).splitlines()}
    for key in leaf_keys:
        assert "unknown key; did you mean" in lines[key + "x"] and key in lines[key + "x"].split("did you mean")[1]
        assert "(--set)" in lines[key + "x"]


def test_every_wrong_type_is_reported() -> None:
    """A list of a list fits nowhere: each key must say so, all in one message."""
    leaf_keys = scalar_keys()
    with pytest.raises(ValueError, match="errors:") as caught:
        resolve(stage=2, settings=[f"{key}=[[]]" for key in leaf_keys])
    for key in leaf_keys:
        assert f"  {key}" in str(caught.value)


@pytest.mark.parametrize("engine", available("engines"))
def test_deepspeed_accepts_every_engine(engine: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = resolve(stage=2, model="debug", engine=engine, settings=["gradient_clipping=0.25"])
    parsed = DeepSpeedConfig(deepspeed_dict(config, 1, "fp32"))
    assert parsed.zero_optimization_stage == int(engine[4]) and parsed.gradient_clipping == 0.25
    assert parsed.train_batch_size == config.visft.tasks.enabled()["detection"].batch_size
    assert (parsed.zero_config.offload_optimizer is not None) == engine.endswith("offload")


def test_the_list_of_deepspeed_keys_is_that_of_the_installed_release() -> None:
    """Records every top-level key DeepSpeed's own parser asks for."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked: set[str] = set()

    class Recording(dict):  # type: ignore[type-arg]
        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Recording(train_batch_size=1))
    known = {*REFUSED, *DeepSpeedKeys.model_fields, *Recipe.model_fields}
    # Ours, and one that is asked for only within a process group.
    assert asked == known - {"visft", "sequence_parallel_size"}

    theirs = {info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items()}
    ours = {key.split(".")[1] for key in known_keys() if key.startswith("zero_optimization.")}
    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    assert theirs == (ours | set(REFUSED_ZERO)) - removed
