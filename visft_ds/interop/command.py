"""Merging, averaging and rewriting of adapters: what visft merge does once its flags are read."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from visft_ds import __version__
from visft_ds.checkpoint.disk import reason
from visft_ds.config import ResolvedConfig
from visft_ds.evals.records import MAIN, read_evaluation
from visft_ds.flags import check_extra
from visft_ds.interop import loaders, onnx, peft
from visft_ds.interop.adapter import Adapter, average
from visft_ds.interop.backbones import load_backbone, load_timm, timm_settings
from visft_ds.interop.card import CardSource, Origin, adapter_card, merged_card, onnx_card, timm_card
from visft_ds.interop.card_data import Measurement, publication_of
from visft_ds.interop.efficientnet import holds_efficientnet, read_efficientnet
from visft_ds.interop.files import PICKLE_SUFFIXES, examples, open_weights, sha256_file
from visft_ds.interop.formats import FORMATS, side_files
from visft_ds.interop.layouts import Tower, part_of, tower_in
from visft_ds.interop.merge import (
    MergeReport,
    Share,
    Verification,
    check_base,
    check_timm_base,
    merge_into_file,
    merge_timm,
    verify_merge,
)
from visft_ds.interop.towers import build_tower, open_tower, resolve_tower
from visft_ds.interop.tuned import Change, TunedWeights
from visft_ds.interop.writing import FULL, refuse_existing, write_safetensors, write_text
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import PRESETS
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics
from visft_ds.ops import DTYPES
from visft_ds.prepare.places import DATA
from visft_ds.run.adapter import base_of, place_of, read_change
from visft_ds.run.folder import ADAPTER_FOLDER, RECORD_FILE, read_run, recorded_config
from visft_ds.tasks import config_class

_ADAPTER_FORMATS = ("peft",)


def merge(given: argparse.Namespace) -> int:
    """Write what the flags of `visft_ds.interop.cli` ask for; returns the exit status.

    Raises:
        ValueError: files or flags that do not fit each other.
    """
    if absent := [str(path) for path in given.adapter if not path.exists()]:
        raise ValueError(
            f"{', '.join(absent)}: no such adapter; give a run, a checkpoint, an adapter folder or a LoRA file"
        )
    if given.base is None and len(given.adapter) == 1:
        given.base = base_of(given.adapter[0])
    _check(given)
    if not given.adapter:
        if holds_efficientnet(open_weights(given.base)):
            return _write_efficientnet(given)
        return _write_merged(given, None, Origin(None, ()))
    places = [place_of(path) for path in given.adapter]
    adapters = [read_change(place) for place in places]
    model = next((change.timm for change in adapters if change.timm is not None), None)
    several = len(adapters) > 1
    if model is not None and several and given.verify:
        raise ValueError(f"{places[0]} is of a model of timm: --verify of several adapters is for towers of EVA-CLIP")
    adapter = _joined(adapters, given.scale)
    names = [_name(path) for path in given.adapter]
    how = [f"mean of {len(adapters)} adapters"] * several + [f"times {given.scale:g}"] * (given.scale != 1)
    for path, found, each in zip(given.adapter, places, adapters, strict=True):
        where = f" ({found})" if found != path else ""
        of_timm = f"timm {model[0]}, " if model else ""
        print(f"adapter  {path}{where}: {of_timm}{each.describe()}")
    place = places[0].resolve()
    if place.is_file() and place.parent.name == ADAPTER_FOLDER:  # it stands for its folder
        place = place.parent
    run = None if several else _run_of(place)
    own = run if not how else None  # whose evaluation judged what is written
    origin = Origin(
        None,
        tuple(CardSource(name, adapter.fingerprint()) for name, adapter in zip(names, adapters, strict=True)),
        _trained(run, place) if run else {},
        _measured(given.results) if given.results else _measured_in(own, place) if own else (),
        (f"The {', '.join(how)}",) if how else (),
        publication_of(given.base, model and model[0]),
    )
    if given.format not in _ADAPTER_FORMATS:
        return _write_merged(given, adapter, origin) if model is None else _write_timm(given, adapter, origin)
    if isinstance(adapter, TunedWeights):
        raise ValueError(f"{names[0]} trained its own weights and has no adapter to write: choose --format timm, ...")
    return _write_adapter(given, adapter, origin)


def _write_efficientnet(given: argparse.Namespace) -> int:
    """Write a published EfficientNet under timm's names."""
    file = read_efficientnet(given.base)
    form = given.format, given.dtype, given.out.suffix
    if form != ("timm", "fp32", ".safetensors") or given.verify:
        raise ValueError(
            f"{given.base} is an EfficientNet of timm: give --format timm and an --out that ends in .safetensors, "
            f"without --dtype and --verify"
        )
    write_safetensors(given.out, file.infos, file.get, file.metadata)
    name = timm_settings(file)
    assert name is not None
    print(f"base     {given.base}\n         sha256 {sha256_file(given.base)}\nout      {given.out} (fp32)")
    print(f'load it  timm.create_model("{name[0]}", checkpoint_path="{given.out}")')
    return 0


