"""Models of timm that transformers has too, under its names and with its configuration. transformers is not imported.

Names are those of published files (https://huggingface.co/facebook/dinov3-vits16-pretrain-lvd1689m,
https://huggingface.co/openai/clip-vit-base-patch32, https://huggingface.co/google/siglip2-base-patch16-224), which
every version of transformers reads; inside the library some have changed. A tower that ended after a block is written
with the blocks up to it, whose last hidden state is then what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visft_ds.interop.files import Entry, TensorInfo, WeightFile, examples
from visft_ds.models.timm_backbone import TimmBackbone

#: Class of timm's activations -> transformers' word.
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_PARTS = ("q", "k", "v")
#: Of the pooling of SigLIP, behind its feature map.
_POOLING = "attn_pool."


@dataclass(frozen=True)
class VisionModel:
    """A class of transformers and the models of timm that it has.

    `outside` and `inside` (of a block) map names of modules or tensors; `block` is what a block is called.
    """

    family: str
    timm: str  #: pattern of names, without tag
    architecture: str
    model_type: str
    processor: str
    block: str
    attention: tuple[str, str]  #: names of its projections q, k and v (with {}), and of the one behind them
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    settings: Callable[[Any], dict[str, Any]] = field(default=lambda backbone: {})


def _clip(prefix: str) -> dict[str, Any]:
    """Names that CLIP and SigLIP share."""
    return {
        "block": f"{prefix}encoder.layers",
        "attention": ("self_attn.{}_proj", "self_attn.out_proj"),
        "outside": {
            "cls_token": f"{prefix}embeddings.class_embedding",
            "pos_embed": f"{prefix}embeddings.position_embedding.weight",
            "patch_embed.proj": f"{prefix}embeddings.patch_embedding",
            "norm_pre": f"{prefix}pre_layrnorm",
            "norm": f"{prefix}post_layernorm",
        },
        "inside": {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    }


def _dinov3_settings(backbone: Any) -> dict[str, Any]:
    block = backbone.blocks[0]
    return {
        "num_register_tokens": backbone.reg_token.shape[1],
        "use_gated_mlp": hasattr(block.mlp, "fc1_g"),
        "query_bias": block.attn.q_bias is not None,
        "key_bias": False,
        "value_bias": block.attn.v_bias is not None,
        "rope_theta": 100.0,
    }


VISION_MODELS = (
    VisionModel(
        family="DINOv3",
        timm=r"vit_\w+_dinov3(_qkvb)?",
        architecture="DINOv3ViTModel",
        model_type="dinov3_vit",
        processor="DINOv3ViTImageProcessor",
        block="layer",
        attention=("attention.{}_proj", "attention.o_proj"),
        outside={
            "cls_token": "embeddings.cls_token",
            "reg_token": "embeddings.register_tokens",
            "patch_embed.proj": "embeddings.patch_embeddings",
            "norm": "norm",
        },
        inside={
            **{name: name for name in ("norm1", "norm2")},
            **{f"gamma_{number}": f"layer_scale{number}.lambda1" for number in (1, 2)},
            **{"mlp.fc1": "mlp.up_proj", "mlp.fc1_x": "mlp.up_proj", "mlp.fc1_g": "mlp.gate_proj"},
            "mlp.fc2": "mlp.down_proj",
        },
        settings=_dinov3_settings,
    ),
    VisionModel(
        family="CLIP",
        timm=r"vit_[a-z]+_patch\d+(_plus)?_clip(_quickgelu)?_\d+",
        architecture="CLIPVisionModel",
        model_type="clip_vision_model",
        processor="CLIPImageProcessor",
        **_clip("vision_model."),
    ),
    VisionModel(
        family="SigLIP",
        timm=r"vit_[a-z0-9]+_patch\d+_siglip(_gap)?_\d+",
        architecture="SiglipVisionModel",
        model_type="siglip_vision_model",
        processor="SiglipImageProcessor",
        **_clip("vision_model."),
    ),
)


def vision_model(backbone: TimmBackbone) -> VisionModel:
    """The class of transformers that has a model of timm. Raises ValueError where there is none."""
    architecture = backbone.name.partition(".")[0]
    for known in VISION_MODELS:
        if re.fullmatch(known.timm, architecture):
            return known
    families = ", ".join(f"{known.family} ({known.architecture})" for known in VISION_MODELS)
    raise ValueError(
        f"timm's {backbone.name} is no model that is written for transformers: these are {families}. "
        f"Write --format timm, whose folder transformers loads by its TimmWrapperModel"
    )


def export_entries(file: WeightFile, backbone: TimmBackbone) -> dict[str, Entry]:
    """Name in transformers -> how it is made of `file`, whose tensors have timm's names.

    What lies behind the feature map is left out, but for SigLIP's pooling. Raises ValueError for a tensor of the
    backbone that the class has no place for.
    """
    known = vision_model(backbone)
    entries: dict[str, Entry] = {}
    unknown = []
    pooled = has_pooling(file, backbone)
    wanted = [*dict(backbone.named_parameters()), *(name for name in file if pooled and name.startswith(_POOLING))]
    for name in wanted:
        made = dict(_made_of(known, file, name))
        unknown += [] if made else [name]
        entries |= made
    if unknown:
        raise ValueError(f"transformers' {known.architecture} has no place for {examples(unknown)} of {backbone.name}")
    if known.model_type == "dinov3_vit":  # used in pretraining alone; published files have it
        info = TensorInfo((1, 1, backbone.width), file.dtype("cls_token"))
        entries["embeddings.mask_token"] = Entry((), info, partial(torch.zeros, info.shape, dtype=info.dtype))
    return entries


def has_pooling(file: WeightFile, backbone: TimmBackbone) -> bool:
    """Return True if a file has the attention by which a whole SigLIP pools its tokens."""
    return not backbone.layers_read and f"{_POOLING}latent" in file


def _made_of(known: VisionModel, file: WeightFile, name: str) -> Iterator[tuple[str, Entry]]:
    """(their name, entry) of all that is made of a tensor of timm's; nothing where it is unknown."""
    block = _BLOCK.fullmatch(name)
    if name.startswith(_POOLING):
        yield from _pooling(file, name)
    elif block is None:
        shape = {"pos_embed": 2, "cls_token": 1}.get(name) if known.model_type != "dinov3_vit" else None
        for theirs in _renamed(name, known.outside):
            yield theirs, _reshaped(file, name, file.shape(name)[-shape:] if shape else file.shape(name))
    else:
        stem, inner = f"{known.block}.{block[1]}.", block[2]
        projections, behind = known.attention
        if inner in ("attn.qkv.weight", "attn.qkv.bias"):
            for index, part in enumerate(_PARTS):
                yield f"{stem}{projections.format(part)}.{inner.rpartition('.')[2]}", _third(file, name, index)
        elif inner in ("attn.q_bias", "attn.v_bias"):
            yield f"{stem}{projections.format(inner[5])}.bias", Entry.same(file, name)
        else:
            for theirs in _renamed(inner, {**known.inside, "attn.proj": behind}):
                yield f"{stem}{theirs}", Entry.same(file, name)


