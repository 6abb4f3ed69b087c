"""PEFT is the judge of our adapter folders: it loads them onto a timm model and computes what our model computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.random_tower import move_adapters, random_tower, relative, save_backbone
from tools.merge_lora import main
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.files import open_weights
from visft_ds.interop.layouts import LAYOUTS, tower_of
from visft_ds.interop.peft import CONFIG, README, WEIGHTS, read_peft_adapter, save_peft_adapter
from visft_ds.interop.timm_names import model_arguments
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


def _export(model: EvaViT, folder: Path, *, split: bool = False) -> Path:
    adapter = adapter_of(model, base_sha256="0" * 64)
    return save_peft_adapter(adapter, folder / "adapter", tower_of(model), split=split)


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


@pytest.mark.parametrize("split", [False, True], ids=["fused qkv", "separate q, k, v"])
@pytest.mark.parametrize(
    ("layout", "class_token"),
    [("timm", True), ("timm", False), ("open_clip", True), ("open_clip", False), ("eva_clip", False)],
)
def test_the_readme_runs_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, class_token: bool, split: bool
) -> None:
    """Command, then code. Towers are trained without the class token that the file of a whole CLIP has."""
    ours = _adapted(class_token=class_token)
    folder = _export(ours, tmp_path, split=split)
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
        assert len([name for name, _ in model.named_parameters() if ".lora_A." in name]) == (4 if split else 2)


@pytest.mark.parametrize("split", [False, True], ids=["fused qkv", "separate q, k, v"])
@pytest.mark.parametrize("targets", TARGETS)
def test_what_we_wrote_reads_back_bit_for_bit(tmp_path: Path, targets: tuple[str, ...], split: bool) -> None:
    ours = _adapted(targets)
    adapter = read_peft_adapter(_export(ours, tmp_path, split=split))
    assert (adapter.rank, adapter.alpha, adapter.targets) == (3, 1.5, targets) and adapter.base_sha256 == "0" * 64
    other = random_tower()
    adapter.install(other)
    expected = lora_parameters(ours)
    assert {name: value.tolist() for name, value in lora_parameters(other).items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_an_untrained_adapter_of_ours_keeps_its_slices(tmp_path: Path) -> None:
    """lora_B is zero at the start: its structure cannot be seen, only remembered."""
    model = random_tower()
    inject_lora(model, rank=3, targets=("q", "v"))
    assert read_peft_adapter(_export(model, tmp_path)).targets == ("q", "v")


def test_peft_saves_it_again_and_we_still_read_it(tmp_path: Path) -> None:
    """PEFT drops our metadata; slices, rank and scaling then come from the zero blocks and its own settings."""
    ours = _adapted(("q", "v", "proj"))
    theirs = peft.PeftModel.from_pretrained(_timm_twin(ours, separate=True), _export(ours, tmp_path))
    theirs.save_pretrained(tmp_path / "again")
    adapter = read_peft_adapter(tmp_path / "again")
    assert (adapter.rank, adapter.targets, adapter.base_sha256) == (3, ("q", "v", "proj"), None)
    assert adapter.alpha == pytest.approx(1.5)
    wanted = adapter_of(ours)
    for weight in wanted.weights():
        assert torch.allclose(adapter.delta(weight), wanted.delta(weight), atol=1e-7)


def test_an_adapter_that_peft_trained_on_separate_projections_is_read(tmp_path: Path) -> None:
    ours = random_tower()
    name, arguments = model_arguments(tower_of(ours))
    twin = timm.create_model(name, **arguments, qkv_fused=False).eval()
    own = dict(ours.state_dict())
    for index in range(2):
        stem = f"blocks.{index}.attn."
        for part, rows in zip("qkv", own.pop(stem + "qkv.weight").chunk(3), strict=True):
            own[f"{stem}{part}_proj.weight"] = rows
        own |= {f"{stem}{part}_proj.bias": own.pop(f"{stem}{part}_bias") for part in "qv"}
    twin.load_state_dict(own)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(twin, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_peft_adapter(tmp_path / "theirs")
    assert (adapter.rank, adapter.alpha, adapter.targets) == (3, 6.0, ("q", "v"))
    adapter.install(ours)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert relative(ours.tokens(images), theirs.forward_features(images)) < TOLERANCE
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    lost = {name: value for name, value in tensors.items() if ".1.attn.v_proj.lora_A" not in name}
    save_file(lost, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(ValueError, match=r"no tensor .*blocks\.1\.attn\.v_proj\.lora_A"):
        read_peft_adapter(tmp_path / "theirs")


@pytest.mark.parametrize("rank", [4, 6])  # of which only one can be divided by the three slices
def test_an_adapter_that_peft_trained_on_the_whole_qkv_is_refused(tmp_path: Path, rank: int) -> None:
    config = peft.LoraConfig(r=rank, lora_alpha=4, target_modules=["attn.qkv"], init_lora_weights=False)
    peft.get_peft_model(_timm_twin(_adapted(), separate=True), config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="cannot be split into separate adapters of q, k and v"):
        read_peft_adapter(tmp_path / "dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"peft_type": "IA3"}, "type 'IA3' are not LoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"alpha_pattern": {"attn.qkv": 50.0}}, "one rank and one scaling"),
    ],
)
def test_settings_that_mean_something_else_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = _export(_adapted(("q", "v", "proj")), tmp_path)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_peft_adapter(folder)


def test_rank_stabilised_scaling_is_understood(tmp_path: Path) -> None:
    model = _adapted(("q", "v"))
    folder = _export(model, tmp_path)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | {"use_rslora": True}), encoding="utf-8")
    theirs = peft.PeftModel.from_pretrained(_timm_twin(model, separate=True), folder)
    layer = theirs.base_model.model.blocks[1].attn.qkv
    delta = read_peft_adapter(folder).delta("blocks.1.attn.qkv.weight")
    assert torch.allclose(delta, layer.get_delta_weight("default"), atol=1e-6)


def test_incomplete_and_foreign_folders(tmp_path: Path) -> None:
    folder = _export(_adapted(), tmp_path)
    with pytest.raises(ValueError, match="not overwritten"):
        _export(_adapted(), tmp_path)
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace("attn.qkv", "attn.w_proj"): value for name, value in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="not an adapter for the blocks of timm's EVA"):
        read_peft_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match="holds no adapter"):
        read_peft_adapter(folder)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*a)*b", "(.|a|aa)+$", ".*qkv", "attn.(qkv|proj)", "[a-z]{9}", r"\w", "attn?", "", "a$$", "\\"],
)
def test_patterns_that_could_run_for_ever_are_refused(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _export(_adapted(("q", "v", "proj")), tmp_path)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {pattern: 1.0}}), encoding="utf-8")
    monkeypatch.setattr("visft_ds.interop.peft._pattern", lambda *_: pytest.fail("the pattern was run"))
    with pytest.raises(ValueError, match="alpha_pattern") as caught:
        read_peft_adapter(folder)
    assert repr(pattern) in str(caught.value) and str(folder / CONFIG) in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("attn.qkv",),
        (re.escape("attn.qkv"),),
        ("blocks.0.attn.qkv", "1.attn.qkv"),
        ("^blocks.0.attn.qkv$", r"^blocks\.1\.attn.qkv"),
    ],
)
def test_names_as_patterns_mean_what_they_mean_to_peft(tmp_path: Path, names: tuple[str, ...]) -> None:
    """Ends of names and whole ones, plain, escaped and between anchors."""
    folder = _export(_adapted(("q", "v", "proj")), tmp_path)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert config["alpha_pattern"] == {"attn.qkv": 3.0}
    (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": dict.fromkeys(names, 3.0)}), encoding="utf-8")
    assert read_peft_adapter(folder).alpha == 1.5
    theirs = peft.utils.other.get_pattern_key
    assert {theirs(names, f"blocks.{index}.attn.qkv") for index in range(2)} == set(names)


def test_patterns_that_are_no_names_with_numbers(tmp_path: Path) -> None:
    folder = _export(_adapted(), tmp_path)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | {"alpha_pattern": ["attn.qkv"]}), encoding="utf-8")
    with pytest.raises(ValueError, match="alpha_pattern is"):
        read_peft_adapter(folder)
