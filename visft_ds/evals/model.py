"""A model for evaluation, rebuilt from files alone: backbone weights, heads, and an adapter or none.

Everything that a file records about itself is checked against the others before a tensor is copied: sizes of the tower,
width of the features, the base an adapter was trained on, the categories a head knows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from visft_ds.config.backbones import named
from visft_ds.config.fields import Precision
from visft_ds.config.preflight import EXPORT_RECORD_FILE, folder_of_run, head_files, run_of
from visft_ds.config.resolve import AnyPath
from visft_ds.config.schema import VisftConfig
from visft_ds.config.task_schema import Stream, WordsConfig
from visft_ds.data.samples import Batch
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.heads import (
    HeadInfo,
    check_vocabulary,
    classes_of_heads,
    head_file,
    open_head,
    read_elsewhere,
)
from visft_ds.interop.layouts import (
    BASE,
    MERGED,
    MODEL,
    bases_of,
    described,
    load_backbone,
    model_in,
    model_of,
    open_model,
    other_base,
)
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import open_weights
from visft_ds.model import MultiTaskModel, TaskModule
from visft_ds.models import Backbone
from visft_ds.ops import DTYPES, use_numerics
from visft_ds.prepare.data import read_vocabulary
from visft_ds.prepare.datasets import needs_vocabulary
from visft_ds.pretrained import local, weights_among
from visft_ds.run.folder import ADAPTER_FOLDER, BACKBONE_FILE, TRAINED_BACKBONE_FILE, export_of, recorded_config
from visft_ds.tasks import TASKS, config_class
from visft_ds.tasks.vocabulary import Vocabulary

DEFAULT_BATCH = 8  # without a run that tells


@dataclass(frozen=True)
class ModelFiles:
    """Paths of the parts of a model, and settings of the backbone that no tensor shows."""

    backbone: Path
    heads: Path  #: folder of `<task>.safetensors`, or of published files
    adapter: Path | None
    model: Mapping[str, Any] | None = None  #: preset and options of the backbone, where a run or a name tells them


@dataclass(frozen=True)
class EvaluationModel:
    """A model that predicts and cannot train."""

    module: MultiTaskModel
    device: torch.device
    precision: Precision
    heads: Mapping[str, HeadInfo]
    vocabulary: Vocabulary | None  #: of the head that works with words
    facts: Mapping[str, str]  #: what was loaded, by name, for people and records

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Any]:
        """Every head's output for a batch."""
        with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return self.module(batch.to(self.device))


@dataclass(frozen=True)
class ModelSource:
    """Parts that a model is built of, known before any weight is read."""

    files: ModelFiles
    streams: Mapping[str, Stream]  #: of its tasks; none: the backbone alone
    vocabulary: Path | None = None  #: word map of a head that brings no words along
    #: Task -> what its head is also called with.
    decoding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    precision: str = "auto"
    packed: bool = False  #: images of different sizes pass through the backbone without padding
    heads_in_fp32: bool = False  #: in bf16, too

    @property
    def tasks(self) -> list[str]:
        """The tasks of all streams."""
        return tasks_of(self.streams)

    def build(self, precision: Precision, device: torch.device) -> tuple[EvaluationModel, dict[str, Stream]]:
        """Build the model, strictly of what its files hold, and its streams with the classes of its heads.

        Args:
            precision: what the backbone computes in, and heads in bf16; its matrices are stored in it too.

        Raises:
            ValueError: a missing or damaged file, an adapter on top of merged weights, heads for another width.
        """
        files, vocabulary = self.files, read_vocabulary(self.vocabulary) if self.vocabulary else None
        use_numerics(device, tf32=precision != "fp32")
        heads_of = {task: open_head(files.heads, task) for task in self.tasks}
        infos = {task: head.info for task, head in heads_of.items()}
        backbone, facts = _load_backbone(files, infos, DTYPES[precision])
        for head in heads_of.values():
            _check_head(head.tensors.path, head.info, backbone)
        own_words = next((words for info in infos.values() if (words := info.vocabulary()) is not None), None)
        if needs_vocabulary(infos) and own_words is None and vocabulary is None:
            path = heads_of["captioning"].tensors.path
            raise ValueError(f"{path} does not say which words its ids mean: give its word map, --vocabulary FILE")
        words = own_words or vocabulary
        check_vocabulary(infos, vocabulary or words, "the given vocabulary")
        modules = {}
        for task, head in heads_of.items():
            criterion = TASKS[task].criterion(head.info.options, {})
            modules[task] = TaskModule(head.build(), criterion, self.decoding.get(task, {}))
            facts[f"{task} head"] = str(head.tensors.path)
        module = MultiTaskModel(backbone, modules, train_backbone=False, heads_active=False)
        module.packed, module.heads_in_fp32 = self.packed, self.heads_in_fp32
        if self.packed:
            facts["images"] = "packed, without padding"
        module.requires_grad_(False).eval().to(device)
        classes = classes_of_heads(infos)
        streams = {name: replace(stream, classes=classes) for name, stream in self.streams.items()}
        return EvaluationModel(module, device, precision, infos, words, facts), streams


