"""PEFT is the judge of our adapter folders: it loads them onto a timm model and computes what our model computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from visft_ds.interop.files import open_weights
from visft_ds.interop.peft import FILE, README, read_adapter_folder, save_peft_adapter
from visft_ds.interop.timm_names import model_arguments

from tests.random_tower import move_adapters, random_tower, relative, save_backbone
from tools.merge_lora import main
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.layouts import LAYOUTS, tower_of
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
    adapter = adapter_of(model, base_sha256="0" * 64)
    return save_peft_adapter(adapter, folder / "adapter", tower_of(model))


def _base_file(model: EvaViT, path: Path, layout: str) -> Path:
    """The tower under timm's names, or in another layout as part of a CLIP, with class token, projection and texts."""
    save_backbone(model, path, layout)
    if layout == "timm":
        return path
    prefix, width = LAYOUTS[layout].prefix, model.width
    whole = {f"{prefix}cls_token": torch.randn(1, 1, width), "text.ln_final.weight": torch.randn(5)}
    head = {"weight": torch.randn(7, width), "bias": torch.randn(7)}
    whole |= {f"{prefix}head.{name}": value for name, value in head.items()}
    save_file(whole | load_file(path), path, open_weights(path).metadata)
    return path


def _timm_twin(model: EvaViT, *, separate: bool) -> torch.nn.Module:
    name, arguments = model_arguments(tower_of(model))
    twin = timm.create_model(name, **arguments).eval()
    lora = lora_parameters(model)
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name not in lora})
    for block in twin.blocks:
        block.attn.qkv_bias_separate = separate
    return twin


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_on_timm_computes_what_ours_computes(tmp_path: Path, targets: tuple[str, ...]) -> None:
    ours = _adapted(targets, post_norm="k" not in targets)
    theirs = peft.PeftModel.from_pretrained(_timm_twin(ours, separate=True), _export(ours, tmp_path)).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        wanted, got = ours.tokens(images), theirs.forward_features(images)
        with theirs.disable_adapter():
            plain = theirs.forward_features(images)
    assert relative(wanted, plain) > 1e-2, "the adapter must matter, or the next line proves nothing"
    assert relative(got, wanted) < TOLERANCE
    adapted = {name for name, parameter in theirs.named_parameters() if ".lora_" in name}
    assert len(adapted) == len(lora_parameters(ours)), "PEFT must adapt these layers and no other"


def test_without_the_separate_bias_peft_is_a_silent_no_op_on_timm(tmp_path: Path) -> None:
    ours = _adapted()
    theirs = peft.PeftModel.from_pretrained(_timm_twin(ours, separate=False), _export(ours, tmp_path)).eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        got = theirs.forward_features(images)
        with theirs.disable_adapter():
            assert torch.equal(theirs.forward_features(images), got)
        assert relative(ours.tokens(images), got) > 1e-2


@pytest.mark.parametrize(
    ("layout", "class_token"),
    [("timm", True), ("open_clip", False), ("eva_clip", False)],
)
def test_the_readme_runs_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, class_token: bool
) -> None:
    """Command, then code. Towers are trained without the class token that the file of a whole CLIP has."""
    ours = _adapted(class_token=class_token)
    folder = _export(ours, tmp_path)
    base = random_tower(class_token=class_token)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(ours.get_parameter(name))
    file = _base_file(base, tmp_path / "clip.safetensors", layout)
    text = (folder / README).read_text(encoding="utf-8")
    (command,) = re.findall(r"```sh\nvisft merge (.*?)\n```", text)
    words = {"FILE": str(file), "FOLDER/base.safetensors": str(folder / "base.safetensors")}
    assert main([words.get(word, word) for word in command.split()]) == 0
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(snippet, README, "exec"), names)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        model: Any = names["model"]
        got = model.forward_features(images)
        with model.disable_adapter():
            plain = model.forward_features(images)
        assert relative(got, plain) > 1e-2, "as loaded by the README the adapter must have an effect"
        assert relative(got, ours.tokens(images)) < TOLERANCE
        assert len([name for name, _ in model.named_parameters() if ".lora_A." in name]) == 2


@pytest.mark.parametrize("targets", TARGETS)
def test_what_we_wrote_reads_back_bit_for_bit(tmp_path: Path, targets: tuple[str, ...]) -> None:
    ours = _adapted(targets)
    adapter = read_adapter_folder(_export(ours, tmp_path))
    assert (adapter.rank, adapter.alpha, adapter.targets) == (3, 1.5, targets) and adapter.base_sha256 == "0" * 64
    other = random_tower()
    adapter.install(other)
    expected = lora_parameters(ours)
    assert {name: value.tolist() for name, value in lora_parameters(other).items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_other_folders_are_no_adapters(tmp_path: Path) -> None:
    folder = _export(_adapted(), tmp_path)
    with pytest.raises(ValueError, match="not overwritten"):
        _export(_adapted(), tmp_path)
    tensors, header = load_file(folder / FILE), open_weights(folder / FILE).metadata
    lost = dict(list(tensors.items())[1:])
    short = {name: value[:-1] if name.endswith("lora_A") else value for name, value in tensors.items()}
    for changed, metadata in ((lost, header), (short, header), (tensors, {})):
        save_file(changed, folder / FILE, metadata)
        with pytest.raises(ValueError, match=FILE):
            read_adapter_folder(folder)
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match="no adapter"):
        read_adapter_folder(folder)
