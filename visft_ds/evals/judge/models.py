"""The models of a comparison, as a command line names them.

[LABEL=]FILE[+ADAPTER]             weights of a tower of ours in any known layout, with an adapter or merged
[LABEL=]RUN                        what a finished training leaves: its base and, after stage 2, its adapter
[LABEL=]open_clip:NAME:TAG|FILE    also open_clip:hf-hub:..., open_clip:local-dir:...
[LABEL=]timm:NAME[:FILE]           without a file timm's own weights; also timm:hf-hub:..., timm:local-dir:...
...#BLOCK                          any of these but open_clip's, read after a block and without what lies behind it
...@A                              so many times the adapter, or BASE + A (MODEL - BASE) of whole weights
[LABEL=]MODEL,MODEL,...            one arm: trainings that differ by their seed
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from visft_ds.models.lora import KINDS, dense_update, lora_layers
from visft_ds.models.timm_backbone import as_backbone
from visft_ds.ops import DTYPES
from visft_ds.run.folder import recorded_config

NOISE, HALF = "noise", "half"  #: arms that come by themselves
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
    scale: float = 1.0  #: factor on the effect of the adapter, or on the difference from `origin`
    noise: int | None = None  #: seed of noise in place of the difference from `origin`
    origin: ModelSpec | None = None  #: BASE of the comparison
    model: Mapping[str, Any] | None = None  #: preset and options of its backbone, if a run records them
    block: int | None = None  #: that it is read after

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that its features depend on, in JSON's types; files by name, size and time."""
        paths = [Path(text) for text in (self.name, self.weights or "", self.adapter or "") if text]
        files = [each for path in paths for each in ([path] if path.is_file() else sorted(path.glob("*")))]
        own = asdict(replace(self, origin=None)) | {"label": "", "adapter": ""}
        origin = self.origin.identity if self.origin is not None and self.mixed else None
        return own | {"origin": origin, "files": [f"{file.name} {stamp(file)}" for file in files]}

    @property
    def mixed(self) -> bool:
        """Return True if its weights are computed from those of `origin`."""
        return self.noise is not None or (self.adapter is None and self.scale != 1)

    def __str__(self) -> str:
        parts = [self.name if self.library == "visft_ds" else f"{self.library} {self.name}", self.weights]
        parts += [f"+ {self.adapter}" if self.adapter else None]
        parts += [None if self.noise is None else f"as noise {self.noise}"]
        parts += [None if self.scale == 1 else f"x {self.scale:.4g}"]
        return " ".join([*filter(None, parts), *([] if self.block is None else [f"after block {self.block}"])])


def parse_arms(texts: Sequence[str]) -> dict[str, tuple[ModelSpec, ...]]:
    """Label -> models of each arm of a command line, BASE first; files are looked for, not opened.

    Raises:
        ValueError: as `parse_model`; also for two arms or models of one name, and numbers of seeds that cannot be
            paired with those of another arm.
    """
    arms = [_arm(text) for text in texts]
    labels = [name for label, models in arms for name in {label, *(model.label for model in models)}]
    if taken := {NOISE, HALF} & {*labels}:
        raise ValueError(f"{taken.pop()} is an arm that comes by itself: give yours another label")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"two models are called {twice[0]}: give one of them a label, as in LABEL={twice[0]}...")
    several = {label: len(models) for label, models in arms if len(models) > 1}
    if len({*several.values()}) > 1:
        told = ", ".join(f"{label} has {count}" for label, count in several.items())
        raise ValueError(f"seeds are compared one by one, and {told}: give as many, or one")
    (first, (base, *more)), *others = arms
    if more or base.mixed:
        raise ValueError(f"BASE is one model as it is, and {first} is {len(more) + 1} x {base.scale:g}")
    return {first: (base,), **{label: tuple(replace(one, origin=base) for one in of) for label, of in others}}


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
        ValueError: a file that is not there.
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
        if end and library == "open_clip":
            raise ValueError(f"{text}: blocks are read of models of ours and of timm, not of open_clip")
        return ModelSpec(label or Path(name).name + end, library, name, weights or None, scale=scale, block=block)
    base, adapter = _files(rest)
    spec = ModelSpec("", "visft_ds", str(base), None, adapter, scale, block=block)
    if (base / "run.json").is_file():
        files = files_of_run(base, recorded_config(base).visft, (), adapter=adapter)
        name = str(files.backbone)
        spec = replace(spec, name=name, adapter=files.adapter, model=files.model)
    elif base.is_dir():
        raise ValueError(f"{base} is a folder without run.json: give a weight file, or the folder of a run")
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