def _renamed(name: str, names: Mapping[str, str]) -> Iterator[str]:
    module, _, leaf = name.rpartition(".")
    if name in names:
        yield names[name]
    elif module in names:
        yield f"{names[module]}.{leaf}"


def _pooling(file: WeightFile, name: str) -> Iterator[tuple[str, Entry]]:
    inner = name.removeprefix(_POOLING)
    names = {"latent": "probe", "norm": "layernorm", "proj": "attention.out_proj", "mlp.fc1": "mlp.fc1"}
    for theirs in _renamed(inner, {**names, "mlp.fc2": "mlp.fc2"}):
        yield f"vision_model.head.{theirs}", Entry.same(file, name)
    if inner.startswith(("q.", "kv.")):  # parts of one tensor there
        leaf = inner.rpartition(".")[2]
        parts = (f"{_POOLING}q.{leaf}", f"{_POOLING}kv.{leaf}")
        info = file.infos[parts[0]]
        shape = (3 * info.shape[0], *info.shape[1:])
        yield f"vision_model.head.attention.in_proj_{leaf}", Entry(parts, TensorInfo(shape, info.dtype), _join)


def _third(file: WeightFile, name: str, index: int) -> Entry:
    info = file.infos[name]
    shape = (info.shape[0] // 3, *info.shape[1:])
    return Entry((name,), TensorInfo(shape, info.dtype), lambda value: value.chunk(3)[index])


def _reshaped(file: WeightFile, name: str, shape: tuple[int, ...]) -> Entry:
    return Entry((name,), TensorInfo(shape, file.dtype(name)), lambda value: value.reshape(shape))


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def settings(backbone: TimmBackbone, *, pooled: bool, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """File -> content (JSON) by which transformers' Auto classes load the weights and prepare images.

    Raises ValueError for an activation that transformers has no word for.
    """
    known, side = vision_model(backbone), backbone.image_size
    blocks: Any = backbone.blocks
    block = blocks[0]
    activation = type(block.mlp.act).__name__
    if activation not in _ACTIVATIONS:
        raise ValueError(f"transformers has no word for the activation {activation} of timm's {backbone.name}")
    config = {
        "architectures": [known.architecture],
        "model_type": known.model_type,
        "hidden_size": backbone.width,
        "intermediate_size": block.mlp.fc2.in_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": side,
        "patch_size": backbone.patch_size,
        "hidden_act": _ACTIVATIONS[activation],
        "layer_norm_eps": block.norm1.eps,
        "attention_dropout": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        **known.settings(backbone),
    }
    if known.family == "SigLIP":
        config["vision_use_head"] = pooled
    size: dict[str, Any] = {"size": {"height": side, "width": side}}
    if known.family == "CLIP":
        size = {"size": {"shortest_edge": side}, "crop_size": size["size"], "do_center_crop": True}
    processor = {
        "image_processor_type": known.processor,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(backbone.pixel_mean),
        "image_std": list(backbone.pixel_std),
        **size,
    }
    return {"config.json": config, "preprocessor_config.json": processor}
