"""Backbones by name, as behind --backbone: what a name says about `visft.model`, and where its weights are.

    [timm:]NAME              a model of timm with its weights, such as vit_base_patch16_dinov3.lvd1689m
    hf-hub:ORG/NAME          a model of timm that somebody put on the hub, with its config.json
    eva_e                    the backbone of a file in ds_configs/models
    FILE, FOLDER             weights, also of another layout; a folder that timm reads, with its config.json

Names of the hub go on with @REVISION.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visft_ds.config.records import parse_json
from visft_ds.config.resolve import CONFIG_ROOT, available, load_json
from visft_ds.config.schema import PRESETS
from visft_ds.files import read_bytes, reading
from visft_ds.pretrained import (
    HUB,
    TIMM,
    WEIGHT_SUFFIXES,
    HubFile,
    fetch,
    is_timm,
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
        """As `visft.model.weights`; None: random ones."""
        found: str | None = self.model["weights"]
        return found

    @property
    def preset(self) -> str | None:
        """The tower of our own, where it is one."""
        found = self.model.get("preset")
        return found if found in PRESETS else None

    @property
    def timm(self) -> tuple[str, int | None] | None:
        """Name and image size of the model of timm, where it is one."""
        found: str = self.model.get("preset", "")
        size = self.model.get("overrides", {}).get("image_size")
        return (found.removeprefix(TIMM), size) if found.startswith(TIMM) else None

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
            raise ValueError(
                f"{name} is not in the hub's cache: --download fetches it and says its size and licence before; or "
                "give a file"
            )
        return fetch(name)


def named(text: str, *, download: bool = False) -> Named:
    """Read a name of a backbone; of the hub's files only config.json is fetched, where it is needed and not here.

    Raises:
        ValueError: nothing of that name, or a model that is no backbone of ours.
    """
    if text.startswith(TIMM):
        model = text.removeprefix(TIMM)
        return Named(text, _slug(model), _keys(text, weights_of_timm(model)))
    if text.startswith(HUB):
        return _of_repository(text, download=download)
    if text in available("models"):
        return Named(text, text, _model_file(text), text)
    path = Path(text)
    if path.is_dir():
        file = weights_among(inner.name for inner in path.iterdir())
        if file is None:
            raise ValueError(f"{text} has not one weight file to take: give the file")
        found = _described(path / "config.json", text) | {"weights": str(path / file)}
        return Named(text, _slug(path.resolve().name), found)
    if path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        return Named(text, None, {"weights": text})
    if is_timm(text):
        return named(f"{TIMM}{text}")
    near = difflib.get_close_matches(text, available("models"), n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ValueError(
        f"--backbone {text}: there is no such file, folder or name{hint} Give {TIMM}NAME, {HUB}ORG/NAME, a file, or "
        f"one of {', '.join(available('models'))}"
    )


def model_of(found: Named, model: str | None) -> tuple[str | None, dict[str, tuple[str, Any]]]:
    """(file in ds_configs/models, flag -> (dotted key, value)) with which a backbone trains.

    Args:
        model: file that was asked for; None: that of the backbone, or the one whose backbone has the nearest name.
    """
    if model is None and "preset" in found.model:
        model = found.recipe or _nearest(found)
    if model in available("models") and all(_model_file(model).get(key) == found.model[key] for key in found.model):
        return model, {}
    given = {"name": found.name} if found.name is not None else {}
    return model, {
        f"--backbone {found.text} ({key})": (f"visft.model.{key}", value)
        for key, value in {**given, **found.model}.items()
    }


def _of_repository(text: str, *, download: bool) -> Named:
    file = HubFile.parse(text)
    path = replace(file, file="config.json").cached()
    if path is None and not download:
        raise ValueError(f"{text} is not in the hub's cache: --download fetches it; or give a file")
    revision = "" if file.revision == "main" else f"@{file.revision}"
    path = path or fetch(f"{HUB}{file.repository}{revision}/config.json")
    return Named(text, _slug(file.repository.split("/")[1]), _described(path, text) | {"weights": text})


def _keys(preset: str, weights: str | None, image_size: int | None = None) -> dict[str, Any]:
    size = {} if image_size is None else {"image_size": image_size}
    return {"preset": preset, "overrides": size, "layers": [], "weights": weights}


def _model_file(name: str) -> dict[str, Any]:
    """The backbone in a file in ds_configs/models, by keys of `visft.model`."""
    values = load_json(CONFIG_ROOT / "models" / f"{name}.json")["visft"]["model"]
    found = _keys(values["preset"], values["weights"])
    return found | {key: values[key] for key in found if key in values}


def _described(path: Path, text: str) -> dict[str, Any]:
    """The model of timm in a config.json. Raises ValueError for another one."""
    remedy = (
        f"{TIMM}NAME names a model of timm. Weights of a known layout go into another model by "
        f"--model NAME --set visft.model.weights={text}"
    )
    if not path.is_file():
        raise ValueError(f"{text} has no config.json, which says what model it is. {remedy}")
    values = parse_json(read_bytes(path), str(path))
    if not isinstance(values, dict) or "architecture" not in values:
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise ValueError(f"{text} is no model of timm (config.json: {kind or 'no architecture'}). {remedy}")
    with reading(path, "timm's config.json"):
        name, settings, arguments = values["architecture"], values["pretrained_cfg"], values.get("model_args") or {}
        if other := sorted(arguments.keys() - set(_IDLE)):
            raise ValueError(f"a {name} with other {', '.join(other)} than timm's. {remedy}")
        size = arguments.get("img_size") or settings["input_size"][-1]
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) > 1:
            raise ValueError(f"it is made for images of {size} pixels: only squares can be had")
        mean, std = (tuple(map(float, settings[key])) for key in ("mean", "std"))
        named, image_size = timm_name(name, settings.get("tag"), mean, std, *sides)
    return _keys(f"{TIMM}{named}", None, image_size)


def _nearest(found: Named) -> str:
    """The file in ds_configs/models, among those of published weights, whose backbone has the nearest name."""
    presets = {
        values["preset"]: name
        for name in available("models")
        if on_hub((values := _model_file(name))["weights"] or "") is not None
    }
    (near,) = difflib.get_close_matches(found.model["preset"], presets, n=1, cutoff=0.0)
    return presets[near]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")
