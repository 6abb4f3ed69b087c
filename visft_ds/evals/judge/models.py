"""The models of a comparison, as a command line names them.

[LABEL=]FILE[+ADAPTER][@SCALE]     weights of a tower of ours in any known layout, with an adapter or merged
[LABEL=]RUN[@SCALE]                what a finished training leaves: its base and, after stage 2, its adapter
[LABEL=]open_clip:NAME:TAG|FILE    also open_clip:hf-hub:..., open_clip:local-dir:...
[LABEL=]timm:NAME[:FILE]           without a file timm's own weights
...#BLOCK                          any of these but open_clip's, read after a block and without what lies behind it
[LABEL=]MODEL,MODEL,...            one arm: trainings that differ by their seed
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from visft_ds.config.fields import Precision
from visft_ds.evals.judge.encoders import (
    CLIP,
    KINDS_WITHOUT_TEXT,
    Encoder,
    EvaEncoder,
    FeatureMapEncoder,
    open_clip_encoder,
    square_preprocess,
    timm_encoder,
)
from visft_ds.evals.judge.images import stamp
from visft_ds.evals.judge.text import projection_of, text_tower_in
from visft_ds.evals.model import adapter_for, files_of_run
from visft_ds.interop.layouts import MODEL, bases_of, load_backbone, model_in, open_model, other_base, whole
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.timm_backbone import as_backbone
from visft_ds.ops import DTYPES
from visft_ds.run.folder import recorded_config

_LABEL = re.compile(r"([\w .-]+)=(.+)")
_END = re.compile(r"(.+?)(#\d+)?(@[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)?")


@dataclass(frozen=True)
class ModelSpec:
    """Model of a comparison."""

    label: str
    library: str  #: "visft_ds", "open_clip" or "timm"
    name: str  #: a file, or what the library calls the model
    weights: str | None = None  #: of another library
    adapter: Path | None = None
    scale: float = 1.0  #: factor on the effect of the adapter
    model: Mapping[str, Any] | None = None  #: preset and options of its backbone, if a run records them
    block: int | None = None  #: that it is read after

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its features depend on, in JSON's types; files by name, size and time."""
        paths = [Path(text) for text in (self.name, self.weights or "", self.adapter or "") if text]
        files = [each for path in paths for each in ([path] if path.is_file() else sorted(path.glob("*")))]
        return asdict(self) | {"label": "", "adapter": "", "files": [f"{file.name} {stamp(file)}" for file in files]}

    def __str__(self) -> str:
        parts = [self.name if self.library == "visft_ds" else f"{self.library} {self.name}", self.weights]
        parts += [f"+ {self.adapter} x {self.scale:g}" if self.adapter else None]
        return " ".join([*filter(None, parts), *([] if self.block is None else [f"after block {self.block}"])])


def parse_arms(texts: Sequence[str]) -> dict[str, tuple[ModelSpec, ...]]:
    """Label -> models of each arm of a command line; files are looked for, not opened.

    Raises:
        ValueError: as `parse_model`; also for two arms or models of one name, and numbers of seeds that cannot be
            paired with those of another arm.
    """
    arms = [_arm(text) for text in texts]
    labels = [name for label, models in arms for name in {label, *(model.label for model in models)}]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two models are called {twice[0]}: give one of them a label, as in LABEL={twice[0]}...")
    several = {label: len(models) for label, models in arms if len(models) > 1}
    if len({*several.values()}) > 1:
        told = ", ".join(f"{label} has {count}" for label, count in several.items())
        raise ValueError(f"seeds are compared one by one, and {told}: give as many, or one")
    return dict(arms)


def _arm(text: str) -> tuple[str, tuple[ModelSpec, ...]]:
    match = _LABEL.fullmatch(text)
    rest = match[2] if match else text
    if "," not in rest or Path(rest).exists():
        model = parse_model(text)
        return model.label, (model,)
    models = [parse_model(path) for path in rest.split(",")]
    label = match[1].strip() if match else models[0].label
    return label, tuple(replace(model, label=f"{label} {number}") for number, model in enumerate(models, 1))


