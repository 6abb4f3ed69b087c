"""Magnitudes (DoRA): the paper's formula and gradient, nothing at the start, exact merges, and PEFT as the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.random_tower import fold_adapters, move_adapters, random_tower, relative, save_backbone
from visft_ds.interop.adapter import Adapter, adapter_of, average
from visft_ds.interop.files import sha256_file
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.merge import merge_into_file, verify_merge
from visft_ds.interop.peft import CONFIG, read_peft_adapter, save_peft_adapter
from visft_ds.interop.timm_names import model_arguments
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import has_effect, inject_lora, lora_layers, lora_parameters
from visft_ds.ops.lora import Slices, dora_linear, lora_linear, row_lengths

QV: Slices = ((0, 8), (16, 24))
SCALE = 0.5
# fp32, two blocks: both sides differ by the order of additions only.
TOLERANCE = 1e-5


def _tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, weight, bias, A, B, magnitude of a layer 6 -> 24 with rank 2 on two slices of 8."""
    shapes = ((5, 6), (24, 6), (24,), (4, 6), (16, 2), (16,))
    x, weight, bias, a, b, magnitude = (torch.randn(*shape, dtype=dtype) for shape in shapes)
    return x, weight, bias, a, b, magnitude.abs() + 0.5


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
    """Equation 5 of the paper on two slices, the length in the denominator without a gradient (equation 11)."""
    parts = []
    for index, (lo, hi) in enumerate(((0, 8), (16, 24))):
        turned = weight[lo:hi] + SCALE * b[index * 8 : (index + 1) * 8] @ a[index * 2 : (index + 1) * 2]
        length = turned.detach().norm(dim=1)
        parts.append(turned * (magnitude[index * 8 : (index + 1) * 8] / length)[:, None])
    return F.linear(x, torch.cat([parts[0], weight[8:16], parts[1]]), bias)


@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_are_the_papers(with_bias: bool) -> None:
    tensors = [t.requires_grad_() for t in _tensors()]
    if not with_bias:
        tensors[2] = None  # type: ignore[call-overload]
    wrt = [t for t in tensors if t is not None]
    x, weight, bias, a, b, magnitude = tensors
    ours = dora_linear(x, weight, bias, a, b, magnitude, SCALE, QV)
    wanted = _dense(x, weight, bias, a, b, magnitude)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    seed = torch.randn_like(ours)
    for got, expected in zip(torch.autograd.grad(ours, wrt, seed), torch.autograd.grad(wanted, wrt, seed), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_lengths_change_nothing_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias, a, b, _ = (t.to(dtype) for t in _tensors())
    lengths = row_lengths(weight, a, b, SCALE, QV)
    plain = lora_linear(x, weight, bias, a, b, SCALE, QV)
    assert torch.equal(dora_linear(x, weight, bias, a, b, lengths, SCALE, QV), plain)
    assert not torch.equal(dora_linear(x, weight, bias, a, b, 1.1 * lengths, SCALE, QV), plain)


def test_a_row_of_zeros_stays_one() -> None:
    x, weight, bias, a, b, _ = _tensors()
    weight[3], b[3] = 0.0, 0.0
    lengths = row_lengths(weight, a, b, SCALE, QV)
    assert dora_linear(x, weight, bias, a, b, lengths, SCALE, QV).isfinite().all()


def _moved(model: EvaViT, targets: tuple[str, ...] = ("q", "v")) -> EvaViT:
    inject_lora(model, rank=3, alpha=1.5, targets=targets, magnitude=True)
    move_adapters(model)
    return model


def _outputs(model: EvaViT, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.tokens(images)


def test_nothing_at_the_start_and_then_what_its_dense_change_does() -> None:
    model, images = random_tower(), torch.randn(2, 3, 28, 28)
    plain = _outputs(model, images)
    inject_lora(model, rank=3, alpha=1.5, targets=("q", "v", "fc1"), magnitude=True)
    assert torch.equal(_outputs(model, images), plain)
    assert has_effect(model, images) > 1e-3
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if not name.endswith("lora_A"):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    adapted = _outputs(model, images)
    assert relative(adapted, plain) > 1e-2
    fold_adapters(model)
    assert relative(_outputs(model, images), adapted) < TOLERANCE


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "fc1", "proj")])
def test_peft_computes_the_same_reads_ours_and_is_read(tmp_path: Path, targets: tuple[str, ...]) -> None:
    peft, timm = pytest.importorskip("peft"), pytest.importorskip("timm")
    base, images = random_tower(), torch.randn(2, 3, 28, 28)
    name, arguments = model_arguments(tower_of(base))
    state = dict(base.state_dict())
    for block in range(2):
        parts = state.pop(f"blocks.{block}.attn.qkv.weight").chunk(3)
        for part, value in zip("qkv", parts, strict=True):
            state[f"blocks.{block}.attn.{part}_proj.weight"] = value.clone()
        for part in "qv":
            state[f"blocks.{block}.attn.{part}_proj.bias"] = state.pop(f"blocks.{block}.attn.{part}_bias")

    def twin() -> torch.nn.Module:
        model: torch.nn.Module = timm.create_model(name, **arguments, qkv_fused=False).eval()
        model.load_state_dict(state)
        return model

    ours = _moved(base, targets)
    folder = save_peft_adapter(adapter_of(ours), tmp_path / "ours", tower_of(ours), split=True)
    theirs = peft.PeftModel.from_pretrained(twin(), folder).eval()
    with torch.no_grad():
        got = theirs.forward_features(images)
        with theirs.disable_adapter():
            assert relative(theirs.forward_features(images), got) > 1e-2
        assert relative(got, _outputs(ours, images)) < TOLERANCE
    again = read_peft_adapter(folder)
    other = random_tower()
    again.install(other)
    assert all(torch.equal(value, lora_parameters(other)[n]) for n, value in lora_parameters(ours).items())
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_peft_adapter(tmp_path / "theirs")
    assert read.magnitude and read.targets == again.targets
    assert all(torch.equal(value, again.tensors[n]) for n, value in read.tensors.items())
    assert read.tensors.keys() == again.tensors.keys()