def source_of(
    place: Path | None,
    *,
    tasks: str | Sequence[str] | None = None,
    backbone: AnyPath | None = None,
    download: bool = False,
    heads: AnyPath | None = None,
    adapter: AnyPath | None = None,
    vocabulary: AnyPath | None = None,
    beam_size: int | None = None,
    precision: str | None = None,
    side: int | None = None,
    batch_size: int | None = None,
    alone: bool = False,
) -> ModelSource:
    """All that a model is built of; what is given replaces what a run says.

    Args:
        place: a run, its export or a checkpoint; or weights, or a folder that merging wrote, together with `heads`.
            None: `backbone` and `heads` are given.
        alone: the backbone without heads.

    Raises:
        ValueError: as `chosen_streams` and `files_of_run`; no model there.
    """
    chosen = None if backbone is None else named(os.fspath(backbone), download=download)
    weights = None if chosen is None else chosen.file(download=download)
    folder, words = (None if path is None else Path(path) for path in (heads, vocabulary))
    if place is not None and (run := run_of(place)) is not None:
        config = recorded_config(run).visft
        streams = {name: resized(one, side=side, batch_size=batch_size) for name, one in config.streams().items()}
        streams = {} if alone else chosen_streams(streams, tasks, folder, folder or place)
        files = files_of_run(place, config, tasks_of(streams), backbone=weights, heads=folder, adapter=adapter)
        decoding, own = decoding_of(config, beam_size), precision or config.model.precision
        in_fp32 = config.heads.precision == "fp32"
        return ModelSource(files, streams, words, decoding, own, config.model.packed, in_fp32)
    if place is not None and not place.exists():
        raise ValueError(f"{place}: no such run, checkpoint, export folder or weight file")
    if folder is None and not alone:
        raise ValueError(
            f"{place} is no export of a run: give heads=FOLDER (--heads FOLDER), e.g. RUN/export of stage 1"
        )
    streams = {}
    if folder is not None and not alone:
        streams = streams_without_run(heads_in(folder), batch_size=batch_size or DEFAULT_BATCH, side=side)
        streams = chosen_streams(streams, tasks, folder, folder)
    weights = weights or _weights_at(place)
    files = ModelFiles(weights, folder or weights, _adapter_folder(adapter), chosen.description if chosen else None)
    return ModelSource(files, streams, words, decoding_of(None, beam_size), precision or "auto")


def _weights_at(place: Path | None) -> Path:
    """The weight file that a place is, or the one in a folder that merging wrote."""
    if place is None or place.is_file():
        return Path() if place is None else place
    name = weights_among(path.name for path in place.glob("*"))
    if name is None:
        raise ValueError(f"{place} has to hold one file of backbone weights: give backbone=FILE (--backbone FILE)")
    return place / name


