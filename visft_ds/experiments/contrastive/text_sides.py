"""The text side of a whole CLIP as something that trains, and the whole model written again around it.

A file of ours (EVA-CLIP's or open_clip's names) or a model of open_clip. Whatever does not train is copied into the
result bit for bit, in its own dtype; what trains is written in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.evals.benchmarks.encoders import Encoder, EvaEncoder
from visft_ds.evals.benchmarks.text_towers import PREFIX, TextTower
from visft_ds.experiments.contrastive.clip_models import write_configs
from visft_ds.interop import open_clip
from visft_ds.interop.files import VISION_OF, TensorInfo, WeightFile, open_weights, view
from visft_ds.interop.foreign_code import LOCAL, read_config
from visft_ds.interop.layouts import LAYOUTS, tower_of
from visft_ds.interop.open_clip import CONFIG, FILE
from visft_ds.interop.towers import open_tower
from visft_ds.interop.writing import write_safetensors, write_text

#: The last linear map of a text tower: CLIP's, and that of open_clip's towers from transformers.
_PROJECTION = re.compile(r"(text\.)?(text_projection|proj)(\.|$)")


@dataclass(frozen=True)
class TextSide:
    """A text tower and the model that it is part of."""

    tower: TextTower
    parameters: Mapping[str, nn.Parameter]  #: name in `weights` -> the tower's parameters, all of them
    logit_scale: nn.Parameter
    weights: WeightFile  #: the whole model under open_clip's names, as it was
    model_config: Mapping[str, Any] | None  #: open_clip's configuration; None: it follows from the weights

    def projection(self) -> dict[str, nn.Parameter]:
        """The parameters of the last map alone. Raises ValueError where there is none."""
        found = {name: value for name, value in self.parameters.items() if _PROJECTION.match(name)}
        if not found:
            raise ValueError(f"{self.tower.source}: the text tower has no projection: train all of it, or LoRA")
        return found


def text_side(library: str, name: str, encoder: Encoder) -> TextSide:
    """The text side of a model that was loaded for evaluation (`evals.benchmarks.models.load_encoder`).

    Args:
        library: "visft_ds" for a file of ours, or "open_clip".
        name: the file, or what open_clip calls the model.

    Raises:
        ValueError: a model without text side or class token, a file with a part of a model only, a model that was
            trained with another loss.
    """
    if library == "visft_ds":
        return _side_of_file(name, encoder)
    if encoder.text is None:
        raise ValueError(
            f"{name} of {library} has no text side: give an EVA-CLIP or open_clip file, or open_clip:NAME:TAG"
        )
    model: Any = encoder.text.module.model
    if getattr(model, "logit_bias", None) is not None:
        raise ValueError(
            f"{name} was trained with the sigmoid loss of SigLIP (it has a logit bias); this is InfoNCE, for models of "
            f"CLIP's kind"
        )
    tensors: dict[str, Tensor] = model.state_dict()
    infos = {key: TensorInfo.of(value) for key, value in tensors.items()}
    parameters = {
        key: value for key, value in model.named_parameters() if not key.startswith("visual.") and key != "logit_scale"
    }
    # Copies: the parameters are about to change, and what is written beside them is what was loaded.
    kept = {key: value.detach().clone() for key, value in tensors.items() if key not in parameters}
    file = WeightFile(Path(encoder.text.source), infos, lambda key: kept[key] if key in kept else tensors[key], {})
    return TextSide(encoder.text, parameters, model.logit_scale, file, _config_of(name, model))


def _side_of_file(name: str, encoder: Encoder) -> TextSide:
    file, layout = open_tower(name)
    if layout.name not in ("eva_clip", "open_clip"):
        raise ValueError(
            f"{name} is a file of {layout.name} ({LAYOUTS[layout.name].prefix or 'no prefix'}) without text side: give "
            f"the whole EVA-CLIP or open_clip file"
        )
    entries = open_clip.export_entries(file, layout)  # refuses half a model
    if encoder.text is None or not isinstance(encoder.module, EvaEncoder):
        raise ValueError(f"{name}: read after a block, a tower has no embedding to learn with; give the whole model")
    # Heads and norms, which follow from no tensor, are known by now.
    merged = view(file, entries, {**file.metadata, "tower": tower_of(encoder.module.backbone).to_json()})
    parameters = {PREFIX + key: value for key, value in encoder.text.module.named_parameters()}
    scale = nn.Parameter(file.get("logit_scale").float().clone())
    config_file = Path(name).parent / CONFIG
    return TextSide(
        encoder.text, parameters, scale, merged, _read_config(config_file) if layout.name == "open_clip" else None
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    """The configuration of the folder that a file of open_clip lies in; None where there is none."""
    if not path.is_file():
        return None
    config = read_config(path)
    if not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{path} is no configuration of open_clip: it has no model_cfg")
    # One that names a folder is made again for the new one.
    local = str(config["model_cfg"].get("vision_cfg", {}).get("timm_model_name", "")).startswith(LOCAL)
    return None if local else config


def _config_of(name: str, model: Any) -> dict[str, Any]:
    """open_clip_config.json of a model that open_clip has built."""
    from open_clip import get_model_config

    name = Path(name).stem if Path(name).suffix == ".json" else name
    preprocess = {key: model.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    return {"model_cfg": get_model_config(name), "preprocess_cfg": preprocess}


def write_side(
    side: TextSide, trained: Collection[str], folder: Path, *, named: Path, vision_of: str | None = None
) -> tuple[str, ...]:
    """Write the whole model into a folder as open_clip names it; returns the configurations that were written.

    Args:
        trained: names of `side.parameters` that have changed.
        named: the folder's name once it is finished.
        vision_of: `base_identity` of the file that the vision tower is from: adapters made for that fit this one.
    """
    changed: dict[str, Tensor] = {name: side.parameters[name] for name in trained}
    changed["logit_scale"] = side.logit_scale
    infos = {
        name: TensorInfo(info.shape, torch.float32) if name in changed else info
        for name, info in side.weights.infos.items()
    }

    def produce(name: str) -> Tensor:
        value = changed.get(name)
        return side.weights.get(name) if value is None else value.detach().float().reshape(infos[name].shape)

    origin = {} if vision_of is None else {VISION_OF: vision_of}
    write_safetensors(folder / FILE, infos, produce, {**side.weights.metadata, **origin})
    if side.model_config is None:
        return write_configs(open_weights(folder / FILE), folder, named)
    write_text(folder / CONFIG, json.dumps(side.model_config, indent=2) + "\n")
    return (CONFIG,)
