"""A model rebuilt from files alone, to predict and to be evaluated: backbone, heads, and an adapter or none.

Everything that a file records about itself is checked against the others before a tensor is copied: sizes of
the tower, width of the features, the base an adapter was trained on, the categories a head knows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from visft_ds.config.backbones import named
from visft_ds.config.record import recorded_config
from visft_ds.config.resolve import AnyPath
from visft_ds.config.schema import VisftConfig
from visft_ds.data.samples import Batch
from visft_ds.interop import layouts
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.heads import HeadInfo, check_vocabulary, classes_of_heads, open_head, read_elsewhere
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import open_weights
from visft_ds.model import MultiTaskModel, TaskModule
from visft_ds.models import Backbone
from visft_ds.ops import DTYPES, keep_freed_memory, use_numerics
from visft_ds.prepare.data import read_vocabulary
from visft_ds.pretrained import local, weights_among
from visft_ds.run_files import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    EXPORT_RECORD_FILE,
    PARAMETERS_FILE,
    STATE_FILE,
    TRAINED_BACKBONE_FILE,
    check_exists,
    export_of,
    folder_of_run,
    run_of,
)
from visft_ds.settings.fields import Precision
from visft_ds.settings.task_schema import Stream, WordsConfig
from visft_ds.tasks import TASKS, config_class
from visft_ds.tasks.head_files import head_files
from visft_ds.tasks.vocabulary import Vocabulary

_BATCH = 8  # without a run that tells
NO_ADAPTER = "none"  #: value of `adapter` that leaves the run's out


@dataclass(frozen=True)
class ModelFiles:
    """Paths of the parts of a model, and settings of the backbone that no tensor shows."""

    backbone: Path
    heads: Path  #: folder of `<task>.safetensors`, or of published files
    adapter: Path | None  #: folder of an adapter, or of a checkpoint that trained the backbone
    #: Preset and options of the backbone, where a run or a name tells them.
    model: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class LoadedModel:
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
    heads_in_fp32: bool = False
    vocabulary: Path | None = None  #: word map of a head that brings no words along
    #: Task -> what its head is also called with.
    decoding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    precision: str = "auto"

    @property
    def tasks(self) -> list[str]:
        """The tasks of all streams."""
        return [task for stream in self.streams.values() for task in stream.tasks]

    def build(self, precision: Precision, device: torch.device) -> tuple[LoadedModel, dict[str, Stream]]:
        """Build the model, strictly of what its files hold, and its streams with the classes of its heads.

        Args:
            precision: what the backbone computes in, and heads in bf16; its matrices are stored in it too.

        Raises:
            ValueError: a missing or damaged file, an adapter on top of merged weights, heads for another
            width.
        """
        use_numerics(device, tf32=precision != "fp32")
        heads = {task: open_head(self.files.heads, task) for task in self.tasks}
        infos = {task: head.info for task, head in heads.items()}
        backbone, facts = _load_backbone(self.files, infos, DTYPES[precision])
        vocabulary = self._vocabulary(infos)
        widths = [width for width, _ in backbone.shapes]
        modules = {}
        for task, head in heads.items():
            head_widths = [width for width, _ in head.info.shapes]
            if head_widths != widths:
                raise ValueError(
                    f"{head.tensors.path} reads maps of width {head_widths}, and those of "
                    f"{backbone.describe()} have {widths}"
                )
            if problem := read_elsewhere(head.info, backbone.layers_read, backbone.bands):
                raise ValueError(f"{head.tensors.path}: {problem}")
            criterion = TASKS[task].criterion(head.info.options, {})
            modules[task] = TaskModule(head.build(), criterion, self.decoding.get(task, {}))
            facts[f"{task} head"] = f"{head.tensors.path}{_limit(head.info)}"

        module = MultiTaskModel(backbone, modules, train_backbone=False, heads_active=False)
        module.heads_in_fp32 = self.heads_in_fp32
        module.requires_grad_(False).eval().to(device)
        keep_freed_memory(device)
        classes = classes_of_heads(infos)
        streams = {name: replace(stream, classes=classes) for name, stream in self.streams.items()}
        return LoadedModel(module, device, precision, infos, vocabulary, facts), streams

    def _vocabulary(self, infos: Mapping[str, HeadInfo]) -> Vocabulary | None:
        """The words of the head that works with words: those it brings along, else those of the word map."""
        from_file = read_vocabulary(self.vocabulary) if self.vocabulary else None
        from_heads = [info.vocabulary() for info in infos.values()]
        vocabulary = next((words for words in from_heads if words is not None), from_file)
        if vocabulary is None and any(TASKS[task].uses_vocabulary for task in infos):
            raise ValueError(
                f"the head in {self.files.heads} does not say which words its ids mean: give its word map, "
                "--vocabulary FILE"
            )
        check_vocabulary(infos, from_file or vocabulary, "the given vocabulary")
        return vocabulary


def _limit(head: HeadInfo) -> str:
    """Most objects that a head can find in an image, as the end of a line; "" where no number limits it."""
    most = getattr(head.settings(), "most_objects", None)
    return "" if most is None else f", at most {most} objects an image"


def source_of(
    source: Path | None,
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
        source: a run, its export or a checkpoint; or weights, or a folder that merging wrote, together with
            `heads`. None: `backbone` and `heads` are given.
        side: of the squares that images are resized to, in pixels.
        alone: the backbone without heads.

    Raises:
        ValueError: as `files_of_run`; no model there, or no heads of the tasks that were asked for.
    """
    if source is not None:
        check_exists(source)
    heads_folder = None if heads is None else Path(heads)
    run = None if source is None else run_of(source)
    config = None if run is None else recorded_config(run).visft
    if config is not None:
        settings = config.tasks.enabled()
        streams = config.streams()
    elif heads_folder is not None or alone:
        settings = {task: config_class(task)(batch_size=_BATCH, micro_batch=_BATCH) for task in TASKS}
        streams = {task: options.stream(task, {task: options}, 1.0) for task, options in settings.items()}
    else:
        raise ValueError(
            f"{source} is neither a run nor its export: give one, or for merged weights also --heads FOLDER, "
            "such as RUN/export of stage 1"
        )
    streams = {} if alone else _with_heads(streams, tasks, heads_folder)
    for name, stream in streams.items():
        image = dict(stream.image)
        if side is not None:
            image["fixed_size" if "fixed_size" in image else "size"] = side
        streams[name] = replace(stream, image=image, micro_batch=batch_size or stream.micro_batch)

    base = None if backbone is None else named(os.fspath(backbone), download=download)
    weights = None if base is None else base.file(download=download)
    if source is not None and config is not None:
        with_heads = [task for stream in streams.values() for task in stream.tasks]
        files = files_of_run(
            source, config, with_heads, backbone=weights, heads=heads_folder, adapter=adapter
        )
    else:
        weights = weights or _weights_at(source)
        adapter_folder = None if adapter in (None, NO_ADAPTER) else Path(adapter)
        description = None if base is None else base.description
        files = ModelFiles(weights, heads_folder or weights, adapter_folder, description)

    decoding = {}
    for task, options in settings.items():
        if isinstance(options, WordsConfig):
            decoding[task] = options.decoding.model_dump()
            if beam_size is not None:
                decoding[task]["beam_size"] = beam_size
    return ModelSource(
        files,
        streams,
        heads_in_fp32=config is not None and config.heads.precision == "fp32",
        vocabulary=None if vocabulary is None else Path(vocabulary),
        decoding=decoding,
        precision=precision or (config.model.precision if config else "auto"),
    )


