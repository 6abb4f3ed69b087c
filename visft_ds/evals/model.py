"""A model for evaluation, rebuilt from files alone: backbone weights, heads, and an adapter or none.

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
from visft_ds.ops import DTYPES, use_numerics
from visft_ds.prepare.data import read_vocabulary
from visft_ds.prepare.datasets import needs_vocabulary
from visft_ds.pretrained import local, weights_among
from visft_ds.run_files import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    EXPORT_RECORD_FILE,
    TRAINED_BACKBONE_FILE,
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


@dataclass(frozen=True)
class ModelFiles:
    """Paths of the parts of a model, and settings of the backbone that no tensor shows."""

    backbone: Path
    heads: Path  #: folder of `<task>.safetensors`, or of published files
    adapter: Path | None
    model: Mapping[str, Any] | None = (
        None  #: preset and options of the backbone, where a run or a name tells them
    )


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
    run: VisftConfig | None = None  #: settings of the run it comes from
    vocabulary: Path | None = None  #: word map of a head that brings no words along
    #: Task -> what its head is also called with.
    decoding: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    precision: str = "auto"

    @property
    def tasks(self) -> list[str]:
        """The tasks of all streams."""
        return [task for stream in self.streams.values() for task in stream.tasks]

    def build(self, precision: Precision, device: torch.device) -> tuple[EvaluationModel, dict[str, Stream]]:
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
        given = read_vocabulary(self.vocabulary) if self.vocabulary else None
        words = next((words for info in infos.values() if (words := info.vocabulary()) is not None), given)
        if words is None and needs_vocabulary(infos):
            raise ValueError(
                f"the head in {self.files.heads} does not say which words its ids mean: give its word map, "
                "--vocabulary FILE"
            )
        check_vocabulary(infos, given or words, "the given vocabulary")
        modules = {}
        for task, head in heads.items():
            theirs, ours = ([width for width, _ in shapes] for shapes in (head.info.shapes, backbone.shapes))
            if theirs != ours:
                raise ValueError(
                    f"{head.tensors.path} reads maps of width {theirs}, and those of {backbone.describe()} have {ours}"
                )
            if problem := read_elsewhere(head.info, backbone.layers_read):
                raise ValueError(f"{head.tensors.path}: {problem}")
            criterion = TASKS[task].criterion(head.info.options, {})
            modules[task] = TaskModule(head.build(), criterion, self.decoding.get(task, {}))
            facts[f"{task} head"] = str(head.tensors.path)
        module = MultiTaskModel(backbone, modules, train_backbone=False, heads_active=False)
        if self.run is not None:
            module.heads_in_fp32 = self.run.heads.precision == "fp32"
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
        place: a run, its export or a checkpoint; or weights, or a folder that merging wrote, together with
        `heads`.
            None: `backbone` and `heads` are given.
        alone: the backbone without heads.

    Raises:
        ValueError: as `files_of_run`; no model there, or no heads of the tasks that were asked for.
    """
    chosen = None if backbone is None else named(os.fspath(backbone), download=download)
    weights = None if chosen is None else chosen.file(download=download)
    folder, words = (None if path is None else Path(path) for path in (heads, vocabulary))
    if place is not None and not place.exists():
        raise ValueError(f"{place}: no such run, checkpoint, export folder or weight file")
    run = None if place is None else run_of(place)
    config = None if run is None else recorded_config(run).visft
    if config is not None:
        settings, streams = config.tasks.enabled(), config.streams()
    elif folder is not None or alone:
        settings = {task: config_class(task)(batch_size=_BATCH, micro_batch=_BATCH) for task in TASKS}
        streams = {task: one.stream(task, (task,), 1.0) for task, one in settings.items()}
    else:
        raise ValueError(
            f"{place} is not an export of a run: give heads=FOLDER (--heads FOLDER), e.g. RUN/export of stage 1"
        )
    streams = {} if alone else _chosen(streams, tasks, folder)
    if side is not None:
        for stream in streams.values():
            stream.image["fixed_size" if "fixed_size" in stream.image else "size"] = side
    if batch_size is not None:
        streams = {name: replace(stream, micro_batch=batch_size) for name, stream in streams.items()}
    if place is not None and config is not None:
        wanted = [task for stream in streams.values() for task in stream.tasks]
        files = files_of_run(place, config, wanted, backbone=weights, heads=folder, adapter=adapter)
    else:
        if weights is None and place is not None and place.is_dir():
            inside = weights_among(path.name for path in place.iterdir())
            if inside is None:
                raise ValueError(
                    f"{place} does not have exactly one weight file: give backbone=FILE (--backbone FILE)"
                )
            place = place / inside
        weights = weights or place
        assert weights is not None, "a place or a backbone"
        own = None if adapter in (None, "none") else Path(adapter)
        files = ModelFiles(weights, folder or weights, own, chosen.description if chosen else None)
    beams = {"beam_size": beam_size} if beam_size else {}
    decoding = {
        task: one.decoding.model_dump() | beams
        for task, one in settings.items()
        if isinstance(one, WordsConfig)
    }
    precision = precision or (config.model.precision if config else "auto")
    return ModelSource(files, streams, config, words, decoding, precision)


