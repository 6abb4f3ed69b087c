"""timm's names (no prefix), and which timm model a tower is.

Models: `eva02_enormous_patch14_clip_224` (post-norm) and `eva_giant_patch14_clip_224` (pre-norm),
https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/eva.py. timm itself is imported where its
configurations are asked for alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visft_ds.interop.files import Entry, WeightFile, examples
from visft_ds.interop.layouts import Layout, Tower
from visft_ds.models.timm_backbone import TimmBackbone

# Pixels in [0, 1] are normalised with these in EVA-CLIP's own training and evaluation (ViSFT trains with ImageNet's).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POST_NORM, PRE_NORM = "eva02_enormous_patch14_clip_224", "eva_giant_patch14_clip_224"


#: What timm knows of pretrained weights that holds for trained ones too; the latter where positions keep their size.
_SIZES = ("test_input_size", "min_input_size", "test_crop_pct", "pool_size")
_SETTINGS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("first_conv", "classifier"),
    *_SIZES,
)


def export_entries(file: WeightFile, layout: Layout) -> dict[str, Entry]:
    """Name in a timm file -> what it is made of: the tower of `file`, which has the given layout, and nothing else."""
    prefix = layout.prefix
    return {name[len(prefix) :]: Entry.same(file, name) for name in file if name.startswith(prefix)}


def model_arguments(tower: Tower, num_classes: int = 0) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) for `timm.create_model` to build exactly this tower.

    Where the tower has no class token, timm's `pos_embed` has no entry for it either: load `pos_embed[:, 1:]`.
    `num_classes` is the number of rows of `head.weight` where the file has one (1024 for EVA-CLIP).
    Raises ValueError where the number of heads or the norm placement is not known.
    """
    if tower.num_heads is None or tower.post_norm is None:
        raise ValueError("number of heads and norm placement of the tower are not known; state them")
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if tower.preset() not in ("eva_e", "eva_g") or tower.image_size != 224:
        arguments |= {
            "img_size": tower.image_size,
            "patch_size": tower.patch_size,
            "embed_dim": tower.width,
            "depth": tower.depth,
            "num_heads": tower.num_heads,
            "mlp_ratio": tower.mlp_ratio,
        }
    if not tower.class_token:
        # timm pools by the class token or moves the final norm behind the pooling; ours norms every patch.
        arguments |= {
            "class_token": False,
            "global_pool": "avg",
            "use_fc_norm": False,
            "use_post_transformer_norm": True,
        }
    return (POST_NORM if tower.post_norm else PRE_NORM), arguments


def settings(tower: Tower, num_classes: int) -> dict[str, Any] | None:
    """config.json, by which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds and loads this tower.

    None for a tower without class token: timm would resize the positions that it does not expect.
    """
    if not tower.class_token:
        return None
    name, arguments = model_arguments(tower, num_classes)
    side = tower.image_size
    pretrained = {
        "input_size": [3, side, side],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": list(MEAN),
        "std": list(STD),
        "num_classes": num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": name,
        "num_classes": num_classes,
        "num_features": num_classes or tower.width,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": pretrained,
    }


def create_model_call(tower: Tower, num_classes: int = 0, **more: Any) -> str:
    """`timm.create_model("...", num_classes=0, ...)` as Python text, with `more` arguments."""
    name, arguments = model_arguments(tower, num_classes)
    given = {**arguments, **more}
    return ", ".join([f'timm.create_model("{name}"', *(f"{key}={value!r}" for key, value in given.items())]) + ")"


def classes_in(classifier: str | Sequence[str] | None, shapes: Mapping[str, Sequence[int]]) -> int:
    """`num_classes` of the model of timm that has these tensors, by the names of its classifiers; 0 without one."""
    return next((shapes[f"{name}.weight"][0] for name in classifier_names(classifier) if f"{name}.weight" in shapes), 0)


def config_of(backbone: TimmBackbone, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json, by which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds and loads these tensors;
    notes). None, and why, where they are not all that timm's model has, and no more.
    """
    import timm

    classes = classes_in(backbone.classifier_names, shapes)
    with torch.device("meta"):
        model = timm.create_model(backbone.name, num_classes=classes, **backbone.options)
    wanted = model.state_dict().keys()
    lacks, more = [key for key in wanted if key not in shapes], [key for key in shapes if key not in wanted]
    if lacks or more:
        facts = [f"lacks {examples(lacks)}"] * bool(lacks) + [f"has {examples(more)} beside it"] * bool(more)
        return None, [f"timm does not load this by itself: of its {backbone.name} the base {' and '.join(facts)}"]
    known = model.pretrained_cfg
    kept = {key: known[key] for key in _SETTINGS if known.get(key) is not None}
    if side := backbone.options.get("img_size"):
        kept = {key: value for key, value in kept.items() if key not in _SIZES} | {"input_size": [3, side, side]}
    return {
        "architecture": known["architecture"],
        "num_classes": classes,
        "num_features": model.num_features,
        "model_args": backbone.options,
        "pretrained_cfg": kept | {"num_classes": classes},
    }, []


def classifier_names(classifier: str | Sequence[str] | None) -> list[str]:
    """Names of the classifiers that timm's configuration of a model tells."""
    return [classifier] if isinstance(classifier, str) else list(classifier or ())
