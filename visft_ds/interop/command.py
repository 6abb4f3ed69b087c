"""Merging, unmerging, averaging and rewriting of adapters: what visft merge does once its flags are read."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from visft_ds.checkpoint.disk import reason
from visft_ds.config import ResolvedConfig
from visft_ds.evals.compare import read_evaluation
from visft_ds.interop import hub, peft
from visft_ds.interop.adapter import Adapter, average
from visft_ds.interop.backbones import timm_settings
from visft_ds.interop.card import CardSource, Origin, adapter_card, merged_card, timm_card
from visft_ds.interop.efficientnet import holds_efficientnet, read_efficientnet
from visft_ds.interop.files import PICKLE_SUFFIXES, examples, open_weights, sha256_file
from visft_ds.interop.formats import FORMATS, side_files
from visft_ds.interop.layouts import Tower, part_of, tower_in, tower_of
from visft_ds.interop.merge import (
    DTYPES,
    MergeReport,
    Share,
    Verification,
    check_base,
    check_timm_base,
    merge_into_file,
    merge_timm,
    verify_merge,
)
from visft_ds.interop.towers import open_tower, resolve_tower
from visft_ds.interop.tuned import Change, TunedWeights
from visft_ds.interop.visft import write_visft_lora
from visft_ds.interop.writing import FULL, parse_size, refuse_existing, write_safetensors, write_text
from visft_ds.models.eva_vit import PRESETS, build_backbone
from visft_ds.run.adapter import base_of, place_of, read_change
from visft_ds.run.folder import ADAPTER_FOLDER, recorded_config

_VISFT_FILE = "visft_lora.pt"


def merge(given: argparse.Namespace) -> int:
    """Write what the flags of `visft_ds.interop.cli` ask for; returns the exit status.

    Raises:
        ValueError: files or flags that do not fit each other.
    """
    if absent := [str(path) for path in given.adapter if not path.exists()]:
        raise ValueError(
            f"{', '.join(absent)}: no such adapter; give a run, one of its checkpoints, a PEFT folder or a LoRA file"
        )
    if given.base is None and not given.model and not given.unmerge and len(given.adapter) == 1:
        given.base = base_of(given.adapter[0])
    _check(given)
    if not given.adapter:
        if holds_efficientnet(open_weights(given.base)):
            return _write_efficientnet(given)
        return _write_merged(given, None, Origin(None, ()))
    places = [place_of(path) for path in given.adapter]
    adapters = [read_change(place) for place in places]
    if any(change.timm is not None for change in adapters):
        return _write_timm(given, places, adapters)
    weights = given.weights or [1 / len(adapters)] * len(adapters)
    adapter = _joined(adapters, weights if len(adapters) > 1 or given.weights else None, given.scale)
    names = [_name(path) for path in given.adapter]
    shares = f", averaged with {' '.join(f'{weight:g}' for weight in weights)}" if len(adapters) > 1 else ""
    factor = f", times {given.scale:g}" if given.scale != 1 else ""
    for path, place, each in zip(given.adapter, places, adapters, strict=True):
        where = f" ({place})" if place != path else ""
        print(f"adapter  {path}{where}: {each.describe()}")
    origin = Origin(
        None,
        tuple(CardSource(name, adapter.fingerprint()) for name, adapter in zip(names, adapters, strict=True)),
        _trained(places[0]) if len(places) == 1 else {},
        _measured(given.results) if given.results else {},
        (f"Several or scaled adapters{shares}{factor}",) if shares or factor else (),
    )
    if given.format in FORMATS:
        return _write_merged(given, adapter, origin)
    if isinstance(adapter, TunedWeights):
        raise ValueError(f"{names[0]} trained its own weights and has no adapter to write: choose --format timm, ...")
    return _write_adapter(given, adapter, origin)


def _write_efficientnet(given: argparse.Namespace) -> int:
    """Write a published EfficientNet under timm's names."""
    file = read_efficientnet(given.base)
    form = given.format, given.dtype, given.out.suffix
    if form != ("timm", "fp32", ".safetensors") or given.verify or given.max_shard_size:
        raise ValueError(
            f"{given.base} is an EfficientNet of timm: give --format timm and an --out that ends in .safetensors, "
            f"without --dtype, --verify and --max-shard-size"
        )
    write_safetensors(given.out, file.infos, file.get, file.metadata)
    name = timm_settings(file)
    assert name is not None
    print(f"base     {given.base}\n         sha256 {sha256_file(given.base)}\nout      {given.out} (fp32)")
    print(f'load it  timm.create_model("{name[0]}", checkpoint_path="{given.out}")')
    return 0


