"""Backbones by name, as behind --backbone: what a name says about `visft.model`, and where its weights are.

    [timm:]NAME              a model of timm with its weights, such as vit_base_patch16_dinov3.lvd1689m
    hf-hub:ORG/NAME          a model of timm that somebody put on the hub, with its config.json
    eva_e                    the backbone of a file in ds_configs/models
    FILE, FOLDER             weights, also of another layout; a folder that timm reads, with its config.json

Names of the hub go on with @REVISION.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visft_ds import pretrained
from visft_ds.config.resolve import CONFIG_ROOT, Flags, available
from visft_ds.config.tree import load_json
from visft_ds.files import read_bytes, reading
from visft_ds.pretrained import HUB, TIMM, HubFile, local, on_hub
from visft_ds.settings.fields import nearest

#: Arguments of a model of timm that do not change its feature map, or that every backbone is made with.
_IDLE = {
    "num_classes",
    "global_pool",
    "dynamic_img_size",
    "drop_rate",
    "drop_path_rate",
    "class_token",
    "img_size",
}


@dataclass(frozen=True)
class Named:
    """Backbone of a name."""

    text: str  #: as it was given
    name: str | None  #: for run folders; None: that of the model stays
    weights: str | None  #: value of `visft.model.weights`; None: random ones
    description: Mapping[str, Any] | None  #: preset and options of the model; None: the name tells no model

    def file(self, *, download: bool = False) -> Path:
        """The weights on this machine. Raises ValueError as `on_this_machine`, and where there are none."""
        if self.weights is None:
            raise ValueError(f"{self.text} has random weights: give a file, or the name of one with weights")
        return on_this_machine(self.weights, download=download)


def on_this_machine(weights: str, *, download: bool) -> Path:
    """The file of a path or name, fetched where it is not here. Raises ValueError: it cannot, or must not
    be.
    """
    path = local(weights)
    name = on_hub(weights)
    if path.is_file() or name is None:
        return path
    if not download:
        raise ValueError(f"{name} is not in the hub's cache: add --download, or give a file")
    return pretrained.fetch(name)


def named(text: str, *, download: bool = False) -> Named:
    """Read a name of a backbone; of the hub's files only config.json is fetched, where it is needed and not
    here.

    Raises:
        ValueError: nothing of that name, or a model that is no backbone of ours.
    """
    path = Path(text)
    if text.startswith(TIMM):
        model = text.removeprefix(TIMM)
        return Named(text, _slug(model), pretrained.weights_of_timm(model), {"preset": text})
    if text.startswith(HUB):
        file = HubFile.parse(text)
        config = on_this_machine(f"{HUB}{file.repository}@{file.revision}/config.json", download=download)
        return Named(text, _slug(file.repository.split("/")[1]), text, _described(config, text))
    if text in available("models"):
        return Named(text, text, *_model_file(text))
    if path.is_dir():
        inside = pretrained.weights_among(inner.name for inner in path.iterdir())
        if inside is None:
            raise ValueError(f"{text} does not have exactly one weight file: give the file")
        return Named(
            text, _slug(path.resolve().name), str(path / inside), _described(path / "config.json", text)
        )
    if path.is_file() or path.suffix in pretrained.WEIGHT_SUFFIXES:
        return Named(text, None, text, None)
    try:
        return named(f"{TIMM}{text}")
    except ValueError as error:
        other = nearest(text, available("models"))
        raise ValueError(f"{text}: no file, folder, {HUB}ORG/NAME or model{other}; {error}") from error


def model_of(backbone: Named, model: str | None) -> tuple[str | None, Flags]:
    """(file in ds_configs/models, settings) with which a backbone trains.

    Args:
        model: file that was asked for; None: that of the backbone, or of published weights the one with the
            nearest name.
    """
    shipped = available("models")
    options = dict(backbone.description or {})
    if model is None and options:
        model = backbone.text if backbone.text in shipped else _nearest_model(options["preset"])
    if model in shipped and _model_file(model) == (backbone.weights, options):
        return model, {}
    values: dict[str, Any] = {"weights": backbone.weights}
    if backbone.name is not None:
        values["name"] = backbone.name
    if options:
        values["preset"] = options.pop("preset")
        values["out_indices"] = options.pop("layers", [])
        values["overrides"] = options
    source = f"--backbone {backbone.text}"
    return model, {f"visft.model.{key}": (value, source) for key, value in values.items()}


def lora_targets(preset: str) -> Any:
    """Layers that get LoRA in the shipped recipe whose backbone is called most like this one."""
    values = load_json(CONFIG_ROOT / "models" / f"{_nearest_model(preset)}.json")
    targets = values.get("override", {}).get("stage2", {}).get("visft.lora.targets")
    return targets or load_json(CONFIG_ROOT / "stage2.json")["visft"]["lora"]["targets"]


def _nearest_model(preset: str) -> str:
    """Of the shipped models with published weights, the one whose preset is called most like this."""
    names = {}
    for name in available("models"):
        weights, options = _model_file(name)
        if weights is not None and on_hub(weights):
            names[options["preset"]] = name
    (nearest_preset,) = difflib.get_close_matches(preset, names, n=1, cutoff=0.0)
    return names[nearest_preset]


def _model_file(name: str) -> tuple[str | None, dict[str, Any]]:
    """Weights and description of the backbone in a file in ds_configs/models."""
    values = load_json(CONFIG_ROOT / "models" / f"{name}.json")["visft"]["model"]
    options = {"preset": values["preset"], **values.get("overrides", {})}
    if values.get("out_indices"):
        options["layers"] = values["out_indices"]
    return values["weights"], options


def _described(path: Path, text: str) -> dict[str, Any]:
    """The model of timm in a config.json. Raises ValueError for another one."""
    if not path.is_file():
        raise ValueError(f"{text} has no config.json, which says what model of timm it is")
    others = f"other models' weights: --model NAME --set visft.model.weights={text}"
    with reading(path, f"timm's config.json; {others}"):
        values = json.loads(read_bytes(path))
        name = values["architecture"]
        settings = values["pretrained_cfg"]
        arguments = values.get("model_args") or {}
        idle = {*_IDLE, "in_chans"} if arguments.get("in_chans") == 3 else _IDLE
        changed = [f"{name}={arguments[name]}" for name in sorted(arguments.keys() - idle)]
        if changed:
            raise ValueError(f"a {name} with {', '.join(changed)} different from timm's")
        size = arguments.get("img_size") or settings["input_size"][-1]
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise ValueError(f"it is made for images of {size} pixels: only squares are supported")
        mean = tuple(map(float, settings["mean"]))
        std = tuple(map(float, settings["std"]))
        preset, image_size = pretrained.timm_name(name, settings.get("tag"), mean, std, *sides)
    options: dict[str, Any] = {"preset": f"{TIMM}{preset}"}
    if image_size is not None:
        options["image_size"] = image_size
    return options


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")
