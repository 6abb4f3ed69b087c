"""timm's DINOv3, CLIP and SigLIP, and the EVA-G of BLIP-2, as transformers' own classes: names of published
files, and configuration.

Other models need nothing: transformers loads timm's folder itself (TimmWrapperModel).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from visft_ds.interop.formats import Written
from visft_ds.interop.weights import Lazy, Weights, derived
from visft_ds.models import Backbone
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.settings.bands import in_words

#: Layer -> (ours, which part of its rows, of how many).
Parts = dict[str, tuple[str, int, int]]
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
_CLIP = {
    r"blocks\.(\d+)\.attn\.proj": r"vision_model.encoder.layers.\1.self_attn.out_proj",
    r"blocks\.(\d+)\.attn\.(\w_proj)": r"vision_model.encoder.layers.\1.self_attn.\2",
    r"blocks\.(\d+)\.norm(\d)": r"vision_model.encoder.layers.\1.layer_norm\2",
    r"blocks\.(\d+)\.": r"vision_model.encoder.layers.\1.",
    r"cls_token$": "vision_model.embeddings.class_embedding",
    r"pos_embed$": "vision_model.embeddings.position_embedding.weight",
    r"patch_embed\.proj": "vision_model.embeddings.patch_embedding",
    r"norm_pre": "vision_model.pre_layrnorm",
    r"norm\b": "vision_model.post_layernorm",
    r"attn_pool\.latent": "vision_model.head.probe",
    r"attn_pool\.norm": "vision_model.head.layernorm",
    r"attn_pool\.proj": "vision_model.head.attention.out_proj",
    r"attn_pool\.mlp": "vision_model.head.mlp",
}
_DINO = {
    r"blocks\.(\d+)\.attn\.proj": r"layer.\1.attention.o_proj",
    r"blocks\.(\d+)\.attn\.([qv])_bias": r"layer.\1.attention.\2_proj.bias",
    r"blocks\.(\d+)\.attn\.": r"layer.\1.attention.",
    r"blocks\.(\d+)\.gamma_(\d)": r"layer.\1.layer_scale\2.lambda1",
    r"blocks\.(\d+)\.mlp\.fc1_g": r"layer.\1.mlp.gate_proj",
    r"blocks\.(\d+)\.mlp\.fc1(_x)?": r"layer.\1.mlp.up_proj",
    r"blocks\.(\d+)\.mlp\.fc2": r"layer.\1.mlp.down_proj",
    r"blocks\.(\d+)\.": r"layer.\1.",
    r"cls_token$": "embeddings.cls_token",
    r"reg_token$": "embeddings.register_tokens",
    r"patch_embed\.proj": "embeddings.patch_embeddings",
}
_BLIP2 = {
    r"blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.projection",
    r"blocks\.(\d+)\.attn\.q_bias": r"encoder.layers.\1.self_attn.qkv.bias",
    r"blocks\.(\d+)\.attn\.": r"encoder.layers.\1.self_attn.",
    r"blocks\.(\d+)\.norm(\d)": r"encoder.layers.\1.layer_norm\2",
    r"blocks\.(\d+)\.": r"encoder.layers.\1.",
    r"cls_token$": "embeddings.class_embedding",
    r"pos_embed$": "embeddings.position_embedding",
    r"patch_embed\.proj": "embeddings.patch_embedding",
    r"norm\b": "post_layernorm",
}
_EVA = ("Blip2VisionModel", "blip_2_vision_model", "BlipImageProcessor", _BLIP2)
#: Pattern of timm's names -> class, model type, image processor, names.
_FAMILIES: Mapping[str, tuple[str, str, str, Mapping[str, str]]] = {
    r"vit_\w+_dinov3(_qkvb)?": ("DINOv3ViTModel", "dinov3_vit", "DINOv3ViTImageProcessor", _DINO),
    r"vit_\w+_clip(_quickgelu)?_\d+": ("CLIPVisionModel", "clip_vision_model", "CLIPImageProcessor", _CLIP),
    r"vit_\w+_siglip(_gap)?_\d+": ("SiglipVisionModel", "siglip_vision_model", "SiglipImageProcessor", _CLIP),
}


def _family_of(backbone: Backbone) -> tuple[str, str, str, Mapping[str, str]] | None:
    """The entry of `_FAMILIES` for a backbone; None: transformers has no such class."""
    if not isinstance(backbone, TimmBackbone):
        return None if backbone.post_norm else _EVA
    name = backbone.name.partition(".")[0]
    for pattern, family in _FAMILIES.items():
        if re.fullmatch(pattern, name):
            return family
    return None


def layers_of(backbone: Backbone, layers: Iterable[str]) -> Parts:
    """Layer of transformers' class -> (ours, which part of its rows, of how many); empty without a class.

    The names begin where all classes have the same: a whole CLIP has `vision_model.` in front of them, others
    have `model.`.
    """
    family = _family_of(backbone)
    if family is None:
        return {}
    parts_of: Parts = {}
    for layer in layers:
        parts = {layer: (layer, 0, 1)}
        if layer.endswith(".qkv"):
            stem = layer.removesuffix("qkv")
            parts = {f"{stem}{letter}_proj": (layer, part, 3) for part, letter in enumerate("qkv")}
        for name, part_of in parts.items():
            theirs = _renamed(f"{name}.weight", family[3]).removesuffix(".weight")
            parts_of[theirs.removeprefix("vision_model.")] = part_of
    return parts_of


def written(tower: Weights, file: Weights, backbone: Backbone) -> Written:
    """Content in transformers' form, see `Format.content`. Raises ValueError for a model of no such
    class.
    """
    family = _family_of(backbone)
    if family is None:
        raise ValueError(
            f"transformers has no class for {backbone.describe()}, only of DINOv3, CLIP, SigLIP and "
            "EVA-G: give --format timm, whose folder AutoModel loads"
        )
    kind, model_type, processor, rules = family
    of_eva = family is _EVA
    if of_eva and backbone.bands is not None:
        raise ValueError(
            f"the model reads {in_words(backbone.bands)}, and BLIP-2's tower three colours: "
            "give --format timm"
        )
    if of_eva and "cls_token" not in tower:
        raise ValueError(
            f"{file.path} has no class token, which BLIP-2 reads: give EVA-CLIP's file as the base"
        )
    model: Any = backbone
    pooled = "attn_pool.latent" in tower and not backbone.layers_read
    names = {name for name, _ in backbone.named_parameters()}
    tensors: dict[str, Lazy] = {}
    for name in tower:
        if name in names or (pooled and name.startswith("attn_pool.")):
            for part, tensor in _parts(name, tower, model_type):
                tensors[_renamed(part, rules)] = tensor
    dtype = tower["patch_embed.proj.weight"].dtype
    side = backbone.image_size
    block = model.blocks[0]
    config = {
        "architectures": [kind],
        "model_type": model_type,
        "hidden_size": backbone.width,
        "intermediate_size": block.mlp.fc2.in_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": side,
        "patch_size": backbone.patch_size,
        "hidden_act": "gelu" if of_eva else _ACTIVATIONS[type(block.mlp.act).__name__],
        "layer_norm_eps": block.norm1.eps,
        "attention_dropout": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if model_type == "dinov3_vit":
        mask = (1, 1, backbone.width)  # of pretraining alone; published files have it
        tensors["embeddings.mask_token"] = Lazy(mask, dtype, partial(torch.zeros, mask, dtype=dtype))
        config |= {
            "num_register_tokens": model.reg_token.shape[1],
            "use_gated_mlp": hasattr(block.mlp, "fc1_g"),
            "query_bias": block.attn.q_bias is not None,
            "key_bias": False,
            "value_bias": block.attn.v_bias is not None,
            "rope_theta": 100.0,
        }
    if model_type == "siglip_vision_model":
        config["vision_use_head"] = pooled
    square = {"height": side, "width": side}
    images: dict[str, Any] = {
        "image_processor_type": processor,
        "size": square,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(backbone.pixel_mean),
        "image_std": list(backbone.pixel_std),
    }
    if kind == "CLIPVisionModel":
        images |= {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    files = {"config.json": config, "preprocessor_config.json": images}
    if backbone.bands is not None:
        config["num_channels"] = len(backbone.pixel_mean)
        del files["preprocessor_config.json"]  # processors of transformers know colours and grey alone
    return Written(Weights(tensors, tower.path), files)


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    """The name by the first rule whose pattern it begins with."""
    for pattern, theirs in rules.items():
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", theirs, name)
    return name


def _parts(name: str, tower: Weights, model_type: str) -> Iterator[tuple[str, Lazy]]:
    """(name, tensor) of what transformers makes of a tensor: thirds of a qkv, joined parts of a pooling, or
    it; BLIP-2 keeps the qkv whole, and has the biases of q, k (0) and v in one.
    """
    tensor = tower[name]
    of_eva = model_type == "blip_2_vision_model"
    if of_eva and name.endswith(".q_bias"):
        of_v = tower[name.replace("q_bias", "v_bias")]
        yield name, derived(lambda q, v: torch.cat([q, torch.zeros_like(q), v]), tensor, of_v)
    elif of_eva:
        if not name.endswith(".v_bias"):
            yield name, tensor
    elif match := re.fullmatch(r"(.+\.attn\.)qkv\.(weight|bias)", name):
        for index, letter in enumerate("qkv"):
            third = partial(lambda index, qkv: qkv.chunk(3)[index], index)
            yield f"{match[1]}{letter}_proj.{match[2]}", derived(third, tensor)
    elif match := re.fullmatch(r"attn_pool\.q\.(weight|bias)", name):
        joined = derived(lambda q, kv: torch.cat([q, kv]), tensor, tower[f"attn_pool.kv.{match[1]}"])
        yield f"vision_model.head.attention.in_proj_{match[1]}", joined
    elif model_type != "dinov3_vit" and name in ("pos_embed", "cls_token"):
        yield name, derived(torch.squeeze, tensor)  # without the axes of the batch
    elif not name.startswith("attn_pool.kv."):
        yield name, tensor
