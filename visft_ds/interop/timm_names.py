"""timm's names (no prefix), and which timm model a tower is.

Models: `eva02_enormous_patch14_clip_224` (post-norm) and `eva_giant_patch14_clip_224` (pre-norm),
https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/eva.py. timm itself is not imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visft_ds.interop.files import Entry, WeightFile
from visft_ds.interop.layouts import Layout, Tower

# Pixels in [0, 1] are normalised with these in EVA-CLIP's own training and evaluation (ViSFT trains with ImageNet's).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POST_NORM, PRE_NORM = "eva02_enormous_patch14_clip_224", "eva_giant_patch14_clip_224"


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


def classifier_names(classifier: str | Sequence[str] | None) -> list[str]:
    """Names of the classifiers that timm's configuration of a model tells."""
    return [classifier] if isinstance(classifier, str) else list(classifier or ())
