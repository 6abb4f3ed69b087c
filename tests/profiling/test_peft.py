"""`tools/profile.py peft`: timm under PEFT computes what our tower does, or is not compared; record, wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools.profile import main
from visft_ds.models.eva_vit import RECOMPUTE, build_backbone
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.profiling import peft
from visft_ds.profiling.peft import BASELINE, PLAIN, adapter_gradients, peft_on_timm

pytest.importorskip("timm")
SMALL = ["peft", "--small", "--repeats", "1", "--pixels", "28", "--rank", "2", "--dtypes", "fp32"]


def test_frozen_tensors_are_shared_and_gradients_agree() -> None:
    backbone = build_backbone("eva_e", width=32, depth=2, num_heads=2, mlp_ratio=2.0, image_size=28)
    inject_lora(backbone.requires_grad_(False), rank=3, alpha=6.0)
    for parameter in lora_parameters(backbone).values():
        torch.nn.init.normal_(parameter, std=0.1)
    adapted = peft_on_timm(backbone, torch.float32)
    storages = {p.untyped_storage().data_ptr() for n, p in backbone.named_parameters() if "lora" not in n}
    theirs = {p.untyped_storage().data_ptr() for n, p in adapted.named_parameters() if "lora" not in n}
    assert theirs == storages
    images = torch.randn(2, 3, 28, 28)
    model = adapted.get_submodule("base_model.model")
    outputs = backbone.tokens(images), model.forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(outputs[0].shape)
    for output in outputs:
        (output * weights).sum().backward()
    got, wanted = adapter_gradients(adapted, backbone)
    assert len(got) == 2 * 2 * 2 * 3 * 32 and float((got - wanted).norm() / wanted.norm()) < 1e-5
    got, wanted = (one.view(4, 2, -1) for one in (got, wanted))
    assert (got.norm(dim=2) > 0).all() and (wanted.norm(dim=2) > 0).all()


def test_with_its_dtypes_kept_timm_has_our_stream_in_fp32() -> None:
    backbone = build_backbone("eva_e", width=32, depth=1, num_heads=2, mlp_ratio=2.0, image_size=28)
    for name, parameter in backbone.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            parameter.data = parameter.data.bfloat16()
    inject_lora(backbone.requires_grad_(False), rank=3, alpha=6.0)
    images, model = torch.randn(1, 3, 28, 28), peft_on_timm(backbone, None).get_submodule("base_model.model")
    streams = []
    for block in (backbone.get_submodule("blocks.0"), model.get_submodule("blocks.0")):
        block.register_forward_pre_hook(lambda _, given: streams.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = backbone.tokens(images), model.forward_features(images)  # type: ignore[operator]
    assert streams == [torch.float32, torch.float32]
    torch.testing.assert_close(*outputs, rtol=0, atol=5e-2)


def test_record_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", str(tmp_path / "peft.json")]) == 0
    (result,) = json.loads((tmp_path / "peft.json").read_text(encoding="utf-8"))["results"]
    cases = result["cases"]
    assert set(cases) == {BASELINE, PLAIN, "ours, none", *(f"ours, {policy}" for policy in RECOMPUTE)}
    assert cases[BASELINE]["speed"]["median"] == cases[BASELINE]["memory_ratio"] == 1
    assert result["gradients_differ_by"] < 1e-4
    assert "28 px (4 tokens), 1 image(s), fp32" in capsys.readouterr().out


def test_what_does_not_compute_the_same_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "AGREE", {"fp32": 0.0})
    with pytest.raises(RuntimeError, match="gradients of timm \\+ PEFT and ours differ by"):
        main(SMALL)


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("visft_ds.flags.find_spec", lambda name: None if name == "timm" else name)
    assert main(SMALL) == 2
    assert "profile peft needs timm, not installed here: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "fp64"], "give some of fp32, bf16, fp16"),
        (["--pixels", "30"], "sides of whole patches of 14"),
        (["--batch", "0"], "must be at least 1"),
        (["--stream", "bf16"], "give 16bit or fp32"),
        (["--repeat", "3"], "did you mean --repeats"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