def _write_timm(given: argparse.Namespace, change: Change, origin: Origin) -> int:
    """Write a changed model of timm: for timm, transformers or ONNX."""
    assert change.timm is not None
    if given.format not in ("timm", "transformers", "onnx"):
        raise ValueError(
            f"--format {given.format} is for towers of EVA-CLIP, this is timm's {change.timm[0]}: choose timm, "
            f"transformers, onnx or peft"
        )
    dtype, layout = DTYPES[given.dtype], _layout(given)
    with _staged(given.out) as stage:
        file = _weights_in(stage, given)
        report = merge_timm(given.base, change, file, layout=layout, dtype=dtype, allow_other=given.allow_other_base)
        print(f"base     {given.base}\n         sha256 {report.base_sha256}\nout      {given.out} ({given.dtype})")
        print(f"         {report.total.retained:.1%} of the change is in the file, error {report.total.error:.2g}")
        if report.total.lost:
            print(f"warning: {given.dtype} cannot hold this change: write --dtype fp32, or fp16 where it fits")
        for note in (*report.notes, *(report.unfit if given.format == layout else ())):
            print(f"note: {note}")
        origin = replace(origin, base=CardSource(given.base.name, report.base_sha256))
        files, load = [file], partial(loaders.load_model, layout, backbone=report.backbone)
        if given.format == "onnx":
            files = _write_onnx(given, file, load_timm(file, *change.timm, torch.float32, change.layers_read)[0])
        verification = None
        if given.verify:
            readable = report.side_files or given.format == "onnx"  # by others than us; a note has said so
            loading = load if readable else None
            verification = _verify(given, change, None, files, lambda _: report.side_files, loading)
            if not verification.passed:
                return 1
        if _is_folder(given.out):
            title = given.out.name
            if given.format == "onnx":
                card = onnx_card(title, onnx.FILE, change, origin, report.backbone, report.total, verification)
            else:
                loaders.write_json(stage, report.side_files)
                card = timm_card(title, layout, given.dtype, change, origin, report, verification)
            write_text(stage / peft.README, card)
        _publish(stage, given.out, files)
    if given.format == layout and (call := report.create_call(given.out)):
        whole = f'timm.create_model("local-dir:{given.out}", pretrained=True)'
        print(f"load it  {whole if _is_folder(given.out) else call}")
        if report.backbone.layers_read:
            print(f"read it  after {report.backbone.ends()[-1]}: {report.backbone.pruning}; forward_features")
    return 0


def _joined(changes: Sequence[Change], scale: float) -> Change:
    """The mean of several changes, or the only one, times `scale`."""
    if len(changes) == 1:
        return changes[0].scaled(scale)
    adapters = [change for change in changes if isinstance(change, Adapter)]
    if len(adapters) < len(changes):
        raise ValueError("only adapters are averaged here, not weights that trained themselves: give one --adapter")
    return average(adapters).scaled(scale)