def load_encoder(spec: ModelSpec, precision: Precision, *, blocks: bool = False) -> Encoder:
    """Build a model on the CPU; the matrices of a tower of ours are stored in the precision they compute in.

    Args:
        blocks: without text side, such that it can be read after each block, where its blocks are known.

    Raises:
        ValueError: whatever is wrong with one of its files, a block that it does not have, or an origin of another
            architecture.
    """
    if spec.mixed:
        return Mixture(spec, precision, blocks=blocks).at(spec.scale)
    if spec.block is None:
        encoder = _load(spec, precision)
        return (_readable(encoder, spec) or _load(spec, precision)) if blocks else encoder
    cut = _readable(_load(spec, precision), spec)
    if cut is None:
        raise ValueError(f"{spec.label} has no blocks that are known: our towers have, and timm's models")
    backbone: Any = cut.module.backbone
    backbone.read_after((spec.block,))
    return cut


def _load(spec: ModelSpec, precision: Precision) -> Encoder:
    if spec.library == "visft_ds":
        return _load_own(spec, precision)
    build = open_clip_encoder if spec.library == "open_clip" else timm_encoder
    return build(spec.name, spec.weights)


class Mixture:
    """W0 + A (W1 - W0) for any A: W0 of a model's origin, W1 its own, adapter merged; or noise in place of W1 - W0.

    Noise is Gaussian in every parameter that changed, of the norm of its change.
    """

    def __init__(self, spec: ModelSpec, precision: Precision, *, blocks: bool = False) -> None:
        assert spec.origin is not None
        own = load_encoder(replace(spec, scale=1.0, noise=None), precision, blocks=blocks)
        new, old = weights_of(own), weights_of(load_encoder(spec.origin, precision, blocks=blocks))
        if not alike(new, old):
            raise ValueError(f"{spec.label} is of another architecture than {spec.origin.label}")
        self.changes = {
            name: value.float() - old[name].float()
            for name, value in new.items()
            if value.is_floating_point() and not torch.equal(value, old[name].to(value))
        }
        if spec.noise is not None:
            trained = dict(_named(own, nn.Module.named_parameters))
            self.changes = {n: _noise(n, one, spec.noise) for n, one in self.changes.items() if n in trained}
        self._own, self._old = own, {name: old[name] for name in self.changes}

    @torch.no_grad()
    def at(self, scale: float) -> Encoder:
        """The encoder of that A; one before it changes, too."""
        for layer in lora_layers(self._own.module).values():
            layer.lora_B.zero_()
        for name, value in _named(self._own, nn.Module.named_parameters, nn.Module.named_buffers):
            if name in self.changes:
                value.copy_(self._old[name].float() + scale * self.changes[name])
        return self._own


def weights_of(encoder: Encoder) -> dict[str, Tensor]:
    """All tensors of a model by the names that its library gives them, an adapter merged."""
    layers = {f"{name}.weight": layer for name, layer in lora_layers(encoder.module).items()}
    found = dict(_named(encoder, nn.Module.named_parameters, nn.Module.named_buffers))
    for name, layer in layers.items():
        short, weight = name.partition(".")[2], layer.weight.detach().float()
        update = dense_update(len(weight), layer.lora_A, layer.lora_B, layer.slices, layer.scale).detach()
        found[short] = weight + update.view_as(weight)
    return {name: value.detach() for name, value in found.items() if name.rpartition(".")[2] not in KINDS}


def alike(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> bool:
    """Return True for weights of one architecture; the new one may end earlier."""
    return all(name in old and value.shape == old[name].shape for name, value in new.items())


def _named(encoder: Encoder, *of: Callable[[nn.Module], Iterable[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    """Names and tensors of both sides of a model, without the name of the encoder's own part."""
    for each in of:
        yield from ((name.partition(".")[2], value) for name, value in each(encoder.module))
        yield from ((f"text {name}", value) for name, value in (each(encoder.text.module) if encoder.text else ()))


def _noise(name: str, change: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    drawn = torch.randn(change.shape, generator=generator)
    return drawn * (change.norm() / drawn.norm())


def _readable(encoder: Encoder, spec: ModelSpec) -> Encoder | None:
    """The same as a backbone that can be read after each block, without text side; parameters are shared.

    None for a network whose blocks are not known; then the encoder is of no use any more.
    """
    module: Any = encoder.module
    if spec.library == "timm":
        name = module.model.pretrained_cfg["architecture"] if ":" in spec.name else spec.name
        try:
            module = FeatureMapEncoder(as_backbone(module.model, name, {}))
        except ValueError:  # it has no map
            return None
    if not isinstance(module, (EvaEncoder, FeatureMapEncoder)) or not module.backbone.ends():
        return None
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