def _write_timm(given: argparse.Namespace, places: Sequence[Path], changes: Sequence[Change]) -> int:
    """Write the change that a run made to a model of timm: full weights for timm, or the adapter for PEFT."""
    several = len(changes) > 1
    if given.format not in ("timm", "peft") or given.unmerge or given.max_shard_size or (several and given.verify):
        raise ValueError(
            f"{places[0]} is of a model of timm: give --format timm or peft, without --unmerge, --max-shard-size and, "
            f"of several adapters, --verify"
        )
    weights = given.weights or [1 / len(changes)] * len(changes)
    change = _joined(changes, weights if several or given.weights else None, given.scale)
    assert change.timm is not None
    print(f"adapter  {given.adapter[0]} ({places[0]}): timm {change.timm[0]}, {change.describe()}")
    if given.format == "peft":
        if not isinstance(change, Adapter):
            raise ValueError(f"{given.adapter[0]} trained its own weights and has no adapter to write: --format timm")
        if reason := peft.why_no_peft(change):
            raise ValueError(f"PEFT cannot have this adapter: {reason}; write full weights, --format timm")
        if given.base is not None:
            for note in check_timm_base(given.base, change, allow_other=given.allow_other_base)[1]:
                print(f"note: {note}")
        print(f"out      {peft.save_peft_adapter(change, given.out)} (peft)")
        return 0
    with _staged(given.out) as stage:
        file = stage / ("model.safetensors" if _is_folder(given.out) else given.out.name)
        report = merge_timm(given.base, change, file, dtype=DTYPES[given.dtype], allow_other=given.allow_other_base)
        print(f"base     {given.base}\n         sha256 {report.base_sha256}\nout      {given.out} ({given.dtype})")
        print(f"         {report.total.retained:.1%} of the change is in the file, error {report.total.error:.2g}")
        if report.total.lost:
            print(f"warning: {given.dtype} cannot hold this change: write --dtype fp32, or fp16 where it fits")
        for note in report.notes:
            print(f"note: {note}")
        if given.verify:
            proof = verify_merge(given.base, change, file, None, dtype=DTYPES[given.dtype], images=given.images)
            print(
                f"verify   relative difference {proof.relative:.3g} (allowed {proof.tolerance:.2g}); the effect is "
                f"{proof.effect:.3g}"
            )
            if not proof.passed:
                print(f"merge_lora: the result computes something else; {given.out} is not written", file=sys.stderr)
                return 1
        if _is_folder(given.out):
            write_text(stage / peft.README, timm_card(given.out.name, change, report))
            if report.settings is not None:
                write_text(stage / "config.json", json.dumps(report.settings, indent=2) + "\n")
        _publish(stage, given.out, [file])
    if call := report.create_call():
        whole = f'timm.create_model("local-dir:{given.out}", pretrained=True)'
        print(f"load it  {whole if _is_folder(given.out) else call}")
        if report.backbone.until is not None:
            print(f"read it  after {report.backbone.until}: {'; '.join(report.backbone.ending())}; forward_features")
    return 0


def _joined(changes: Sequence[Change], weights: Sequence[float] | None, scale: float) -> Change:
    """Join several changes into one; `weights` None: there is one, as it is."""
    if weights is None:
        return changes[0].scaled(scale)
    adapters = [change for change in changes if isinstance(change, Adapter)]
    if len(adapters) < len(changes):
        raise ValueError("only adapters are averaged here, not weights that trained themselves: give one --adapter")
    return average(adapters, weights).scaled(scale)


