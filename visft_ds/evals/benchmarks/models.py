"""The models of a comparison, as a command line names them.

    [LABEL=]FILE[+ADAPTER][@SCALE]     weights of a tower of ours in any known layout, with an adapter or merged
    [LABEL=]RUN[@SCALE]                what a finished training leaves: its base and, after stage 2, its adapter
    [LABEL=]open_clip:NAME:TAG|FILE    also open_clip:hf-hub:..., open_clip:local-dir:..., open_clip:CONFIG.json:FILE
    [LABEL=]timm:NAME[:FILE]           without a file timm's own weights
    ...#BLOCK                          any of these, read after a block and without what lies behind it

In place of a tag or file, `random` says that no weights are meant.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visft_ds.config.schema import Precision
from visft_ds.costs.hardware import DTYPES
from visft_ds.evals.benchmarks.encoders import (
    KINDS_WITHOUT_TEXT,
    NORMALISATIONS,
    Encoder,
    EvaEncoder,
    FeatureMapEncoder,
    open_clip_encoder,
    square_preprocess,
    timm_encoder,
)
from visft_ds.evals.benchmarks.text_towers import TextTower, projection_of, text_tower_in
from visft_ds.evals.model import adapter_for, empty_backbone, end_of, files_of_run
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.backbones import is_merged, load_backbone, load_timm, timm_settings
from visft_ds.interop.files import open_weights
from visft_ds.interop.layouts import tower_in
from visft_ds.interop.towers import open_tower, resolve_tower
from visft_ds.models.lora import lora_layers
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.run.folder import recorded_config

LABEL = re.compile(r"([\w .-]+)=(.+)")
_POOLED = "mean of the feature map"
_READ = re.compile(r"(.+)#([A-Za-z]\w*(?:\.\w+)*)(@[^@#]+)?")
_SCALED = re.compile(r"(.+)@([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)")


@dataclass(frozen=True)
class ModelSpec:
    """Model of a comparison."""

    label: str
    library: str  #: "visft_ds", "open_clip" or "timm"
    name: str  #: a file, or what the library calls the model
    weights: str | None = None  #: of another library
    adapter: Path | None = None
    scale: float = 1.0  #: factor on the effect of the adapter
    hints: Mapping[str, float | bool] | None = None  #: num_heads and post_norm, where a run records them
    timm: tuple[str, int | None] | None = None  #: name and image size of the model of timm that is its backbone
    until: str | None = None  #: block that it ends after, where a run records one
    block: str | None = None  #: that it is read after
    trained: Path | None = None  #: folder of the run, where it is one of stage 2


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading towers of ours and preparing their images."""

    precision: Precision
    preset: str | None = None  #: where neither file nor run record the number of heads
    text: Path | None = None  #: file with the text tower, where the backbone's own has none
    image_size: int | None = None  #: None: the one that the positions belong to
    normalisation: str = "clip"
    pool: str = "auto"


def parse_model(text: str) -> ModelSpec:
    """Read one model of a command line; files are looked for, not opened.

    Raises:
        ValueError: a file that is not there, or a scale without an adapter.
    """
    if (read := _READ.fullmatch(text)) and not Path(text).exists():
        spec = parse_model(read[1] + (read[3] or ""))
        named = spec.label if LABEL.fullmatch(text) else f"{spec.label}#{read[2]}"
        return replace(spec, label=named, block=read[2])
    match = LABEL.fullmatch(text)
    label, rest = (match[1].strip(), match[2]) if match else (None, text)
    library, colon, inner = rest.partition(":")
    if colon and library in ("open_clip", "timm"):
        is_address = inner.startswith(("hf-hub:", "local-dir:"))
        name, _, weights = (inner, "", "") if is_address else inner.partition(":")
        return ModelSpec(label or Path(name).stem, library, name, weights or None)
    base, adapter, scale = _files(rest)
    label = label or (f"{base.stem}+{adapter.stem}" if adapter else base.stem)
    if (base / "run.json").is_file():
        visft = recorded_config(base).visft
        files = files_of_run(base, visft, (), adapter=adapter)
        if files.adapter is None and scale is not None:
            raise ValueError(f"{text}: @{scale:g} scales an adapter, and {base} trained none")
        return ModelSpec(
            label,
            "visft_ds",
            str(files.backbone),
            None,
            files.adapter,
            1.0 if scale is None else scale,
            files.hints,
            files.timm,
            files.until,
            trained=base if visft.stage == 2 else None,
        )
    if base.is_dir():
        raise ValueError(f"{base} is a folder without run.json: give a weight file, or the folder of a run")
    if adapter is None and scale is not None:
        raise ValueError(f"{text}: @{scale:g} scales an adapter, and none is given: write FILE+ADAPTER@{scale:g}")
    return ModelSpec(label, "visft_ds", str(base), None, adapter, 1.0 if scale is None else scale)


