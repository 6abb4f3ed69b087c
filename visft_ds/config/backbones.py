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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visft_ds.config.fields import nearest
from visft_ds.config.resolve import CONFIG_ROOT, Flags, available, load_json
from visft_ds.files import read_bytes, reading
from visft_ds.pretrained import (
    HUB,
    TIMM,
    WEIGHT_SUFFIXES,
    HubFile,
    fetch,
    local,
    on_hub,
    timm_name,
    weights_among,
    weights_of_timm,
)

#: Arguments of a model of timm that do not change its feature map, or that every backbone is made with.
_IDLE = ("num_classes", "global_pool", "dynamic_img_size", "drop_rate", "drop_path_rate", "class_token", "img_size")


@dataclass(frozen=True)
class Named:
    """Backbone of a name."""

    text: str  #: as it was given
    name: str | None  #: for run folders; None: that of the model stays
    model: Mapping[str, Any]  #: keys of `visft.model` that it decides, with their values
    recipe: str | None = None  #: the file in ds_configs/models that it is of

    @property
    def weights(self) -> str | None:
        """Value of `visft.model.weights`; None: random ones."""
        found: str | None = self.model["weights"]
        return found

    @property
    def description(self) -> dict[str, Any] | None:
        """Preset and options of the model, where the name tells them."""
        if "preset" not in self.model:
            return None
        layers = {"layers": self.model["layers"]} if self.model.get("layers") else {}
        return {"preset": self.model["preset"], **self.model.get("overrides", {}), **layers}

    def file(self, *, download: bool = False) -> Path:
        """The weights on this machine, which are fetched where they are not here.

        Raises:
            ValueError: they are not here and not to be fetched, or cannot be.
        """
        if self.weights is None:
            raise ValueError(f"{self.text} has random weights: give a file, or the name of one with weights")
        path, name = local(self.weights), on_hub(self.weights)
        if path.is_file() or name is None:
            return path
        if not download:
            raise ValueError(f"{name} is not in the hub's cache: --download fetches it; or give a file")
        return fetch(name)


def named(text: str, *, download: bool = False) -> Named:
    """Read a name of a backbone; of the hub's files only config.json is fetched, where it is needed and not here.

    Raises:
        ValueError: nothing of that name, or a model that is no backbone of ours.
    """
    path = Path(text)
    if text.startswith(TIMM):
        model = text.removeprefix(TIMM)
        return Named(text, _slug(model), _keys(text, weights_of_timm(model)))
    if text.startswith(HUB):
        file = replace(HubFile.parse(text), file="config.json")
        if (described := file.cached()) is None:
            if not download:
                raise ValueError(f"{text} is not in the hub's cache: --download fetches it; or give a file")
            described = fetch(f"{HUB}{file.repository}@{file.revision}/config.json")
        return Named(text, _slug(file.repository.split("/")[1]), _described(described, text, text))
    if text in available("models"):
        return Named(text, text, _model_file(text), text)
    if path.is_dir():
        inside = weights_among(inner.name for inner in path.iterdir())
        if inside is None:
            raise ValueError(f"{text} has not one weight file to take: give the file")
        return Named(text, _slug(path.resolve().name), _described(path / "config.json", text, str(path / inside)))
    if path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        return Named(text, None, {"weights": text})
    try:
        return named(f"{TIMM}{text}")
    except ValueError as error:
        other = nearest(text, available("models"))
        raise ValueError(f"--backbone {text}: no file, folder, {HUB}ORG/NAME or model{other}; {error}") from error


def model_of(found: Named, model: str | None) -> tuple[str | None, Flags]:
    """(file in ds_configs/models, settings) with which a backbone trains.

    Args:
        model: file that was asked for; None: that of the backbone, or the one whose backbone has the nearest name.
    """
    if model is None and "preset" in found.model:
        model = found.recipe or _nearest(found)
    if model in available("models") and all(_model_file(model).get(key) == found.model[key] for key in found.model):
        return model, {}
    values = found.model if found.name is None else {"name": found.name, **found.model}
    return model, {f"visft.model.{key}": (value, f"--backbone {found.text}") for key, value in values.items()}


def _keys(preset: str, weights: str | None, image_size: int | None = None) -> dict[str, Any]:
    size = {} if image_size is None else {"image_size": image_size}
    return {"preset": preset, "overrides": size, "layers": [], "weights": weights}


def _model_file(name: str) -> dict[str, Any]:
    """The backbone in a file in ds_configs/models, by keys of `visft.model`."""
    values = load_json(CONFIG_ROOT / "models" / f"{name}.json")["visft"]["model"]
    found = _keys(values["preset"], values["weights"])
    return found | {key: values[key] for key in found if key in values}


def _described(path: Path, text: str, weights: str) -> dict[str, Any]:
    """The model of timm in a config.json. Raises ValueError for another one."""
    if not path.is_file():
        raise ValueError(f"{text} has no config.json, which says what model of timm it is")
    with reading(path, f"timm's config.json; other models' weights: --model NAME --set visft.model.weights={text}"):
        values = json.loads(read_bytes(path))
        name, settings, arguments = values["architecture"], values["pretrained_cfg"], values.get("model_args") or {}
        if other := sorted(arguments.keys() - set(_IDLE)):
            raise ValueError(f"a {name} with other {', '.join(other)} than timm's")
        size = arguments.get("img_size") or settings["input_size"][-1]
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise ValueError(f"it is made for images of {size} pixels: only squares can be had")
        mean, std = (tuple(map(float, settings[key])) for key in ("mean", "std"))
        preset, image_size = timm_name(name, settings.get("tag"), mean, std, *sides)
    return _keys(f"{TIMM}{preset}", weights, image_size)


def _nearest(found: Named) -> str:
    """The file in ds_configs/models, among those of published weights, whose backbone has the nearest name."""
    files = {name: _model_file(name) for name in available("models")}
    presets = {values["preset"]: name for name, values in files.items() if on_hub(values["weights"] or "")}
    (near,) = difflib.get_close_matches(found.model["preset"], presets, n=1, cutoff=0.0)
    return presets[near]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")