def _check(given: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before any file is read."""
    if not math.isfinite(given.scale) or given.images < 1:
        raise ValueError("--scale must be a finite number, --images at least 1")
    alone = given.format not in FORMATS
    if alone and (given.unmerge or given.verify or given.max_shard_size or given.dtype != "fp32"):
        raise ValueError(
            f"--unmerge, --verify, --dtype and --max-shard-size are about full weights; --format {given.format} writes "
            f"the adapter alone"
        )
    if not given.adapter:
        if given.base is None:
            raise ValueError("--adapter PATH is needed, or --base FILE to write in another form")
        if alone or given.unmerge or given.weights or given.scale != 1 or given.allow_other_base:
            raise ValueError("--adapter PATH is needed: without one only --format, --dtype and shards of --base change")
        if _is_folder(given.out):
            raise ValueError(f"{given.out}: without --adapter a file is written: end its name in .safetensors")
    if given.base is None and not (alone and given.model):
        needed = "--base FILE or --model PRESET" if alone else "--base FILE"
        raise ValueError(f"{needed} is needed: the model the adapter belongs to")
    if (given.results or given.push_to_hub) and not _is_folder(given.out):
        raise ValueError(f"--results and --push-to-hub need a folder as --out, without suffix; {given.out} is a file")
    if (given.upload or given.public) and not (given.push_to_hub and (given.upload or not given.public)):
        raise ValueError("--upload belongs to --push-to-hub USER/NAME, and --public to --upload")
    if given.out.suffix not in ("", ".safetensors", *PICKLE_SUFFIXES):
        raise ValueError(f"{given.out}: end the name in .safetensors (a file), or write it without a dot (a folder)")
    refuse_existing(given.out)


def _is_folder(out: Path) -> bool:
    return not out.suffix


def _name(path: Path) -> str:
    """Name of an adapter in a card: its file, or the folder that tells it from others."""
    path = path.resolve()
    return path.parents[1].name if path.name == ADAPTER_FOLDER and path.parent.name == "export" else path.name


def _trained(place: Path) -> dict[str, str]:
    """Settings, without folders, that the adapter was trained with, where it lies inside its run."""
    run = next((folder for folder in place.resolve().parents if (folder / "run.json").is_file()), None)
    if run is None:
        return {}
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
    if place.name.startswith("step_"):
        facts["checkpoint"] = f"step {int(place.name.removeprefix('step_'))}"
    elif place.parent.name != "export":
        facts["values"] = place.parent.name
    return facts


def _measured(folder: Path) -> dict[str, str]:
    evaluation = read_evaluation("results", folder)
    data = evaluation.record["data"]
    where = f"{data['split']}, {data['images']} images, data {data['fingerprint'][:12]}"
    return {f"{name} ({where})": f"{value:.4f}" for name, value in evaluation.metrics.items()}


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
    form, dtype = FORMATS[given.format], DTYPES[given.dtype]
    file, layout = open_tower(given.base)
    tower = tower_in(file, layout)
    settings = dict(given.set)
    preset = PRESETS.get(tower.preset() or tower.cut_of() or "")
    published = preset is not None and preset.image_size == tower.image_size
    if given.verify or given.model or settings or form.giant_only or published:
        tower = resolve_tower(tower, given.model, settings)
    started = time.perf_counter()
    with _staged(given.out) as stage:
        report = merge_into_file(
            given.base,
            adapter,
            stage / (form.file if _is_folder(given.out) else given.out.name),
            layout=given.format,
            dtype=dtype,
            allow_other_base=given.allow_other_base,
            tower=tower,
            unmerge=given.unmerge,
            shard_bytes=parse_size(given.max_shard_size) if given.max_shard_size else None,
        )
        _print_report(given, report, time.perf_counter() - started)
        verification = None
        if given.verify:
            plain, merged = given.base, report.files[-1]
            if given.unmerge:
                plain, merged = merged, plain
            verification = verify_merge(plain, adapter, merged, report.tower, dtype=dtype, images=given.images)
            _print_verification(verification, given.images)
            if not verification.passed:
                print(
                    f"merge_lora: the result does not compute what base + change does; {given.out} is not written",
                    file=sys.stderr,
                )
                return 1
        if _is_folder(given.out):
            assert adapter is not None
            sharded = len(report.files) > 1
            files = side_files(given.format, report.weights, report.tower, dtype, given.out, sharded=sharded)
            origin = replace(origin, base=CardSource(given.base.name, report.base_sha256))
            for name, content in files.items():
                write_text(stage / name, json.dumps(content, indent=2) + "\n")
            card = merged_card(
                given.out.name, given.format, given.dtype, adapter, origin, report, verification, side_files=files
            )
            write_text(stage / peft.README, card)
        _publish(stage, given.out, report.files)
    return _push(given)


def _write_adapter(given: argparse.Namespace, adapter: Adapter, origin: Origin) -> int:
    tower, notes, base = _tower_of_adapter(given, adapter)
    adapter, tower = adapter.fit(tower), part_of(tower, adapter.until)
    if base is not None:
        origin = replace(origin, base=base)
    elif adapter.base_sha256 is not None:
        origin = replace(origin, base=CardSource("not named", adapter.base_sha256))
    if given.format != "visft" and not _is_folder(given.out):
        raise ValueError(f"--format {given.format} is a folder of files: give an --out without suffix")
    if not _is_folder(given.out) and given.out.suffix != ".pt":
        raise ValueError(f"{given.out}: ViSFT's LoRA files are .pt; choose such a name")
    with _staged(given.out) as stage:
        name = _VISFT_FILE if _is_folder(given.out) else given.out.name
        card = adapter_card(given.out.name, given.format, adapter, origin, tower, name)
        if given.format == "visft":
            write_visft_lora(adapter, stage / name)
            if _is_folder(given.out):
                write_text(stage / peft.README, card)
        else:
            peft.save_peft_adapter(adapter, stage, tower, split=given.format == "peft_split", card=card)
        _publish(stage, given.out, [stage / name])
    print(f"out      {given.out} ({given.format}, rank {adapter.rank}, {'+'.join(adapter.targets)})")
    for note in notes:
        print(f"note: {note}")
    return _push(given)


def _tower_of_adapter(given: argparse.Namespace, adapter: Adapter) -> tuple[Tower, list[str], CardSource | None]:
    if given.base is None:
        if given.model not in PRESETS:
            raise ValueError(f"unknown model {given.model!r}; allowed: {', '.join(PRESETS)}")
        return tower_of(build_backbone(given.model, device="meta", class_token=True)), [], None
    file, layout = open_tower(given.base)
    tower = resolve_tower(tower_in(file, layout), given.model, dict(given.set))
    sha256, notes = check_base(file, adapter, given.allow_other_base)
    return tower, notes, CardSource(given.base.name, sha256)


def _push(given: argparse.Namespace) -> int:
    if not given.push_to_hub:
        return 0
    files = hub.files_to_upload(given.out)
    for name, size in files:
        print(f"upload   {name} ({size / 1e6:,.1f} MB)")
    if not given.upload:
        total = sum(size for _, size in files) / 1e6
        print(f"upload   nothing was sent: {len(files)} files, {total:,.1f} MB for {given.push_to_hub}; add --upload")
        return 0
    print(f"upload   {hub.upload(given.out, given.push_to_hub, private=not given.public)}")
    return 0


def _print_report(given: argparse.Namespace, report: MergeReport, seconds: float) -> None:
    size = sum(file.stat().st_size for file in report.files) / 1e6
    in_shards = f", {len(report.files) - 1} shards" if len(report.files) > 1 else ""
    print(
        f"base     {given.base} ({report.source_layout}; {report.tower.describe()})\n"
        f"         sha256 {report.base_sha256}\n"
        f"out      {given.out} ({given.format}, {given.dtype}, {len(report.weights)} tensors{in_shards}, "
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


def _print_verification(result: Verification, images: int) -> None:
    print(
        f"verify   {images} random images: largest difference {result.max_abs:.3g}, relative "
        f"{result.relative:.3g} (allowed {result.tolerance:.2g}); the effect of the change {result.effect:.3g}"
    )
    if result.passed and 0 < 0.5 * result.effect < result.relative:
        print("warning: the difference is as large as that effect; write --dtype fp32 or fp16 to keep it")
