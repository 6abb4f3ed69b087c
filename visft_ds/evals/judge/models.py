"""The models of a comparison, as a command line names them.

[LABEL=]FILE[+ADAPTER]             weights of a tower of ours in any known layout, with an adapter or merged
[LABEL=]RUN                        what a finished training leaves: its base and, after stage 2, its adapter
[LABEL=]timm:NAME[:FILE]           without a file timm's own weights; also timm:hf-hub:..., timm:local-dir:...
[LABEL=]open_clip:NAME:TAG|FILE    also open_clip:hf-hub:..., open_clip:local-dir:...
...#BLOCK                          any of these but open_clip's, read after a block and without what lies
behind it ...@A                              so many times the adapter, or BASE + A (MODEL - BASE) of whole
weights [LABEL=]MODEL,MODEL,...            one arm: trainings that differ by their seed
"""

from __future__ import annotations

import hashlib
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.config.backbones import named
from visft_ds.config.record import recorded_config
from visft_ds.evals.judge.encoders import (
    CLIP,
    BackboneEncoder,
    Encoder,
    check_open_clip_is_here,
    open_clip_encoder,
    square_preprocess,
)
from visft_ds.evals.judge.images import stamp
from visft_ds.evals.judge.text import projection_of, text_tower_in
from visft_ds.predict.loading import adapter_for, files_of_run
from visft_ds.interop.layouts import (
    MODEL,
    base_parameters,
    bases_of,
    built,
    load_backbone,
    model_in,
    open_model,
    other_base,
    tower_in,
    whole,
)
from visft_ds.interop.weights import Weights
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import KINDS, dense_update, lora_layers
from visft_ds.ops import DTYPES
from visft_ds.pretrained import TIMM
from visft_ds.settings.fields import Precision

_LOCAL = "local-dir:"  # beginning of the name of a model in a folder
NOISE, HALF = "noise", "half"  #: arms that come by themselves
_LABEL = re.compile(r"([\w .-]+)=(.+)")
_END = re.compile(r"(.+?)(#\d+)?(@[-+]?[0-9.]+(?:e[-+]?[0-9]+)?)?")


