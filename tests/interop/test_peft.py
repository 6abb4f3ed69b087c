"""PEFT is the judge of our adapter folders: it loads them onto a timm model and computes what our model
computes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.elsewhere import run_readme
from tests.random_tower import (
    adapter_of,
    merge,
    move_adapters,
    random_tower,
    relative,
    save_adapter,
    save_backbone,
)
from visft_ds.interop.adapter import FILE, PEFT_CONFIG, Adapter
from visft_ds.interop.card import card
from visft_ds.interop.export import timm_model
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import Lazy, open_weights
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import inject_lora, lora_parameters

peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
# fp32, two blocks: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5
TARGETS = [("q", "v"), ("v",), ("q", "k", "v"), ("q", "v", "proj", "fc1", "fc2"), ("proj", "fc2")]


def _adapted(targets: tuple[str, ...] = ("q", "v"), **kind: bool) -> EvaViT:
    model = random_tower(**kind)
    inject_lora(model, rank=3, alpha=1.5, targets=targets)
    move_adapters(model)
    return model


def _export(model: EvaViT, folder: Path) -> Path:
    return save_adapter(adapter_of(model, "0" * 64), folder / "adapter")


def _timm_twin(model: EvaViT) -> torch.nn.Module:
    lora = lora_parameters(model)
    values = {name: value for name, value in model.state_dict().items() if name not in lora}
    name, arguments = timm_model(model, {key: Lazy.of(value) for key, value in values.items()})
    twin = timm.create_model(name, **arguments).eval()
    twin.load_state_dict(values)
    for block in twin.blocks:
        block.attn.qkv_bias_separate = True
    return twin


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_on_timm_computes_what_ours_computes(tmp_path: Path, targets: tuple[str, ...]) -> None:
    ours = _adapted(targets, post_norm="k" not in targets)
    theirs = peft.PeftModel.from_pretrained(_timm_twin(ours), _export(ours, tmp_path)).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        wanted, got = ours.tokens(images)[0], theirs.forward_features(images)
        with theirs.disable_adapter():
            plain = theirs.forward_features(images)
    assert relative(wanted, plain) > 1e-2, "the adapter must matter, or the next line proves nothing"
    assert relative(got, wanted) < TOLERANCE
    adapted = {name for name, parameter in theirs.named_parameters() if ".lora_" in name}
    assert len(adapted) == len(lora_parameters(ours)), "PEFT must adapt these layers and no other"


def test_the_readme_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a base that `visft merge` wrote for timm, as it says."""
    ours = _adapted()
    save_backbone(ours, tmp_path / "base.safetensors", "visual.")
    out = merge(tmp_path / "base.safetensors", adapter_of(ours), tmp_path / "out", "--format", "peft")
    merge(tmp_path / "base.safetensors", None, out / "BASE")
    model, images = run_readme(out, monkeypatch)["model"], torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert relative(model.forward_features(images), ours.tokens(images)[0]) < TOLERANCE


@pytest.mark.parametrize("targets", TARGETS)
def test_what_we_wrote_reads_back_bit_for_bit(tmp_path: Path, targets: tuple[str, ...]) -> None:
    ours = _adapted(targets)
    folder = _export(ours, tmp_path)
    adapter = read_adapter(folder)
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.base) == (3, 1.5, targets, "0" * 64)
    assert json.loads((folder / PEFT_CONFIG).read_text())["base_model_name_or_path"] is None
    adapter.save(folder, "timm/test_vit.r160_in1k")
    assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == "timm/test_vit.r160_in1k"
    other = random_tower()
    adapter.install(other)
    expected = lora_parameters(ours)
    assert {name: value.tolist() for name, value in lora_parameters(other).items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_other_folders_are_no_adapters(tmp_path: Path) -> None:
    folder = _export(_adapted(), tmp_path)
    tensors, header = load_file(folder / FILE), open_weights(folder / FILE).metadata
    lost = dict(list(tensors.items())[1:])
    for changed, metadata in ((lost, header), (tensors, {})):
        save_file(changed, folder / FILE, metadata)
        with pytest.raises(ValueError, match=FILE):
            Adapter.load(folder)


def test_a_card_keeps_its_table_whole() -> None:
    """A bare pipe would end a cell, and the value fall out of the table."""
    text = card("x", "timm", random_tower(), None, base=None, facts={"|missing| / |change|": "0.5"})
    (row,) = (line for line in text.splitlines() if "missing" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