def _with_heads(
    streams: Mapping[str, Stream], names: str | Sequence[str] | None, heads: Path | None
) -> dict[str, Stream]:
    """The streams of the tasks that were asked for, by default of all that have a head.

    Args:
        names: of the tasks, in a list or with commas.
        heads: folder that has all heads; None: the run has them.
    """
    tasks = [task for stream in streams.values() for task in stream.tasks]
    if heads is not None:
        tasks = [task for task in tasks if head_files(heads, task)]
    if not tasks:
        raise ValueError(f"{heads} holds no heads: give RUN/export, or the published files")
    if names:
        listed = names.split(",") if isinstance(names, str) else names
        asked = [name.strip() for name in listed]
        unknown = [repr(name) for name in asked if name not in tasks]
        if unknown:
            raise ValueError(f"--tasks: no head for {', '.join(unknown)}; allowed are {', '.join(tasks)}")
        tasks = asked
    chosen = {}
    for name, stream in streams.items():
        own = tuple(task for task in stream.tasks if task in tasks)
        if own:
            chosen[name] = replace(stream, tasks=own)
    return chosen


def _weights_at(source: Path | None) -> Path:
    """The weight file itself, or the only one in a folder."""
    assert source is not None, "a source or a backbone"
    if not source.is_dir():
        return source
    name = weights_among(path.name for path in source.iterdir())
    if name is None:
        raise ValueError(f"{source} does not have exactly one weight file: give --backbone FILE")
    return source / name