@dataclass(frozen=True)
class ModelSpec:
    """Model of a comparison."""

    label: str
    name: str  #: file of its weights; of open_clip also a tag, or nothing
    open_clip: str | None = None  #: what open_clip calls it
    adapter: Path | None = None
    scale: float = 1.0  #: factor on the effect of the adapter, or on the difference from `origin`
    noise: int | None = None  #: seed of noise in place of the difference from `origin`
    origin: ModelSpec | None = None  #: BASE of the comparison
    model: Mapping[str, Any] | None = (
        None  #: preset and options of its backbone, if a run or a name tells them
    )
    block: int | None = None  #: that it is read after
    whole: bool = False  #: it goes on behind the block that a training read, as far as its file does

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its features depend on, in JSON's types; files by name, size and time, those of a
        folder of open_clip by their content: such a folder is written anew in place."""
        files = []
        for path in (Path(self.name) if self.name else None, self.adapter):
            if path is not None:
                files += [path] if path.is_file() else sorted(path.glob("*"))
        contents = []
        if self.open_clip_folder is not None:
            for path in sorted(self.open_clip_folder.glob("*")):
                contents.append(f"{path.name} {_content(path, stamp(path))}")
        own = asdict(replace(self, origin=None)) | {"label": "", "adapter": ""}
        origin = self.origin.identity if self.origin is not None and self.mixed else None
        return own | {"origin": origin, "files": [f"{file.name} {stamp(file)}" for file in files] + contents}

    @property
    def open_clip_folder(self) -> Path | None:
        """The folder of a model of open_clip that brings its weights along."""
        name = self.open_clip or ""
        return Path(name.removeprefix(_LOCAL)) if name.startswith(_LOCAL) else None

    @property
    def mixed(self) -> bool:
        """Return True if its weights are computed from those of `origin`."""
        return self.noise is not None or (self.adapter is None and self.scale != 1)

    def __str__(self) -> str:
        parts = [
            f"open_clip {self.open_clip}" if self.open_clip else "",
            self.name,
            f"+ {self.adapter}" if self.adapter else "",
            f"as noise {self.noise}" if self.noise is not None else "",
            f"x {self.scale:.4g}" if self.scale != 1 else "",
            f"after block {self.block}" if self.block is not None else "",
        ]
        return " ".join(filter(None, parts))


def parse_arms(texts: Sequence[str], *, download: bool = False) -> dict[str, tuple[ModelSpec, ...]]:
    """Label -> models of each arm of a command line, BASE first; files are looked for, not opened.

    Args:
        download: weights of timm that are not on this machine are fetched.

    Raises:
        ValueError: as `parse_model`; also for two arms or models of one name, and numbers of seeds that
        cannot be
            paired with those of another arm.
    """
    arms = [_arm(text, download) for text in texts]
    labels = [name for label, models in arms for name in {label, *(model.label for model in models)}]
    if taken := {NOISE, HALF} & {*labels}:
        raise ValueError(f"{taken.pop()} is an arm that comes by itself: give yours another label")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(
            f"two models are called {twice[0]}: give one of them a label, as in LABEL={twice[0]}..."
        )
    several = {label: len(models) for label, models in arms if len(models) > 1}
    if len({*several.values()}) > 1:
        told = ", ".join(f"{label} has {count}" for label, count in several.items())
        raise ValueError(f"seeds are compared one by one, and {told}: give as many, or one")
    (first, (base, *more)), *others = arms
    if more or base.mixed:
        raise ValueError(f"BASE is one model as it is, and {first} is {len(more) + 1} x {base.scale:g}")
    base = replace(
        base, whole=base.block is None and base.adapter is None
    )  # what its user has, whatever training read
    return {first: (base,), **{label: tuple(replace(one, origin=base) for one in of) for label, of in others}}


def _arm(text: str, download: bool) -> tuple[str, list[ModelSpec]]:
    """(label, models) of an arm. A name that exists as a whole is never cut."""
    match = _LABEL.fullmatch(text)
    is_one = Path(match[2] if match else text).exists()
    models = [parse_model(part, download=download) for part in ([text] if is_one else text.split(","))]
    label = models[0].label
    if len(models) == 1:
        return label, models
    return label, [replace(model, label=f"{label} {number}") for number, model in enumerate(models, 1)]


def parse_model(text: str, *, download: bool = False) -> ModelSpec:
    """Read one model of a command line; files are looked for, not opened.

    Raises:
        ValueError: a file that is not there, an unknown name, or weights of timm that must not be fetched.
    """
    match = _LABEL.fullmatch(text)
    label, given = (match[1].strip(), match[2]) if match else ("", text)
    parts = (
        None if Path(given).exists() else _END.fullmatch(given)
    )  # a name that exists as a whole is never cut
    rest, end, factor = parts.groups("") if parts else (given, "", "")
    inner = rest.partition(":")[2]
    is_address = inner.startswith(("hf-hub:", _LOCAL))
    name, _, weights = (inner, "", "") if is_address else inner.partition(":")
    if rest.startswith("open_clip:"):
        if end:
            raise ValueError(f"{text}: blocks are read of models of ours and of timm, not of open_clip")
        if not download:
            check_open_clip_is_here(name, weights)
        spec = ModelSpec(Path(name).name, weights, open_clip=name)
    elif rest.startswith(TIMM) and weights:
        spec = ModelSpec(name, weights, model={"preset": f"{TIMM}{name}"})
    elif rest.startswith(TIMM):
        found = named(name.removeprefix(_LOCAL) if is_address else rest, download=download)
        spec = ModelSpec(Path(name).name, str(found.file(download=download)), model=found.description)
    else:
        spec = _of_files(rest)
    block, scale = int(end[1:]) if end else None, float(factor[1:]) if factor else 1.0
    return replace(spec, label=label or spec.label + end, block=block, scale=scale)


@cache
def _content(path: Path, _: str) -> str:
    """sha256 of a file, computed once as long as its stamp is the same; empty for a folder."""
    if path.is_dir():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_files(text: str) -> ModelSpec:
    """A weight file, with an adapter or without, or a run. A name that exists as a whole is never cut."""
    places = [place for place, letter in enumerate(text) if letter == "+"]
    cuts = [(Path(text), None), *((Path(text[:place]), Path(text[place + 1 :])) for place in places)]
    base, adapter = next((cut for cut in cuts if cut[0].exists()), cuts[0])
    if missing := [path for path in (base, adapter) if path and not path.exists()]:
        raise ValueError(f"{missing[0]} does not exist; --help tells the forms of models")
    label = f"{base.stem}+{adapter.stem}" if adapter else base.stem
    if (base / "run.json").is_file():
        files = files_of_run(base, recorded_config(base).visft, (), adapter=adapter)
        return ModelSpec(label, str(files.backbone), adapter=files.adapter, model=files.model)
    if base.is_dir():
        raise ValueError(f"{base} is a folder without run.json: give a weight file, or the folder of a run")
    return ModelSpec(label, str(base), adapter=adapter)


def load_encoder(spec: ModelSpec, precision: Precision) -> Encoder:
    """Build a model on the CPU; the matrices of a backbone are stored in the precision they compute in.

    Raises:
        ValueError: whatever is wrong with one of its files, a block that it does not have, or an origin of
        another
            architecture.
    """
    if spec.mixed:
        return Mixture(spec, precision).at(spec.scale)
    return open_clip_encoder(spec.open_clip, spec.name) if spec.open_clip else _load_backbone(spec, precision)


def _load_backbone(spec: ModelSpec, precision: Precision) -> Encoder:
    path = Path(spec.name)
    file = open_model(path)
    # Beside the weights and not in them: a sum rounded to 16 bit loses most of a small adapter.
    adapter = adapter_for(path, spec.adapter).scaled(spec.scale) if spec.adapter else None
    model = dict(spec.model or (adapter.model if adapter and MODEL not in file.metadata else model_in(file)))
    if adapter is not None:
        model["layers"] = adapter.model.get("layers", ())
    elif spec.block is not None and spec.block > max(model.get("layers", ()), default=0):
        model["layers"] = ()  # merged weights go on behind the block that training read
    elif spec.whole and model.get("layers"):
        model = _as_far_as(file, model)
    backbone: Any = load_backbone(path, whole(model, file), DTYPES[precision])
    if adapter is not None:
        if problem := other_base(f"the adapter of {spec.label}", adapter.base, bases_of(backbone, path)):
            print(f"warning: {problem}", file=sys.stderr)
        adapter.install(backbone)
    if spec.block is not None:
        backbone.read_after((spec.block,))
    normalisation, projection = (backbone.pixel_mean, backbone.pixel_std), None
    if isinstance(backbone, EvaViT):
        normalisation, projection = (
            CLIP,
            None if backbone.layers_read else projection_of(path, backbone.width),
        )
    module = BackboneEncoder(backbone, projection).requires_grad_(False).eval()
    text = text_tower_in(path) if "clip" in module.kinds else None
    preprocess, side = square_preprocess(backbone.image_size, *normalisation), backbone.image_size
    return Encoder(module, module.kinds, preprocess, normalisation, side, text)


def _as_far_as(file: Weights, model: Mapping[str, Any]) -> dict[str, Any]:
    """The whole model instead of one that ends after the block that training read, if the file has all of
    it.
    """
    entire = {name: value for name, value in model.items() if name != "layers"}
    tower = tower_in(file, entire)
    has_all = all(name in tower for name in base_parameters(built(entire, "meta")))
    return entire if has_all else dict(model)


class Mixture:
    """W0 + A (W1 - W0) for any A: W0 of a model's origin, W1 its own, adapter merged; or noise in place of W1
    - W0.

    Noise is Gaussian in every parameter that changed, of the norm of its change.
    """

    def __init__(self, spec: ModelSpec, precision: Precision) -> None:
        assert spec.origin is not None
        self._own = load_encoder(replace(spec, scale=1.0, noise=None), precision)
        new, old = weights_of(self._own), weights_of(load_encoder(spec.origin, precision))
        if not alike(new, old):
            raise ValueError(f"{spec.label} is of another architecture than {spec.origin.label}")
        self.changes = {
            name: value.float() - old[name].float()
            for name, value in new.items()
            if value.is_floating_point() and not torch.equal(value, old[name].to(value))
        }
        if spec.noise is not None:
            trained = {name for name, one in _tensors(self._own).items() if isinstance(one, nn.Parameter)}
            self.changes = {n: _noise(n, one, spec.noise) for n, one in self.changes.items() if n in trained}
        self._old = {name: old[name] for name in self.changes}

    @torch.no_grad()
    def at(self, scale: float) -> Encoder:
        """The encoder of that A; one before it changes, too."""
        for layer in lora_layers(self._own.module).values():
            layer.lora_B.zero_()
        tensors = _tensors(self._own)
        for name, change in self.changes.items():
            tensors[name].copy_(self._old[name].float() + scale * change)
        return self._own


def weights_of(encoder: Encoder) -> dict[str, Tensor]:
    """All tensors of a model by the names that its library gives them, an adapter merged."""
    found = {
        name: one.detach() for name, one in _tensors(encoder).items() if name.rpartition(".")[2] not in KINDS
    }
    for name, layer in lora_layers(encoder.module).items():
        weight = layer.weight.detach().float()
        update = dense_update(len(weight), layer.lora_A, layer.lora_B, layer.slices, layer.scale)
        found[f"{name.partition('.')[2]}.weight"] = weight + update.view_as(weight)
    return found


def alike(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> bool:
    """Return True for weights of one architecture; the new one may end earlier."""
    return all(name in old and value.shape == old[name].shape for name, value in new.items())


def _tensors(encoder: Encoder) -> dict[str, Tensor]:
    """Names and tensors of both sides of a model, without the name of the encoder's own part."""
    images = {name.partition(".")[2]: one for name, one in encoder.module.state_dict(keep_vars=True).items()}
    texts = encoder.text.module.state_dict(keep_vars=True) if encoder.text else {}
    return images | {f"text {name}": one for name, one in texts.items()}


def _noise(name: str, change: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    drawn = torch.randn(change.shape, generator=generator)
    return drawn * (change.norm() / drawn.norm())
