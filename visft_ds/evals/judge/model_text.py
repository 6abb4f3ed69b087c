"""Models of a comparison, as a command line names them.

| text | model |
|---|---|
| [LABEL=]FILE[+ADAPTER] | weights of a tower of ours in any known layout, with an adapter or merged |
| [LABEL=]RUN | what a finished training leaves: its base and, after stage 2, its adapter |
| [LABEL=]timm:NAME[:FILE][+ADAPTER] | without a file timm's own; also timm:hf-hub:..., timm:local-dir:... |
| [LABEL=]open_clip:NAME:TAG|FILE | also open_clip:hf-hub:..., open_clip:local-dir:... |
| ...#BLOCK | any of these but open_clip's, read after a block and without what lies behind it |
| ...@A | so many times the adapter, or BASE + A (MODEL - BASE) of whole weights |
| [LABEL=]MODEL,MODEL,... | one variant: trainings that differ by their seed |

A name that exists as a whole is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from visft_ds.config.backbones import named
from visft_ds.config.record import recorded_config
from visft_ds.evals.judge.encoders import check_open_clip_is_here
from visft_ds.evals.judge.images import stamp
from visft_ds.predict.loading import files_of_run
from visft_ds.pretrained import HUB, TIMM
from visft_ds.run_files import RECORD_FILE

#: Labels of the variants that come by themselves.
NOISE = "noise"
HALF = "half"
_OPEN_CLIP = "open_clip:"
_LOCAL = "local-dir:"  # beginning of the name of a model in a folder
_LABEL = re.compile(r"([\w .-]+)=(.+)", re.DOTALL)
_END = re.compile(r"(.+?)(?:#(\d+))?(?:@([-+]?[0-9.]+(?:e[-+]?[0-9]+)?))?", re.DOTALL)


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
        """Everything that its features depend on, in JSON's types; files by name, size and time."""
        paths = [Path(self.name)] if self.name else []
        if self.adapter is not None:
            paths.append(self.adapter)
        if self.open_clip is not None and self.open_clip.startswith(_LOCAL):
            paths.append(Path(self.open_clip.removeprefix(_LOCAL)))
        files = []
        for path in paths:
            inside = [path] if path.is_file() else sorted(path.glob("*"))
            files += [f"{file.name} {stamp(file)}" for file in inside]
        identity = asdict(replace(self, label="", adapter=None, origin=None))
        identity["files"] = files
        if self.origin is not None and self.mixed:
            identity["origin"] = self.origin.identity
        return identity

    @property
    def mixed(self) -> bool:
        """Return True if its weights are computed from those of `origin`."""
        return self.noise is not None or (self.adapter is None and self.scale != 1)

    def __str__(self) -> str:
        parts = [f"open_clip {self.open_clip}" if self.open_clip else "", self.name]
        if self.adapter:
            parts.append(f"+ {self.adapter}")
        if self.noise is not None:
            parts.append(f"as noise {self.noise}")
        if self.scale != 1:
            parts.append(f"x {self.scale:.4g}")
        if self.block is not None:
            parts.append(f"after block {self.block}")
        return " ".join(filter(None, parts))


def parse_variants(texts: Sequence[str], *, download: bool = False) -> dict[str, tuple[ModelSpec, ...]]:
    """Label -> models of each variant of a command line, BASE first; files are looked for, not opened.

    Args:
        download: weights of timm and open_clip that are not on this machine may be fetched.

    Raises:
        ValueError: as `parse_model`; also for two variants or models of one name, and numbers of seeds that
            cannot be paired with those of another variant.
    """
    variants = [_variant(text, download) for text in texts]
    _check_labels(variants)
    seeds = {label: len(models) for label, models in variants if len(models) > 1}
    if len(set(seeds.values())) > 1:
        counts = ", ".join(f"{label} has {count}" for label, count in seeds.items())
        raise ValueError(f"seeds are compared one by one, and {counts}: give as many, or one")
    base_label, base_models = variants[0]
    base = base_models[0]
    if len(base_models) > 1 or base.mixed:
        raise ValueError(f"BASE must be one model, without @SCALE; it is {texts[0]}")
    # BASE is what its user has, whatever training read of it.
    base = replace(base, whole=base.block is None and base.adapter is None)
    result: dict[str, tuple[ModelSpec, ...]] = {base_label: (base,)}
    for label, models in variants[1:]:
        result[label] = tuple(replace(model, origin=base) for model in models)
    return result


