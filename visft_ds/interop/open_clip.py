"""open_clip's whole model (`CustomTextCLIP`): the tower under `visual.trunk.`, the text side as EVA-CLIP names it.

Names and configurations: https://github.com/mlfoundations/open_clip, models EVA02-E-14(-plus) and EVA01-g-14(-plus).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from visft_ds.interop import eva_clip
from visft_ds.interop import timm_names as timm
from visft_ds.interop.files import Entry, WeightFile
from visft_ds.interop.foreign_code import LOCAL
from visft_ds.interop.layouts import LAYOUTS, Layout, Tower

LAYOUT = LAYOUTS["open_clip"]
FILE, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_RESBLOCK = re.compile(r"text\.transformer\.resblocks\.(\d+)\.")
# Width of a head of the text tower: in every configuration of EVA-CLIP, and of CLIP itself. No tensor's shape shows it.
_TEXT_HEAD = 64


def export_entries(file: WeightFile, layout: Layout) -> dict[str, Entry]:
    """Name in an open_clip file -> what it is made of: tower, CLIP projection and text side.

    Raises ValueError where one of them is missing: open_clip loads whole models only.
    """
    entries = eva_clip.export_entries(file, layout, LAYOUT)
    missing = eva_clip.missing_parts(entries, LAYOUT.prefix)
    if not missing and "text.positional_embedding" not in entries:
        missing = ["text tower under `text.`"]
    if missing:
        raise ValueError(
            f"{file.path} has no {', '.join(missing)}, and open_clip loads whole models only: give EVA-CLIP's or "
            f"open_clip's whole file as the base"
        )
    return entries


def settings(weights: WeightFile, tower: Tower, folder: Path) -> dict[str, dict[str, Any]]:
    """File -> content (JSON) by which open_clip builds the whole model from `folder` alone, its final place.

    Towers that timm has no name for are built by timm from a config.json of their own, which open_clip's configuration
    names by its absolute path: nothing else would find it from every working folder. Empty where the number of heads or
    the place of the norms is not known, or without class token.
    """
    if tower.post_norm is None:
        return {}
    rows = weights.shape(LAYOUT.prefix + "head.weight")[0]
    trunk, written = timm.POST_NORM if tower.post_norm else timm.PRE_NORM, {}
    if tower.preset() not in ("eva_e", "eva_g") or tower.image_size != 224:
        content = None if tower.num_heads is None else timm.settings(tower, rows)
        if content is None:
            return {}
        trunk, written = f"{LOCAL}{folder.resolve()}", {"config.json": content}
    context, text_width = weights.shape("text.positional_embedding")
    model = {
        "embed_dim": rows,
        "vision_cfg": {
            "image_size": tower.image_size,
            "timm_model_name": trunk,
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": None,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": weights.shape("text.token_embedding.weight")[0],
            "width": text_width,
            "heads": max(1, text_width // _TEXT_HEAD),
            "layers": 1 + max(int(match[1]) for name in weights if (match := _RESBLOCK.match(name))),
        },
        "custom_text": True,
    }
    config = {"model_cfg": model, "preprocess_cfg": {"mean": list(timm.MEAN), "std": list(timm.STD)}}
    return {**written, CONFIG: config}