def _check(given: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before any file is read."""
    if not math.isfinite(given.scale):
        raise ValueError("--scale must be a finite number")
    alone, graph = given.format in _ADAPTER_FORMATS, given.format == "onnx"
    if (alone or graph) and given.dtype != "fp32":
        written = "a graph in fp32" if graph else "the adapter alone"
        raise ValueError(f"--dtype is about full weights; --format {given.format} writes {written}")
    if not given.adapter:
        if given.base is None:
            raise ValueError("--adapter PATH is needed, or --base FILE to write in another form")
        if alone or given.scale != 1 or given.allow_other_base:
            raise ValueError("--adapter PATH is needed: without one only --format and --dtype of --base change")
        if _is_folder(given.out):
            suffix = ".onnx" if graph else ".safetensors"
            raise ValueError(f"{given.out}: without --adapter a file is written: end its name in {suffix}")
    if given.base is None and (given.verify or not alone):
        raise ValueError("--base FILE is needed: the model the adapter belongs to")
    if given.results and not _is_folder(given.out):
        raise ValueError(f"--results needs a folder as --out, without suffix; {given.out} is a file")
    if graph and given.out.suffix not in ("", ".onnx"):
        raise ValueError(f"{given.out}: end the name in .onnx (a file), or write it without a dot (a folder)")
    if not graph and given.out.suffix not in ("", ".safetensors", *PICKLE_SUFFIXES):
        raise ValueError(f"{given.out}: end the name in .safetensors (a file), or write it without a dot (a folder)")
    refuse_existing(given.out)
    if graph:
        check_extra("--format onnx", "onnx", onnx.PACKAGES)
    if given.verify:
        loaders.library_of(given.format)


def _layout(given: argparse.Namespace) -> str:
    """Layout of the weights that are written, be it for a graph that is made of them."""
    return "timm" if given.format == "onnx" else str(given.format)


def _weights_in(stage: Path, given: argparse.Namespace) -> Path:
    """Path of the weights in a staging folder."""
    if given.format == "onnx":
        return stage / "weights.safetensors"
    return stage / (_file_of(given.format) if _is_folder(given.out) else given.out.name)


def _file_of(form: str) -> str:
    """Name of the weights of a format inside a folder."""
    return FORMATS[form].file if form in FORMATS else "model.safetensors"


def _write_onnx(given: argparse.Namespace, weights: Path, backbone: Backbone) -> list[Path]:
    """Write a graph beside weights, which go; returns its files."""
    weights.unlink()  # its pages stay until the backbone goes
    return onnx.write_onnx(backbone, weights.with_name(onnx.FILE if _is_folder(given.out) else given.out.name))


def _verify(
    given: argparse.Namespace,
    change: Change | None,
    tower: Tower | None,
    files: Sequence[Path],
    side_files: Callable[[Path], Mapping[str, Mapping[str, Any]]],
    load: Callable[[Path], loaders.Features] | None,
) -> Verification:
    """Compare what was written with base + change, and say what came of it.

    Args:
        tower: of one of our own.
        files: what was written, the one to open last.
        side_files: folder -> files by which a library loads them there.
        load: by which it does; None: we load them, as nobody else does.
    """
    library = None if load is None else loaders.library_of(given.format)
    result = files[-1]
    with ExitStack() as stack:
        load_result = None
        if library is not None and load is not None:
            if given.format == "onnx":
                load_result = partial(loaders.load_onnx, result)
            elif given.format in _ADAPTER_FORMATS:
                load_result = partial(load, result)
            else:
                name = _file_of(given.format)
                load_result = partial(load, stack.enter_context(loaders.as_folder(result, name, side_files)))
        verification = verify_merge(
            given.base,
            change,
            result,
            tower,
            dtype=DTYPES[given.dtype],
            loader=library or f"visft_ds {__version__}",
            load_result=load_result,
        )
    print(
        f"verify   random images, by {verification.loader}: largest difference "
        f"{verification.max_abs:.3g}, relative {verification.relative:.3g} (allowed {verification.tolerance:.2g}); the "
        f"effect of the change {verification.effect:.3g}"
    )
    if verification.passed and 0 < 0.5 * verification.effect < verification.relative:
        print("warning: the difference is as large as that effect; write --dtype fp32 or fp16 to keep it")
    if not verification.passed:
        print(
            f"merge: the result does not compute what base + change does; {given.out} is not written",
            file=sys.stderr,
        )
    return verification


def _is_folder(out: Path) -> bool:
    return not out.suffix


def _name(path: Path) -> str:
    """Name of an adapter in a card: its file, or the folder that tells it from others."""
    path = path.resolve()
    return path.parents[1].name if path.name == ADAPTER_FOLDER and path.parent.name == "export" else path.name


def _run_of(place: Path) -> Path | None:
    """The run that something lies inside of."""
    return next((folder for folder in place.parents if (folder / RECORD_FILE).is_file()), None)


def _trained(run: Path, place: Path) -> dict[str, str]:
    """Settings, without folders, that an adapter inside a run was trained with."""
    config: ResolvedConfig = recorded_config(run)
    visft, optimizer, schedule = config.visft, config.optimizer, config.scheduler
    facts = {
        "stage": str(visft.stage),
        "model": visft.model.name,
        "tasks": ", ".join(visft.tasks.enabled()),
        "steps of the schedule": str(schedule.params.total_num_steps),
        "optimiser": f"{optimizer.type}, learning rate {optimizer.params.lr:g}",
        "seed": str(visft.seed),
    }
    data = read_run(run).inputs.get(DATA)
    if data is not None and data.masks:
        facts["masks"] = data.masks
    if place.name.startswith("step_"):
        facts["checkpoint"] = f"step {int(place.name.removeprefix('step_'))}"
    elif place.parent.name != "export":
        facts["values"] = place.parent.name
    return facts


def _measured(folder: Path) -> tuple[Measurement, ...]:
    """Numbers of a folder of visft evaluate. Raises ValueError for those of a part of a split, which a card has not."""
    evaluation = read_evaluation("results", folder)
    data = evaluation.record["data"]
    if data["images"] < data.get("total", math.inf):
        raise ValueError(
            f"--results {folder}: {data['images']} of {data.get('total', 'more')} images; evaluate them all"
        )
    return _measurements(evaluation.metrics, f"{data['images']} images, data {data['fingerprint'][:12]}", data["split"])


def _measured_in(run: Path, place: Path) -> tuple[Measurement, ...]:
    """Numbers of the evaluation in a run of the step whose weights lie at a place; none without one, or of a part."""
    settings = recorded_config(run).visft.run
    if settings.eval_limit is not None:
        return ()
    records = list(read_metrics(run / METRICS_FILE)) if (run / METRICS_FILE).is_file() else []
    step = max((record["step"] for record in records), default=0)
    if settings.keep_best is not None:
        from visft_ds.checkpoint.saver import best_step, recorded_scores  # imports deepspeed: costs seconds

        step = best_step(recorded_scores(run / METRICS_FILE, settings.keep_best)) or step
    if place.name.startswith("step_"):
        step = int(place.name.removeprefix("step_"))
    elif place.parent.name != "export":  # other values than those that were evaluated
        return ()
    found = [record for record in records if record["step"] == step]
    metrics = {name.removeprefix("val/"): one[name] for one in found for name in one if name.startswith("val/")}
    return _measurements(metrics, f"evaluation of the run, step {step}", recorded_config(run).visft.data.val)


def _measurements(metrics: Mapping[str, float], data: str, split: str) -> tuple[Measurement, ...]:
    """The finite numbers of all categories together; -1 is COCO's mark for "nothing of this kind to find"."""
    kinds = {name.partition("/")[0]: config_class(task).hub_task for task, name in MAIN.items()}
    return tuple(
        Measurement(kinds[part], name, float(value), data, split)
        for name, value in metrics.items()
        if (part := name.partition("/")[0]) in kinds and name.count("/") == 1 and 0 <= float(value) < math.inf
    )


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; what is not moved out of it is removed, whatever happens."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    stage.mkdir()
    try:
        yield stage
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(f"{out} cannot be written: {reason(error, out.parent, 0)}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, out: Path, files: Sequence[Path]) -> None:
    """Give the result its name: the folder as a whole, or each file, the one to open last."""
    refuse_existing(out)
    if _is_folder(out):
        os.replace(stage, out)
        return
    for file in files:
        refuse_existing(out.with_name(file.name))
    for file in files:
        os.replace(file, out.with_name(file.name))


def _write_merged(given: argparse.Namespace, adapter: Change | None, origin: Origin) -> int:
    if _layout(given) not in FORMATS:
        raise ValueError(f"--format {given.format} is for models of timm; of a tower of EVA-CLIP: {', '.join(FORMATS)}")
    form, dtype = FORMATS[_layout(given)], DTYPES[given.dtype]
    file, layout = open_tower(given.base)
    tower = tower_in(file, layout)
    preset = PRESETS.get(tower.preset() or "")
    published = preset is not None and preset.image_size == tower.image_size
    if given.verify or given.format == "onnx" or form.pre_norm_only or published:
        tower = resolve_tower(tower)
    started = time.perf_counter()
    with _staged(given.out) as stage:
        report = merge_into_file(
            given.base,
            adapter,
            _weights_in(stage, given),
            layout=_layout(given),
            dtype=dtype,
            allow_other_base=given.allow_other_base,
            tower=tower,
        )
        layers, files = () if adapter is None else adapter.layers_read, [report.file]
        computed = report.tower
        if given.format == "onnx":
            # Others' models need the class token. This graph is the tower as it trained and as heads read it, without.
            computed = replace(report.tower, class_token=False)
            backbone = build_tower(computed, layers=layers)
            load_backbone(backbone, report.file)
            files = _write_onnx(given, report.file, backbone)
        _print_report(given, report, files, time.perf_counter() - started)

        def beside(folder: Path) -> dict[str, dict[str, Any]]:
            return side_files(given.format, report.weights, report.tower, dtype, folder)

        verification = None
        if given.verify:
            load = None
            if given.format not in ("eva_clip", "lavis"):
                load = partial(loaders.load_tower, given.format, tower=report.tower, layers=layers)
            verification = _verify(given, adapter, computed, files, beside, load)
            if not verification.passed:
                return 1
        if _is_folder(given.out):
            assert adapter is not None
            origin = replace(origin, base=CardSource(given.base.name, report.base_sha256))
            title = given.out.name
            if given.format == "onnx":
                card = onnx_card(title, onnx.FILE, adapter, origin, backbone, report.total, verification)
            else:
                configs = beside(given.out)
                loaders.write_json(stage, configs)
                card = merged_card(
                    title, given.format, given.dtype, adapter, origin, report, verification, side_files=configs
                )
            write_text(stage / peft.README, card)
        _publish(stage, given.out, files)
    return 0


def _write_adapter(given: argparse.Namespace, adapter: Adapter, origin: Origin) -> int:
    whole, notes, base = _tower_of_adapter(given, adapter)
    tower = None
    if whole is not None:
        adapter, tower = adapter.fit(whole), part_of(whole, adapter.layers_read)
    elif given.format != "peft":
        raise ValueError(f"--format {given.format} is for towers of EVA-CLIP, this is timm's {adapter.model}: peft")
    if base is not None:
        origin = replace(origin, base=base)
    elif adapter.base_sha256 is not None:
        origin = replace(origin, base=CardSource("not named", adapter.base_sha256))
    if not _is_folder(given.out):
        raise ValueError(f"--format {given.format} is a folder of files: give an --out without suffix")
    verification = None
    with _staged(given.out) as stage:
        peft.save_peft_adapter(adapter, stage, tower, base_model=origin.published, card="")
        if given.verify:
            load = partial(loaders.load_peft, base=given.base, adapter=adapter, tower=whole)
            verification = _verify(given, adapter, whole, [stage], lambda _: {}, load)
            if not verification.passed:
                return 1
        card = adapter_card(given.out.name, given.format, adapter, origin, tower, verification)
        write_text(stage / peft.README, card, overwrite=True)
        _publish(stage, given.out, [])
    print(f"out      {given.out} ({given.format}, rank {adapter.rank}, {'+'.join(adapter.targets)})")
    for note in notes:
        print(f"note: {note}")
    return 0


def _tower_of_adapter(given: argparse.Namespace, adapter: Adapter) -> tuple[Tower | None, list[str], CardSource | None]:
    """The tower of our own that an adapter is for (None: a model of timm), notes, and the base where it is given."""
    if adapter.model is not None:
        if given.base is None:
            return None, [], None
        sha256, notes = check_timm_base(given.base, adapter, allow_other=given.allow_other_base)
        return None, notes, CardSource(given.base.name, sha256)
    if given.base is None:
        raise ValueError("--base FILE is needed: the tower that the adapter belongs to")
    file, layout = open_tower(given.base)
    tower = resolve_tower(tower_in(file, layout))
    sha256, notes = check_base(file, adapter, given.allow_other_base)
    return tower, notes, CardSource(given.base.name, sha256)


def _print_report(given: argparse.Namespace, report: MergeReport, files: Sequence[Path], seconds: float) -> None:
    size = sum(file.stat().st_size for file in files) / 1e6
    print(
        f"base     {given.base} ({report.source_layout}; {report.tower.describe()})\n"
        f"         sha256 {report.base_sha256}\n"
        f"out      {given.out} ({given.format}, {given.dtype}, {len(report.weights)} tensors, "
        f"{size:,.1f} MB, {seconds:.1f} s)"
    )
    if given.adapter:
        print("block    retained     error   (share of the change that is in the file; |missing| / |change|)")
        rows: list[tuple[str, Share]] = [(str(index), share) for index, share in enumerate(report.blocks)]
        for name, share in [*rows, ("all", report.total)]:
            text = f"{share.retained:>11.1%} {share.error:>9.2g}" if share.wanted else "  no change"
            print(f"{name:>5} {text}")
    if report.total.lost:
        print(
            f"warning: {given.dtype} cannot hold this change: its numbers near the weights are farther apart than the "
            f"change is large, so most of it rounds away. Write --dtype fp32, or fp16 where it fits"
        )
    for note in report.notes:
        print(f"note: {note}")
    if report.left_out:
        print(f"note: left out, no place in {given.format}: {examples(report.left_out, 3)}")
