"""What stage 2 trains is configuration: each method of docs/training.md trains what it says."""

from __future__ import annotations

import json

import pytest

from tests.tiny import TINY
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.prepare.model import PreparedModel, prepare_model, stage_name
from visft_ds.tasks.vocabulary import Vocabulary

WORDS = Vocabulary(("a", "red", "circle", "square"))
SMALL = {"width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 28}


def configured(*settings: str, stage: int = 2) -> ResolvedConfig:
    tiny = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    return resolve(stage=stage, model="debug", settings=[*tiny, *settings])


def prepared(*settings: str) -> PreparedModel:
    config = configured(*settings)
    return prepare_model(config.visft, config.optimizer.params, vocabulary=WORDS)


#: Lines of docs/training.md -> endings of the names that train.
METHODS: dict[str, tuple[list[str], set[str]]] = {
    "lora": ([], {"lora_A", "lora_B"}),
    "bias": (["visft.lora=null", "visft.param_groups=backbone.*bias"], {"bias", "q_bias", "v_bias"}),
    "norms": (["visft.lora=null", "visft.param_groups=backbone.*norm*"], {"weight", "bias"}),
    "both": (["visft.param_groups=backbone.*.lora_*,backbone.*norm*"], {"lora_A", "lora_B", "weight", "bias"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_what_it_says(method: str) -> None:
    lines, endings = METHODS[method]
    model = prepared(*lines)
    trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert trained == {name for group in model.groups for name in group.names}
    assert {name.rpartition(".")[2] for name in trained} == endings
    assert all(name.startswith("backbone.") for name in trained)
    assert model.module.train_backbone and not model.module.heads_active


def test_all_and_the_last_block() -> None:
    everything = prepared("visft.lora=null", "visft.param_groups=backbone.*").groups[0]
    assert everything.count == sum(p.numel() for p in everything.parameters) > 20_000
    last = prepared("visft.lora=null", "visft.param_groups=backbone.blocks.1.*, backbone.norm.*").groups[0]
    assert {name.split(".")[1] for name in last.names} == {"blocks", "norm"}
    assert not any(".blocks.0." in name for name in last.names) and len(last.names) == 15


def test_random_heads_train_along_and_need_no_stage_1() -> None:
    config = configured("visft.heads.start=random")
    assert config.visft.heads.path is None and stage_name(config.visft) == "lora and heads"
    assert [(group.name, group.params) for group in config.visft.param_groups][1:] == [("heads", "heads.*")]
    again = resolve(whole=(config.to_dict(), "the record"))
    assert again.fingerprint() == config.fingerprint()
    own = configured("visft.heads.start=random", 'visft.param_groups.1={"name": "h", "params": "heads.*", "lr": 1e-3}')
    assert [group.lr for group in own.visft.param_groups] == [None, 1e-3]
    model = prepared("visft.heads.start=random")
    assert model.module.heads_active and all(p.requires_grad for p in model.module.heads.parameters())
    with pytest.raises(ValueError, match="takes no heads of stage 1"):
        configured("visft.heads.start=random", "visft.heads.path=somewhere")


def test_globs_of_one_group_of_which_a_head_is_off() -> None:
    group = 'visft.param_groups=[{"name": "all", "params": "heads.detection.*,heads.captioning.*"}]'
    config = configured("visft.tasks=detection", group, stage=1)
    assert [group.params for group in config.visft.param_groups] == ["heads.detection.*"]