def _saved(folder: Path) -> tuple[Path, Adapter]:
    base = random_tower()
    save_backbone(base, folder / "base.safetensors")
    return folder / "base.safetensors", adapter_of(_moved(base), base_sha256=sha256_file(folder / "base.safetensors"))


def test_the_merged_file_computes_what_the_adapter_does(tmp_path: Path) -> None:
    base, adapter = _saved(tmp_path)
    report = merge_into_file(base, adapter, tmp_path / "merged.safetensors")
    assert report.total.retained == pytest.approx(1, abs=1e-3)
    proof = verify_merge(base, adapter, tmp_path / "merged.safetensors", report.tower, dtype=torch.float32)
    assert proof.passed and proof.effect > 1e-2


def test_what_magnitudes_do_not_allow_is_refused(tmp_path: Path) -> None:
    base, adapter = _saved(tmp_path)
    with pytest.raises(ValueError, match="write peft_split"):
        save_peft_adapter(adapter, tmp_path / "fused", tower_of(random_tower()))
    with pytest.raises(ValueError, match="cannot be scaled"):
        adapter.scaled(0.5)
    with pytest.raises(ValueError, match="cannot be averaged"):
        average([adapter, adapter])
    folder = save_peft_adapter(adapter, tmp_path / "split", tower_of(random_tower()), split=True)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(ValueError, match="use_dora=False"):
        read_peft_adapter(folder)
    assert base.is_file()


def test_first_lengths_follow_from_the_weight_alone() -> None:
    """ZeRO-3 has taken A and B away when the magnitudes of a model are filled in."""
    model = random_tower()
    inject_lora(model, rank=3, targets=("q", "v"), magnitude=True)
    layer = lora_layers(model)["blocks.0.attn.qkv"]
    layer.lora_A.data = layer.lora_B.data = torch.empty(0)
    assert layer.lora_magnitude is not None
    assert torch.equal(layer.first_magnitude(layer.weight), layer.lora_magnitude)
