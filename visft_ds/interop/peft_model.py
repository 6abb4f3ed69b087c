"""timm's tower under PEFT's LoRA with the values of a tower of ours: what an adapter costs and does elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.layouts import is_lora, tower_of
from visft_ds.interop.peft import adapter_config, peft_tensors
from visft_ds.interop.timm_names import model_arguments
from visft_ds.models.eva_vit import EvaViT


def peft_on_timm(backbone: EvaViT, dtype: torch.dtype | None) -> nn.Module:
    """timm's model with separate q, k and v under PEFT, ready to train the same adapters.

    On timm's fused qkv PEFT does nothing (docs/weights.md). Frozen tensors of the wanted dtype are shared with the
    backbone; adapters are copies, in fp32 as PEFT keeps them.

    Args:
        backbone: with adapters, not merged.
        dtype: of everything that is frozen; None: each tensor as the backbone has it, so that all are shared.

    Raises:
        ValueError: timm is not installed, or the backbone has no adapters.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"timm is needed to compare with it: pip install timm>=1.0.20 ({error})") from error
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    adapter = adapter_of(backbone)
    name, arguments = model_arguments(tower_of(backbone))
    with torch.device("meta"):
        model = timm.create_model(name, qkv_fused=False, **arguments)
    model.load_state_dict(_split(backbone, dtype), assign=True)
    settings = adapter_config(adapter, split=True)
    config = LoraConfig(r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=settings["target_modules"])
    adapted = get_peft_model(model.requires_grad_(False), config)
    tensors = peft_tensors(adapter, split=True)
    outcome = set_peft_model_state_dict(adapted, {key: value.to(_device(backbone)) for key, value in tensors.items()})
    assert not outcome.unexpected_keys, outcome.unexpected_keys
    assert not any(p.is_meta for p in adapted.parameters())
    return adapted.train()


def adapter_gradients(adapted: nn.Module, backbone: EvaViT) -> tuple[Tensor, Tensor]:
    """All gradients of the adapters of `peft_on_timm` and of the backbone it was made from, flat, in one order."""
    theirs = {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in adapted.named_parameters()
        if is_lora(name.replace(".default.", "."))
    }
    adapter = adapter_of(backbone)
    gradients = {name: backbone.get_parameter(name).grad for name in adapter.tensors}
    assert all(gradient is not None for gradient in (*theirs.values(), *gradients.values()))
    adapter.tensors.update({name: gradient for name, gradient in gradients.items() if gradient is not None})
    ours = peft_tensors(adapter, split=True)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    flat = [theirs[name] for name in ours]
    return torch.cat([gradient.flatten() for gradient in flat if gradient is not None]), torch.cat(
        [v.flatten() for v in ours.values()]
    )


def _device(backbone: EvaViT) -> torch.device:
    return backbone.pos_embed.device


def _split(backbone: EvaViT, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tower's own tensors under timm's names, q, k and v as views of the fused projection."""
    tensors = {name: p.detach().to(dtype or p.dtype) for name, p in backbone.named_parameters() if not is_lora(name)}
    if backbone.cls_token is None:
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]  # timm keeps none for a class token that is not there
    for index in range(backbone.depth):
        stem = f"blocks.{index}.attn."
        for part, rows in zip("qkv", tensors.pop(f"{stem}qkv.weight").chunk(3), strict=True):
            tensors[f"{stem}{part}_proj.weight"] = rows
        for part in "qv":
            tensors[f"{stem}{part}_proj.bias"] = tensors.pop(f"{stem}{part}_bias")
    return tensors