def _files(text: str) -> tuple[Path, Path | None, float | None]:
    """(base, adapter, scale). A name that exists as a whole is never cut."""
    if Path(text).exists():
        return Path(text), None, None
    match = _SCALED.fullmatch(text)
    rest, scale = (match[1], float(match[2])) if match else (text, None)
    if Path(rest).exists():
        return Path(rest), None, scale
    for place in (place for place, letter in enumerate(rest) if letter == "+"):
        base, adapter = Path(rest[:place]), Path(rest[place + 1 :])
        if base.exists():
            if not adapter.exists():
                raise ValueError(f"{adapter}: no such adapter (of --model {text})")
            return base, adapter, scale
    raise ValueError(
        f"--model {text}: {rest.partition('+')[0]} does not exist. Give [LABEL=]FILE[+ADAPTER][@SCALE], [LABEL=]RUN, "
        f"[LABEL=]open_clip:NAME:WEIGHTS or [LABEL=]timm:NAME[:FILE]"
    )


def load_encoder(spec: ModelSpec, options: LoadOptions) -> Encoder:
    """Build a model on the CPU; the matrices of a tower of ours are stored in the precision they compute in.

    Raises:
        ValueError: whatever is wrong with one of its files, or with what the options ask of it.
    """
    if spec.library == "visft_ds":
        encoder = _load_own(spec, options)
    else:
        build = open_clip_encoder if spec.library == "open_clip" else timm_encoder
        encoder = build(spec.name, spec.weights)
    if spec.block is not None:
        encoder = read_after(encoder, spec)
    if encoder.text is None and options.text is not None:
        encoder = replace(encoder, text=_text_of(options.text, encoder))
    return encoder


def _load_timm(spec: ModelSpec, timm: tuple[str, int | None], options: LoadOptions) -> Encoder:
    """A backbone of timm that a run trained on, fed as it was trained."""
    path = Path(spec.name)
    adapter = _adapter_of(spec)
    backbone, summary = load_timm(path, *timm, DTYPES[options.precision], _end_of(spec, adapter))
    facts = {"backbone": summary, "adapter": "none"}
    if adapter is not None:
        adapter.install(backbone)
        facts["adapter"] = f"{spec.adapter}: {adapter.describe()}, times {spec.scale:g}"
    side = options.image_size or backbone.image_size
    settings = {"preprocess": f"{side} {backbone.pixel_mean} {backbone.pixel_std}", "pooled": _POOLED}
    settings |= {"architecture": timm[0].partition(".")[0]}
    settings |= {} if backbone.until is None else {"until": backbone.until}
    module = FeatureMapEncoder(backbone)
    return Encoder(
        module.requires_grad_(False).eval(),
        KINDS_WITHOUT_TEXT,
        square_preprocess(side, backbone.pixel_mean, backbone.pixel_std),
        (backbone.pixel_mean, backbone.pixel_std),
        side,
        settings,
        None,
        facts | {"images": f"{side} pixels, normalised as it was trained", "pooled": settings["pooled"]},
    )