def _chosen(
    streams: Mapping[str, Stream], names: str | Sequence[str] | None, heads: Path | None
) -> dict[str, Stream]:
    """The streams of the tasks that were asked for, by default of all that have a head.

    Args:
        names: of the tasks, in a list or with commas.
        heads: folder that has all heads; None: the run has them.
    """
    found = [
        task
        for stream in streams.values()
        for task in stream.tasks
        if heads is None or head_files(heads, task)
    ]
    if not found:
        raise ValueError(f"{heads} holds no heads: give RUN/export, or the published files")
    listed = names.split(",") if isinstance(names, str) else names
    wanted = [name.strip() for name in listed] if listed else found
    if unknown := [name for name in wanted if name not in found]:
        raise ValueError(
            f"--tasks: no head for {', '.join(map(repr, unknown))}; allowed are {', '.join(found)}"
        )
    kept = {
        name: replace(one, tasks=tuple(task for task in one.tasks if task in wanted))
        for name, one in streams.items()
    }
    return {name: stream for name, stream in kept.items() if stream.tasks}


def files_of_run(
    place: Path,
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
        place: a run, its export, or RUN/checkpoints/step_N.
        tasks: whose heads are needed.
        backbone, heads, adapter: replace the run's; adapter "none" leaves it out. A backbone that has an
        adapter merged
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
        if (export / TRAINED_BACKBONE_FILE).is_file():
            own_backbone = export / TRAINED_BACKBONE_FILE
    if adapter is not None or (
        backbone is not None and layouts.MERGED in layouts.open_model(backbone).metadata
    ):
        own_adapter = None if adapter in (None, "none") else Path(adapter)
    backbone, heads = backbone or own_backbone, heads or own_heads or export
    if missing := [str(path) for path in (backbone, heads, own_adapter) if path and not path.exists()]:
        raise ValueError(
            f"not found: {', '.join(missing)}. Files that were moved are named by --backbone FILE, --heads FOLDER and "
            "--adapter FOLDER"
        )
    return ModelFiles(
        backbone, heads, own_adapter, {"preset": config.model.preset, **config.model.backbone_options()}
    )


def _load_backbone(
    files: ModelFiles, infos: Mapping[str, HeadInfo], storage: torch.dtype
) -> tuple[Backbone, dict[str, str]]:
    """The backbone with its adapter in it, and what was loaded, by name."""
    file = layouts.open_model(files.backbone)
    merged, trained = layouts.MERGED in file.metadata, layouts.BASE in file.metadata
    of_checkpoint = files.adapter is not None and (files.adapter / "state.json").is_file()
    adapter = None if files.adapter is None or of_checkpoint else adapter_for(files.backbone, files.adapter)
    # A base does not say after which block it is read.
    tells = layouts.MODEL in file.metadata and (merged or trained)
    model = dict(layouts.model_in(file) if tells or files.model is None else files.model)
    ends = {tuple(info.extra.get("layers", ())) for info in infos.values()}
    if adapter is not None and "layers" in adapter.model:
        model["layers"] = adapter.model["layers"]
    elif files.model is None and not tells and len(ends) == 1 and (layers := ends.pop()):
        model["layers"] = layers
    backbone: Backbone = layouts.load_backbone(files.backbone, model, storage)
    facts = {"backbone": f"{files.backbone}: {layouts.described(layouts.model_of(backbone))}"}
    facts["adapter"] = "merged into the weights" if merged else "none"
    trained_on = {f"the {task} head": info.extra.get("base_weights") for task, info in infos.items()}
    if adapter is not None:
        facts["adapter"], trained_on["the adapter"] = f"{files.adapter}: {adapter.describe()}", adapter.base
        adapter.install(backbone)
    elif files.adapter is not None:
        from visft_ds.checkpoint.export import install_checkpoint  # imports deepspeed: costs seconds

        _, installed = install_checkpoint(backbone, files.adapter)
        facts["adapter"] = f"{files.adapter}: {len(installed)} tensors that trained"
    bases = layouts.bases_of(backbone, files.backbone)
    problems = [layouts.other_base(what, base, bases) for what, base in trained_on.items()]
    if any(problems):
        facts["warning"] = "; ".join(filter(None, problems))
    return backbone, facts


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