def _check_labels(variants: Sequence[tuple[str, Sequence[ModelSpec]]]) -> None:
    """Raise ValueError for a label that two variants or models have, or one that comes by itself."""
    taken = {NOISE, HALF}
    for label, models in variants:
        for name in {label, *(model.label for model in models)}:
            if name in taken:
                raise ValueError(
                    f"two models are called {name} ({NOISE} and {HALF} come by themselves): give one of them "
                    f"a label, as in LABEL={name}..."
                )
            taken.add(name)


def _variant(text: str, download: bool) -> tuple[str, list[ModelSpec]]:
    """(label, models) of a variant."""
    label, names = _labelled(text)
    parts = [text] if Path(names).exists() else text.split(",")
    models = [parse_model(part, download=download) for part in parts]
    label = label or models[0].label
    if len(models) > 1:
        models = [replace(model, label=f"{label} {number}") for number, model in enumerate(models, 1)]
    return label, models


def _labelled(text: str) -> tuple[str, str]:
    """(label, or nothing; what it is a label of)."""
    match = _LABEL.fullmatch(text)
    return (match[1].strip(), match[2]) if match else ("", text)


def parse_model(text: str, *, download: bool = False) -> ModelSpec:
    """Read one model of a command line; files are looked for, not opened.

    Raises:
        ValueError: a file that is not there, an unknown name, or weights that would have to be fetched.
    """
    label, model = _labelled(text)
    block = None
    scale = None
    match = None if Path(model).exists() else _END.fullmatch(model)
    if match:
        model, block, scale = match.groups()
    if model.startswith(_OPEN_CLIP):
        if block:
            raise ValueError(f"{text}: #BLOCK works for models of visft_ds and timm only")
        spec = _of_open_clip(model.removeprefix(_OPEN_CLIP), download)
    else:
        base, adapter = _without_adapter(model.removeprefix(TIMM))
        spec = _of_timm(base, adapter, download) if model.startswith(TIMM) else _of_files(Path(base), adapter)
        if adapter is not None:
            spec = replace(spec, label=f"{spec.label}+{adapter.stem}")
    return replace(
        spec,
        label=label or (f"{spec.label}#{block}" if block else spec.label),
        block=int(block) if block else None,
        scale=float(scale) if scale else 1.0,
    )


def _name_and_file(text: str) -> tuple[str, str]:
    """(name of a model, file or tag of its weights); a repository or a folder brings its weights along."""
    if text.startswith((HUB, _LOCAL)):
        return text, ""
    name, _, file = text.partition(":")
    return name, file


def _of_open_clip(text: str, download: bool) -> ModelSpec:
    name, weights = _name_and_file(text)
    if not download:
        check_open_clip_is_here(name, weights)
    return ModelSpec(Path(name).name, weights, open_clip=name)


def _of_timm(text: str, adapter: Path | None, download: bool) -> ModelSpec:
    name, file = _name_and_file(text)
    label = Path(name).name
    if file:
        return ModelSpec(label, file, adapter=adapter, model={"preset": f"{TIMM}{name}"})
    known = name.removeprefix(_LOCAL) if name.startswith((HUB, _LOCAL)) else f"{TIMM}{name}"
    backbone = named(known, download=download)
    file = str(backbone.file(download=download))
    return ModelSpec(label, file, adapter=adapter, model=backbone.description)


def _without_adapter(text: str) -> tuple[str, Path | None]:
    """(base weights, adapter behind them, if there is any)."""
    if not Path(text).exists():
        for sign in re.finditer(r"\+", text):
            base = text[: sign.start()]
            adapter = Path(text[sign.end() :])
            if Path(base).exists() or adapter.exists():
                return base, adapter
    return text, None


def _of_files(base: Path, adapter: Path | None) -> ModelSpec:
    """A weight file, with an adapter or without, or a run."""
    for path in (base, adapter):
        if path is not None and not path.exists():
            raise ValueError(f"{path} does not exist; --help tells the forms of models")
    if (base / RECORD_FILE).is_file():
        files = files_of_run(base, recorded_config(base).visft, (), adapter=adapter)
        return ModelSpec(base.stem, str(files.backbone), adapter=files.adapter, model=files.model)
    if base.is_dir():
        raise ValueError(f"{base} is a folder without run.json: give a weight file, or the folder of a run")
    return ModelSpec(base.stem, str(base), adapter=adapter)