def files_of_run(
    place: Path,
    config: VisftConfig,
    tasks: Sequence[str],
    *,
    backbone: Path | None = None,
    heads: Path | None = None,
    adapter: AnyPath | None = None,
) -> ModelFiles:
    """The files of a run's model: all of its export, or of its checkpoint, but for base weights that have a name.

    Args:
        place: a run, its export, or RUN/checkpoints/step_N.
        tasks: whose heads are needed.
        backbone, heads, adapter: replace the run's; adapter "none" leaves it out. A backbone that has an adapter merged
            in takes none from the run.

    Raises:
        ValueError: the run has not exported anything yet, or a file is missing.
    """
    run = folder_of_run(place)
    export, own_adapter, own_heads = export_of(run), None, None
    own_backbone = export / BACKBONE_FILE if config.model.weights is None else local(config.model.weights)
    if place != run:
        trained = open_weights(place / "parameters.safetensors")
        own_adapter = place if any(name.startswith("backbone.") for name in trained) else None
        own_heads = place if all(head_files(place, task) for task in tasks) else None
    elif not (export / EXPORT_RECORD_FILE).is_file():
        raise ValueError(
            f"the run in {run} has not exported what it trains: the same training command goes on with it, and its "
            "checkpoints, RUN/checkpoints/step_N, are models, too"
        )
    else:
        own_adapter = export / ADAPTER_FOLDER if (export / ADAPTER_FOLDER).is_dir() else None
        own_backbone = next((path for path in [export / TRAINED_BACKBONE_FILE] if path.is_file()), own_backbone)
    if adapter is not None or (backbone is not None and MERGED in open_model(backbone).metadata):
        own_adapter = _adapter_folder(adapter)
    backbone, heads = backbone or own_backbone, heads or own_heads or export
    absent = [head_file(heads, task) for task in tasks if not head_files(heads, task)]
    wanted = [backbone, *absent, *([own_adapter] if own_adapter else [])]
    if missing := [str(path) for path in wanted if not path.exists()]:
        raise ValueError(
            f"not found: {', '.join(missing)}. Files that were moved are named by --backbone FILE, --heads FOLDER and "
            "--adapter FOLDER"
        )
    return ModelFiles(backbone, heads, own_adapter, {"preset": config.model.preset, **config.model.backbone_options()})


def _adapter_folder(adapter: AnyPath | None) -> Path | None:
    """Folder of an adapter that is given; None also for "none"."""
    return None if adapter is None or adapter == "none" else Path(adapter)