def parse_model(text: str) -> ModelSpec:
    """Read one model of a command line; files are looked for, not opened.

    Raises:
        ValueError: a file that is not there, or a scale without an adapter.
    """
    match = _LABEL.fullmatch(text)
    label, given = (match[1].strip(), match[2]) if match else ("", text)
    parts = None if Path(given).exists() else _END.fullmatch(given)  # a name that exists as a whole is never cut
    rest, end, factor = parts.groups("") if parts else (given, "", "")
    block, scale = int(end[1:]) if end else None, float(factor[1:]) if factor else 1.0
    library, colon, inner = rest.partition(":")
    if colon and library in ("open_clip", "timm"):
        is_address = inner.startswith(("hf-hub:", "local-dir:"))
        name, _, weights = (inner, "", "") if is_address else inner.partition(":")
        if factor or (end and library == "open_clip"):
            raise ValueError(f"{text}: {factor or end} is for models of ours, and blocks for those of timm")
        return ModelSpec(label or Path(name).name + end, library, name, weights or None, block=block)
    base, adapter = _files(rest)
    spec = ModelSpec("", "visft_ds", str(base), None, adapter, scale, block=block)
    if (base / "run.json").is_file():
        files = files_of_run(base, recorded_config(base).visft, (), adapter=adapter)
        name = str(files.backbone)
        spec = replace(spec, name=name, adapter=files.adapter, model=files.model)
    elif base.is_dir():
        raise ValueError(f"{base} is a folder without run.json: give a weight file, or the folder of a run")
    if factor and spec.adapter is None:
        raise ValueError(f"{text}: {factor} scales an adapter, and there is none")
    return replace(spec, label=label or (f"{base.stem}+{adapter.stem}" if adapter else base.stem) + end)


def _files(text: str) -> tuple[Path, Path | None]:
    """(base, adapter). A name that exists as a whole is never cut."""
    if Path(text).exists():
        return Path(text), None
    for place in (place for place, letter in enumerate(text) if letter == "+"):
        base, adapter = Path(text[:place]), Path(text[place + 1 :])
        if base.exists():
            if not adapter.exists():
                raise ValueError(f"{adapter}: no such adapter")
            return base, adapter
    raise ValueError(f"{text.partition('+')[0]} does not exist; --help tells the forms of models")


def load_encoder(spec: ModelSpec, precision: Precision) -> Encoder:
    """Build a model on the CPU; the matrices of a tower of ours are stored in the precision they compute in.

    Raises:
        ValueError: whatever is wrong with one of its files, or a block that it does not have.
    """
    if spec.library == "visft_ds":
        encoder = _load_own(spec, precision)
    else:
        build = open_clip_encoder if spec.library == "open_clip" else timm_encoder
        encoder = build(spec.name, spec.weights)
    if spec.block is None:
        return encoder
    encoder = readable(encoder, spec)
    backbone: Any = encoder.module.backbone
    backbone.read_after((spec.block,))
    return encoder


def readable(encoder: Encoder, spec: ModelSpec) -> Encoder:
    """The same as a backbone that can be read after each block, without text side; parameters are shared.

    Raises ValueError for a network whose blocks are not known.
    """
    module: Any = encoder.module
    if spec.library == "timm":
        module = FeatureMapEncoder(as_backbone(module.model, spec.name, {}))
    if not isinstance(module, (EvaEncoder, FeatureMapEncoder)) or not module.backbone.ends():
        raise ValueError(f"{spec.label} has no blocks that are known: our towers have, and timm's models")
    return replace(encoder, module=module.requires_grad_(False).eval(), kinds=KINDS_WITHOUT_TEXT, text=None)


def _load_own(spec: ModelSpec, precision: Precision) -> Encoder:
    path = Path(spec.name)
    file = open_model(path)
    # Beside the weights and not in them: a sum rounded to 16 bit loses most of a small adapter.
    adapter = adapter_for(path, spec.adapter).scaled(spec.scale) if spec.adapter else None
    model = dict(spec.model or (adapter.model if adapter and MODEL not in file.metadata else model_in(file)))
    layers = model.pop("layers", None) or (adapter.model.get("layers") if adapter else None)
    if spec.model is None and spec.block is not None and adapter is None:
        layers = None  # merged weights that are read elsewhere are whole
    model |= {"layers": layers} if layers else {}
    backbone: Any = load_backbone(path, whole(model, file), DTYPES[precision])
    module: Any = FeatureMapEncoder(backbone)
    normalisation = backbone.pixel_mean, backbone.pixel_std
    if isinstance(backbone, EvaViT):  # the projection into the space of texts reads the last block
        module, normalisation = EvaEncoder(backbone, None if layers else projection_of(path, backbone.width)), CLIP
    if adapter is not None:
        if problem := other_base(f"the adapter of {spec.label}", adapter.base, bases_of(backbone, path)):
            print(f"warning: {problem}", file=sys.stderr)
        adapter.install(backbone)
    text = text_tower_in(path) if "clip" in module.kinds else None
    preprocess, side = square_preprocess(backbone.image_size, *normalisation), backbone.image_size
    return Encoder(module.requires_grad_(False).eval(), module.kinds, preprocess, normalisation, side, text)
