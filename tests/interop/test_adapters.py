"""Published ViSFT LoRA files mean what the reference computes, and adapters only go where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.random_tower import adapter_of, build_backbone, change_of
from visft_ds.interop.published import read_visft_lora
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import lora_layers

WIDTH, RANK = 8, 2


def _tiny(depth: int = 2) -> EvaViT:
    sizes = {"width": WIDTH, "depth": depth, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 28}
    return build_backbone("debug", **sizes)  # type: ignore[arg-type]


def _published(depth: int = 2, prefix: str = "visual.") -> dict[str, Tensor]:
    tensors = {}
    for index in range(depth):
        tensors[f"{prefix}blocks.{index}.attn.qkv.lora_A"] = torch.randn(2 * RANK, WIDTH)
        tensors[f"{prefix}blocks.{index}.attn.qkv.lora_B"] = torch.randn(2 * WIDTH, RANK)
    return tensors


@pytest.mark.parametrize("prefix", ["visual.", "visft_heads.backbone.0.", ""])
def test_a_published_file_changes_q_and_v_by_one_over_r(tmp_path: Path, prefix: str) -> None:
    tensors = _published(prefix=prefix)
    # Stage-2 checkpoints of the reference hold heads and a loss constant beside the LoRA tensors.
    rest = {"visft_heads.query_embeds.weight": torch.zeros(3), "det_losses.empty_weight": torch.zeros(92)}
    torch.save({"model": tensors | rest} if prefix.startswith("visft") else tensors, tmp_path / "lora.pt")
    model = _tiny()
    adapter = read_visft_lora(tmp_path / "lora.pt")
    adapter.install(model)
    assert (adapter_of(model).rank, adapter_of(model).alpha, adapter_of(model).targets) == (
        2,
        1.0,
        ("q", "v"),
    )
    a, b = (tensors[f"{prefix}blocks.1.attn.qkv.lora_{part}"] for part in "AB")
    expected = torch.zeros(3 * WIDTH, WIDTH)
    expected[:WIDTH] = b[:WIDTH] @ a[:RANK] / RANK
    expected[2 * WIDTH :] = b[WIDTH:] @ a[RANK:] / RANK
    assert torch.allclose(change_of(lora_layers(model)["blocks.1.attn.qkv"]), expected, atol=1e-6)
    assert torch.allclose(adapter.delta("blocks.1.attn.qkv.weight"), expected, atol=1e-6)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    first = "visual.blocks.0.attn.qkv.lora_A"
    for changes, message in (
        ({first: torch.full((4, WIDTH), float("inf"))}, "holds NaN or infinity"),
        ({first: torch.zeros(3)}, "LoRA of ViSFT"),
        ({"visual.blocks.1.attn.qkv.lora_A": torch.zeros(3, WIDTH)}, "blocks.1.attn.qkv.lora_A is"),
    ):
        torch.save({**_published(), **changes}, tmp_path / "lora.pt")
        with pytest.raises(ValueError, match=message):
            read_visft_lora(tmp_path / "lora.pt").install(_tiny())