def heads_in(folder: Path) -> tuple[str, ...]:
    """Names of the tasks that have a head in a folder, ours or a published one.

    Raises:
        ValueError: there is none.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the folder that holds the heads")
    found = tuple(task for task in TASKS if head_files(folder, task))
    if not found:
        where = f"they are in {folder}/export" if (folder / "export").is_dir() else "give RUN/export"
        raise ValueError(f"{folder} holds no heads: {where}, or the published files")
    return found


def _load_backbone(
    files: ModelFiles, infos: Mapping[str, HeadInfo], storage: torch.dtype
) -> tuple[Backbone, dict[str, str]]:
    """The backbone with its adapter in it, and what was loaded, by name."""
    file = open_model(files.backbone)
    of_checkpoint = files.adapter is not None and (files.adapter / "state.json").is_file()
    adapter = None if files.adapter is None or of_checkpoint else adapter_for(files.backbone, files.adapter)
    # A base does not say where it is read.
    whole = MODEL in file.metadata and not {BASE, MERGED}.isdisjoint(file.metadata)
    model = dict(model_in(file) if whole or files.model is None else files.model)
    if files.model is None and not whole:
        model = _of_heads(model, infos)
    if adapter is not None and "layers" in adapter.model:
        model["layers"] = adapter.model["layers"]
    backbone: Backbone = load_backbone(files.backbone, model, storage)
    facts = {"backbone": f"{files.backbone}: {described(model_of(backbone))}"}
    facts["adapter"] = "merged into the weights" if MERGED in file.metadata else "none"
    trained_on = {f"the {task} head": info.extra.get("base_weights") for task, info in infos.items()}
    if adapter is not None:
        facts["adapter"], trained_on["the adapter"] = f"{files.adapter}: {adapter.describe()}", adapter.base
        adapter.install(backbone)
    elif of_checkpoint and files.adapter is not None:
        from visft_ds.checkpoint.export import install_checkpoint  # imports deepspeed: costs seconds

        _, installed = install_checkpoint(backbone, files.adapter)
        facts["adapter"] = f"{files.adapter}: {len(installed)} tensors that trained"
    bases = bases_of(backbone, files.backbone)
    if problems := [line for what, base in trained_on.items() if (line := other_base(what, base, bases))]:
        facts["warning"] = "; ".join(problems)
    return backbone, facts


def _of_heads(model: Mapping[str, Any], infos: Mapping[str, HeadInfo]) -> dict[str, Any]:
    """A model read after the block that all heads learnt to read, where its file does not tell."""
    ends = {tuple(info.extra.get("layers", ())) for info in infos.values()}
    layers = ends.pop() if len(ends) == 1 else ()
    return {**model, **({"layers": layers} if layers else {})}


def streams_without_run(tasks: Sequence[str], *, batch_size: int, side: int | None) -> dict[str, Stream]:
    """Streams to evaluate tasks without a run: images are resized as in the paper, or to squares of `side` pixels.

    Raises:
        ValueError: numbers that the schema does not allow.
    """
    settings_of_each = {"updates": 1, "batch_size": batch_size, "micro_batch": batch_size}
    settings = {name: config_class(name).model_validate(settings_of_each) for name in tasks}
    return {name: resized(task.stream(name, (name,), 1.0), side=side) for name, task in settings.items()}


def resized(stream: Stream, *, side: int | None = None, batch_size: int | None = None) -> Stream:
    """A stream with squares of `side` pixels, and with batches of that size, where given."""
    image = stream.image
    if side is not None:
        image = {**image, ("fixed_size" if "fixed_size" in image else "size"): side}
    return replace(stream, image=image, micro_batch=batch_size or stream.micro_batch)


def tasks_of(streams: Mapping[str, Stream]) -> list[str]:
    """The tasks of all streams."""
    return [task for stream in streams.values() for task in stream.tasks]


def chosen_streams(
    streams: Mapping[str, Stream], names: str | Sequence[str] | None, heads: Path | None, where: Path
) -> dict[str, Stream]:
    """Streams with only the tasks that were asked for, by default all that have a head among those given.

    Args:
        names: of the tasks, in a list or with commas; None: all.
        heads: folder that replaces the run's heads.
        where: what messages call the model.

    Raises:
        ValueError: tasks that are not there, or none.
    """
    found = tasks_of(streams)
    if heads is not None and heads.is_dir():
        present = heads_in(heads)
        found = [task for task in found if task in present]
    listed = names.split(",") if isinstance(names, str) else names
    names = found if listed is None else [name.strip() for name in listed]
    unknown = [name for name in names if name not in found]
    if unknown or not names:
        lacking, allowed = ", ".join(unknown) or "any task of the run", ", ".join(found) or "none"
        raise ValueError(f"{where} has no head for {lacking}; --tasks may name {allowed}")
    kept = {n: replace(s, tasks=tuple(t for t in s.tasks if t in names)) for n, s in streams.items()}
    return {name: stream for name, stream in kept.items() if stream.tasks}


def decoding_of(config: VisftConfig | None, beam_size: int | None = None) -> dict[str, dict[str, Any]]:
    """Task with words -> options of its decoding: as the run says, with another number of beams where given."""
    stated = config.tasks.enabled() if config else {}
    found = {}
    for task, spec in TASKS.items():
        if spec.uses_vocabulary:
            settings = stated.get(task)
            options = settings.decoding.model_dump() if isinstance(settings, WordsConfig) else {}
            found[task] = {**options, **({"beam_size": beam_size} if beam_size else {})}
    return found


def adapter_for(backbone: Path, path: Path) -> Adapter:
    """Read an adapter for these weights.

    Raises:
        ValueError: it is not there, or the weights have one merged in.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such adapter; stage 2 of a training writes it into RUN/export/adapter")
    if MERGED in open_model(backbone).metadata:
        raise ValueError(f"{backbone} has an adapter merged in, and {path} would count twice: leave it out")
    return read_adapter(path)


def _check_head(path: Path, info: HeadInfo, backbone: Backbone) -> None:
    theirs, ours = ([width for width, _ in shapes] for shapes in (info.shapes, backbone.shapes))
    if theirs != ours:
        raise ValueError(
            f"{path} reads maps of width {', '.join(map(str, theirs))}, but the backbone has {backbone.describe()}: "
            f"take the head and the backbone of the same model"
        )
    if problem := read_elsewhere(info, backbone.layers_read):
        raise ValueError(f"{path}: {problem}")
