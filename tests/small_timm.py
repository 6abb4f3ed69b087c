"""Models of the families that transformers has too, under names of their kind, but small; timm builds them by
name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.random_tower import adapter_of, move_adapters
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import fingerprint_of, load_backbone
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import TimmBackbone

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_NORM = partial(LayerNorm, eps=1e-5)
_DINOV3: dict[str, Any] = {
    **{"dynamic_img_size": True, "init_values": 1e-5, "rope_type": "dinov3", "rope_temperature": 100},
    **{"rope_rotate_half": True, "use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_reg_tokens": 4},
    **{"use_fc_norm": False, "norm_layer": _NORM},
}
_SIGLIP: dict[str, Any] = {"class_token": False, "global_pool": "map"}
#: Name -> arguments, as timm's own models of the family have them.
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_test_patch8_dinov3": _DINOV3 | {"qkv_bias": False},
    "vit_test_plus_patch8_dinov3_qkvb": _DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8},
    "vit_test_patch8_clip_quickgelu_32": {"pre_norm": True, "norm_layer": _NORM, "act_layer": "quick_gelu"},
    "vit_test_patch8_siglip_32": _SIGLIP | {"act_layer": "gelu_tanh"},
    "vit_test_patch8_siglip_gap_32": {"class_token": False, "global_pool": "avg", "fc_norm": False},
}
_CONFIG = {
    **{"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "num_classes": 0},
    **{
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
    },
    "classifier": "head",
}


#: timm looks here for what is known of them.
default_cfgs = timm.models.generate_default_cfgs(dict.fromkeys(FAMILIES, _CONFIG))


def _register(name: str) -> None:
    def create(pretrained: bool = False, **given: Any) -> nn.Module:
        kind = Eva if "dinov3" in name else VisionTransformer
        return timm.models.build_model_with_cfg(
            kind, name, pretrained, **{**SIZES, **FAMILIES[name], **given}
        )

    create.__name__, create.__module__ = name, __name__
    timm.models.register_model(create)


for _name in FAMILIES:
    _register(_name)


def random_base(name: str, folder: Path) -> Path:
    """A file with a whole model, pooling included, in which no value is one that models begin with."""
    generator = torch.Generator().manual_seed(1)
    model = timm.create_model(name, num_classes=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "gamma" in key or ("norm" in key and key.endswith("weight")):
                parameter.add_(1.0)
    path = folder / "base.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def adapted(name: str, base: Path, layers: tuple[int, ...] = ()) -> tuple[TimmBackbone, Adapter]:
    """The backbone over a base with an adapter that matters, and that adapter."""
    model = {"preset": f"timm:{name}", **({"layers": layers} if layers else {})}
    backbone: TimmBackbone = load_backbone(base, model).eval()
    targets = ("stages.*.mlp.fc2",) if name == "test_convnext" else ("q", "v", "blocks.*.mlp.fc2")
    inject_lora(backbone, rank=3, alpha=1.5, targets=targets)
    move_adapters(backbone)
    return backbone, adapter_of(backbone, fingerprint_of(backbone, base), targets)