def _load_own(spec: ModelSpec, options: LoadOptions) -> Encoder:
    timm = spec.timm or timm_settings(open_weights(spec.name))
    if timm is not None:
        return _load_timm(spec, timm, options)
    weights, layout = open_tower(spec.name)
    adapter = _adapter_of(spec)
    until = _end_of(spec, adapter)
    found = tower_in(weights, layout)
    if not (options.preset or spec.hints or found.preset() or found.num_heads):
        raise ValueError(
            f"{spec.name} does not tell its number of heads, and no preset has {found.describe()}: give --preset, or "
            f"weights that this project wrote, which tell it"
        )
    tower = resolve_tower(found, options.preset, spec.hints)
    if options.image_size is not None and options.image_size < tower.patch_size:
        raise ValueError(f"--image-size {options.image_size} is less than one patch of {tower.patch_size} pixels")
    backbone = empty_backbone(tower, DTYPES[options.precision], until)
    facts = {"backbone": load_backbone(backbone, spec.name)}
    facts["adapter"] = "merged into the weights" if is_merged(weights) else "none"
    if adapter is not None:
        # Beside the weights and not in them: a sum rounded to 16 bit loses most of a small adapter.
        adapter.install(backbone)
        facts["adapter"] = f"{spec.adapter}: rank {adapter.rank}, on {'+'.join(adapter.targets)}, times {spec.scale:g}"
    # The projection into the space of texts reads the last block.
    projection = projection_of(spec.name) if until is None else None
    if projection is None and until is None and options.text is not None and tower.class_token:
        projection = projection_of(options.text)
    module = EvaEncoder(backbone, projection, options.pool)
    side, normalisation = options.image_size or tower.image_size, NORMALISATIONS[options.normalisation]
    settings = {
        "preprocess": f"EVA-CLIP {side} {options.normalisation}",
        "pooled": "class token" if module.by_token else "mean of the patches",
        "heads": tower.num_heads,
        "post_norm": tower.post_norm,
        **({} if until is None else {"until": until}),
    }
    text = text_tower_in(spec.name) if module.head is not None else None
    facts |= {"images": f"{side} pixels, {options.normalisation} normalisation", "pooled": str(settings["pooled"])}
    return Encoder(
        module.requires_grad_(False).eval(),
        module.kinds,
        square_preprocess(side, *normalisation),
        normalisation,
        side,
        settings,
        text,
        facts,
    )


def _adapter_of(spec: ModelSpec) -> Adapter | None:
    """The adapter of a model, if it has one, times its scale."""
    if spec.adapter is None:
        return None
    return adapter_for(Path(spec.name), spec.adapter).scaled(spec.scale)


def _end_of(spec: ModelSpec, adapter: Adapter | None) -> str | None:
    """The block that a model ends after; None: it is whole, as merged weights are if they are read elsewhere."""
    if spec.block is not None and adapter is None:
        return spec.until
    return spec.until or end_of(open_weights(spec.name), adapter)


def read_after(encoder: Encoder, spec: ModelSpec) -> Encoder:
    """The same read after the block of its spec, and without its text side.

    Raises ValueError for a network without that block.
    """
    assert spec.block is not None
    encoder = readable(encoder, spec)
    module: Any = encoder.module
    module.end_after(spec.block)
    settings = {**encoder.settings, "until": spec.block}
    return replace(encoder, settings=settings, facts={**encoder.facts, "read": f"after {spec.block}"})


def readable(encoder: Encoder, spec: ModelSpec) -> Encoder:
    """The same with a module whose `Blocks` can be read; it is the encoder's own, or shares its parameters.

    Raises ValueError for a network whose blocks are not known.
    """
    module: Any = encoder.module
    if spec.library == "timm":
        module = FeatureMapEncoder(_as_backbone(module.model, spec.name))
    elif spec.library == "open_clip" and hasattr(module.visual, "trunk"):
        trunk = module.visual.trunk
        module = FeatureMapEncoder(_as_backbone(trunk, trunk.pretrained_cfg["architecture"]))
    if not module.ends():
        raise ValueError(f"{spec.label} has no blocks that are known: of open_clip those of plain ViTs are, and timm's")
    settings = {**encoder.settings, "pooled": _POOLED if isinstance(module, FeatureMapEncoder) else "class token"}
    settings = settings if spec.library != "visft_ds" else dict(encoder.settings)
    module = module.requires_grad_(False).eval()
    return replace(encoder, module=module, kinds=KINDS_WITHOUT_TEXT, settings=settings, text=None)


def _as_backbone(model: Any, name: str) -> TimmBackbone:
    """A model of timm that is at hand, of images of one size, as a backbone."""
    side = getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = None if side is None else side[0]
    return TimmBackbone(
        model, name, {} if size in (None, model.pretrained_cfg["input_size"][-1]) else {"img_size": size}
    )


def _text_of(path: Path, encoder: Encoder) -> TextTower | None:
    """The text tower of another file; only for a model that has embeddings to compare its own with."""
    tower = text_tower_in(path)
    if tower is None:
        raise ValueError(f"{path} has no text tower: give the EVA-CLIP or open_clip file that the base came from")
    return tower if "clip" in encoder.kinds else None


def identity(module: nn.Module) -> str:
    """sha256 over all tensors of a module, their names, dtypes and shapes, and the scales of its adapters."""
    digest = hashlib.sha256()
    for name, layer in lora_layers(module).items():
        digest.update(json.dumps([name, layer.scale]).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