def files_of_run(
    source: Path,
    config: VisftConfig,
    tasks: Sequence[str],
    *,
    backbone: Path | None = None,
    heads: Path | None = None,
    adapter: AnyPath | None = None,
) -> ModelFiles:
    """The files of a run's model: all of its export, or of its checkpoint, but for base weights that have a
    name.

    Args:
        source: a run, its export, or RUN/checkpoints/step_N.
        tasks: whose heads are needed.
        backbone, heads, adapter: replace the run's; adapter "none" leaves it out. A backbone that has an
            adapter merged in takes none from the run.

    Raises:
        ValueError: the run has not exported anything yet, or a file is missing.
    """
    run = folder_of_run(source)
    export = export_of(run)
    own_backbone = export / BACKBONE_FILE if config.model.weights is None else local(config.model.weights)
    own_heads = export
    own_adapter = None
    if source != run:  # a checkpoint
        trained = open_weights(source / PARAMETERS_FILE)
        if any(name.startswith("backbone.") for name in trained):
            own_adapter = source
        if all(head_files(source, task) for task in tasks):
            own_heads = source
    elif (export / EXPORT_RECORD_FILE).is_file():
        if (export / ADAPTER_FOLDER).is_dir():
            own_adapter = export / ADAPTER_FOLDER
        if (export / TRAINED_BACKBONE_FILE).is_file():
            own_backbone = export / TRAINED_BACKBONE_FILE
    else:
        raise ValueError(
            f"{run} has no export yet: finish the run with the same training command, or give one of its "
            f"checkpoints, {run}/checkpoints/step_N"
        )
    if adapter is not None:
        own_adapter = None if adapter == NO_ADAPTER else Path(adapter)
    elif backbone is not None and layouts.MERGED in layouts.open_model(backbone).metadata:
        own_adapter = None
    model = {"preset": config.model.preset, **config.model.backbone_options()}
    files = ModelFiles(backbone or own_backbone, heads or own_heads, own_adapter, model)

    paths = [files.backbone, files.heads, files.adapter]
    missing = [str(path) for path in paths if path is not None and not path.exists()]
    if missing:
        raise ValueError(
            f"not found: {', '.join(missing)}. Name files that were moved by --backbone FILE, --heads FOLDER "
            "and --adapter FOLDER"
        )
    return files


def _load_backbone(
    files: ModelFiles, infos: Mapping[str, HeadInfo], storage: torch.dtype
) -> tuple[Backbone, dict[str, str]]:
    """The backbone with its adapter in it, and what was loaded, by name."""
    metadata = layouts.open_model(files.backbone).metadata
    adapter = None
    from_checkpoint = files.adapter is not None and (files.adapter / STATE_FILE).is_file()
    if files.adapter is not None and not from_checkpoint:
        adapter = adapter_for(files.backbone, files.adapter)
    model = _described_model(files, adapter, infos)
    backbone: Backbone = layouts.load_backbone(files.backbone, model, storage)

    facts = {"backbone": f"{files.backbone}: {layouts.describe_model(layouts.model_of(backbone))}"}
    facts["adapter"] = "merged into the weights" if layouts.MERGED in metadata else "none"
    trained_on = {f"the {task} head": info.extra.get("base_weights") for task, info in infos.items()}
    if adapter is not None:
        facts["adapter"] = f"{files.adapter}: {adapter.describe()}"
        trained_on["the adapter"] = adapter.base
        adapter.install(backbone)
    elif files.adapter is not None:
        from visft_ds.checkpoint.export import install_checkpoint  # imports deepspeed: costs seconds

        _, installed = install_checkpoint(backbone, files.adapter)
        facts["adapter"] = f"{files.adapter}: {len(installed)} tensors that trained"
    bases = layouts.bases_of(backbone, files.backbone)
    problems = [layouts.other_base(part, base, bases) for part, base in trained_on.items()]
    if any(problems):
        facts["warning"] = "; ".join(problem for problem in problems if problem)
    return backbone, facts


def _described_model(
    files: ModelFiles, adapter: Adapter | None, infos: Mapping[str, HeadInfo]
) -> dict[str, Any]:
    """Preset and options of the backbone: what its file says, else its run or name, else its tensors.

    A base does not say after which block it is read: that an adapter, or all heads alike, know.
    """
    file = layouts.open_model(files.backbone)
    was_trained = layouts.MERGED in file.metadata or layouts.BASE in file.metadata
    file_says = was_trained and layouts.MODEL in file.metadata
    model = dict(files.model or {})
    if file_says or files.model is None:
        model = dict(layouts.model_in(file))
    if adapter is not None and "layers" in (adapter.model or {}):
        assert adapter.model is not None
        model["layers"] = adapter.model["layers"]
    elif files.model is None and not file_says:
        read_by_heads = {tuple(info.extra.get("layers", ())) for info in infos.values()}
        if len(read_by_heads) == 1 and read_by_heads != {()}:
            (model["layers"],) = read_by_heads
    for info in infos.values():
        if "bands" in info.extra and files.model is None:
            model.setdefault("bands", info.extra["bands"])
    return model


def adapter_for(backbone: Path, path: Path) -> Adapter:
    """Read an adapter for these weights.

    Raises:
        ValueError: it is not there, or the weights have one merged in.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such adapter; stage 2 of a training writes it into RUN/export/adapter")
    if layouts.MERGED in layouts.open_model(backbone).metadata:
        raise ValueError(f"{backbone} has an adapter merged in, and {path} would count twice: leave it out")
    return read_adapter(path)
