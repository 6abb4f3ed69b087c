"""`visft merge`: an adapter into full weights, or alone, in the form that a library loads."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from visft_ds.config.backbones import Named, named
from visft_ds.evals.records import MAIN
from visft_ds.flags import check_extra
from visft_ds.interop import onnx_file, transformers_names, verify
from visft_ds.interop.adapter import Adapter, average
from visft_ds.interop.card import README, Measurement, card, repository_of
from visft_ds.interop.export import FORMATS, Share, header, merge, write
from visft_ds.interop.layouts import (
    MERGED,
    MODEL,
    base_parameters,
    bases_of,
    fingerprint_of,
    load_backbone,
    model_in,
    open_model,
    other_base,
    tower_in,
)
from visft_ds.interop.peft_folder import save_peft
from visft_ds.interop.weights import Weights, write_text
from visft_ds.models import Backbone, build_empty
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics
from visft_ds.ops import DTYPES
from visft_ds.pretrained import TIMM
from visft_ds.run.adapter import adapter_at, base_of, run_around
from visft_ds.run.folder import recorded_config
from visft_ds.tasks import config_class

_MAKE = {**FORMATS, "transformers": transformers_names.written}
#: Suffixes of an --out that is a file, where they are not those of safetensors.
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "peft": (),
    "onnx": (".onnx",),
    "lavis": (".pth",),
    "eva_clip": (".pt", ".safetensors"),
}


def merge_files(given: argparse.Namespace) -> int:
    """Write what the flags of `visft_ds.interop.cli` ask for; returns the exit status.

    Raises ValueError for files or flags that do not fit each other.
    """
    _check(given)
    found = [adapter_at(path) for path in given.adapter]
    for path, one in zip(given.adapter, found, strict=True):
        print(f"adapter  {path}: {one.describe() if one else 'none, the run trained its backbone itself'}")
    if None in found and (len(found) > 1 or given.scale != 1 or given.format == "peft"):
        raise ValueError("a run that trained its backbone itself has no adapter to average, scale or write alone")
    adapters = [one for one in found if one is not None]
    adapter = average(adapters).scaled(given.scale) if adapters else None
    chosen = None if given.base is None else named(given.base, download=given.download)
    place = base_of(given.adapter[0]) if chosen is None else chosen.file(download=given.download)
    file = open_model(place)
    model = _model(file, adapter, chosen)
    backbone = build_empty(model["preset"], torch.float32, {k: v for k, v in model.items() if k != "preset"})
    own = fingerprint_of(backbone, place)
    if adapter is not None:
        if MERGED in file.metadata:
            raise ValueError(f"{place} has an adapter merged in already, and this one would come on top: give the base")
        adapter.install(backbone)  # on the meta device: a check of shapes
        if problem := other_base("the adapter", adapter.base, bases_of(backbone, place)):
            print(f"warning: {problem}", file=sys.stderr)
    print(f"base     {place}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=given.out.parent, prefix=f".{given.out.name}.tmp-") as folder:
        stage, facts = Path(folder) / "out", dict[str, str]()
        stage.mkdir()
        weights = stage / given.out.name
        if given.format == "peft":
            assert adapter is not None
            save_peft(adapter, stage, _repository(given))
        elif given.format == "onnx":
            weights = weights if given.out.suffix else stage / onnx_file.FILE
            onnx_file.write_onnx(_loaded(place, model, adapter), weights)
        else:
            share = Share()
            merged = merge(tower_in(file, model), adapter, DTYPES[given.dtype], base_parameters(backbone), share)
            written = _MAKE[given.format](merged, file, backbone)
            weights = weights if given.out.suffix and not given.verify else stage / written.name
            write(written, weights, header(model, file, adapter, own))
            if written.note:
                print(f"note: {written.note}")
            if share.wanted:
                facts["share of the change that is in the file"] = f"{share.retained:.2%}, error {share.error:.2g}"
                print(f"merged   {share.retained:.1%} of the change is in the file, error {share.error:.2g}")
            if share.lost:
                print(f"warning: {given.dtype} cannot hold this change: write --dtype fp32, or fp16 where it fits")
        if given.verify and not _verified(given, stage, place, model, adapter):
            return 1
        if given.out.suffix:
            for path in stage.glob(f"{weights.name}.data"):  # of a large graph, which names it
                os.replace(path, given.out.with_name(path.name))
            os.replace(weights, given.out)
        else:
            write_text(stage / README, _card(given, backbone, adapter, facts))
            os.replace(stage, given.out)
    told = "" if given.out.suffix else "; README.md: how to load it"
    print(f"out      {given.out} ({given.format}, {given.dtype}){told}")
    return 0


def _check(given: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before any file is read."""
    if given.out.exists():
        raise ValueError(f"{given.out} exists and is not overwritten: choose another --out")
    if not math.isfinite(given.scale):
        raise ValueError("--scale must be a finite number")
    if not given.adapter and (given.base is None or given.scale != 1 or given.format == "peft"):
        raise ValueError("--adapter PATH is needed, or --base FILE to write in another --format or --dtype")
    if given.out.suffix not in ("", *_SUFFIXES.get(given.format, (".safetensors",))):
        raise ValueError(f"{given.out}: not a suffix of --format {given.format}; a name without a dot is a folder")
    if given.format in ("peft", "onnx") and given.dtype != "fp32":
        raise ValueError(f"--dtype is of full weights; --format {given.format} is written in fp32")
    if given.format == "onnx":
        check_extra("--format onnx", "onnx", onnx_file.PACKAGES)
    if given.verify:
        verify.check_library(given.format)


def _model(file: Weights, adapter: Adapter | None, chosen: Named | None) -> dict[str, Any]:
    """Preset and options of the backbone in a base file: as the file, the adapter or the name says."""
    of_adapter = {} if adapter is None else dict(adapter.model)
    if MODEL not in file.metadata and str(of_adapter.get("preset")).startswith(TIMM):
        found = of_adapter
    elif MODEL not in file.metadata and adapter is None and chosen is not None and chosen.description:
        found = dict(chosen.description)
    else:
        found = model_in(file)
    if not found["preset"].startswith(TIMM):
        found["class_token"] = "cls_token" in tower_in(file, found)
    return found | {name: of_adapter[name] for name in ("layers",) if name in of_adapter}


def _as_trained(model: Mapping[str, Any]) -> dict[str, Any]:
    """A tower of EVA trains and is read without its class token."""
    return {name: value for name, value in model.items() if name != "class_token"}


def _loaded(place: Path, model: Mapping[str, Any], adapter: Adapter | None) -> Backbone:
    """Base + adapter in one set of weights."""
    backbone: Backbone = load_backbone(place, _as_trained(model))
    with torch.no_grad():
        for name in adapter.weights() if adapter else ():
            weight = backbone.get_parameter(name)
            weight.add_(adapter.delta(name).view_as(weight))  # type: ignore[union-attr]
    return backbone.eval()


def _verified(
    given: argparse.Namespace, stage: Path, place: Path, model: Mapping[str, Any], adapter: Adapter | None
) -> bool:
    """Compare what was written with base + adapter, computed as two products, and say what came of it."""
    wanted: Backbone = load_backbone(place, _as_trained(model) if given.format == "onnx" else model)
    if adapter is not None:
        adapter.install(wanted)
    got = verify.by_library(given.format, stage, wanted)
    found, allowed = verify.difference(got, wanted, wanted.image_size), verify.tolerance(DTYPES[given.dtype])
    print(f"verify   relative difference {found:.3g} by {verify.LIBRARIES[given.format][0]}, allowed {allowed:.2g}")
    if found > allowed:
        print("merge: the result does not compute what base + adapter does, and is not written", file=sys.stderr)
    return found <= allowed


def _repository(given: argparse.Namespace) -> str | None:
    """The repository of the base weights on the hub, where their name tells it."""
    run = run_around(given.adapter[0]) if given.adapter else None
    weights = given.base if given.base or run is None else recorded_config(run).visft.model.weights
    return repository_of(weights)


def _card(given: argparse.Namespace, backbone: Backbone, adapter: Adapter | None, facts: dict[str, str]) -> str:
    run, measured = run_around(given.adapter[0]) if len(given.adapter) == 1 else None, list[Measurement]()
    if run is not None:
        config = recorded_config(run)
        facts |= {
            "tasks": ", ".join(config.visft.tasks.enabled()),
            "steps": str(config.scheduler.params.total_num_steps),
            "optimiser": f"{config.optimizer.type}, learning rate {config.optimizer.params.lr:g}",
        }
        measured = _measured(run, given.adapter[0]) if given.scale == 1 else []
    if given.scale != 1:
        facts["scale of the adapter"] = f"{given.scale:g}"
    base = _repository(given)
    return card(given.out.name, given.format, backbone, adapter, base=base, facts=facts, measured=measured)


def _measured(run: Path, path: Path) -> list[Measurement]:
    """Numbers of the evaluation of what a run, or the export in it, holds; none of a part of the images.

    -1 is COCO's mark for "nothing of this kind to find".
    """
    settings = recorded_config(run).visft
    file = next((one for folder in (run, run.parent) if (one := folder / METRICS_FILE).is_file()), None)
    if settings.run.eval_limit is not None or path.name.startswith("step_") or file is None:
        return []
    records = list(read_metrics(file))
    step = max((record["step"] for record in records), default=0)
    if settings.run.keep_best is not None:
        from visft_ds.checkpoint.saver import best_step, recorded_scores  # imports deepspeed: costs seconds

        step = best_step(recorded_scores(file, settings.run.keep_best)) or step
    found = {name: value for record in records if record["step"] == step for name, value in record.items()}
    kinds = {name.partition("/")[0]: config_class(task).hub_task for task, name in MAIN.items()}
    return [
        Measurement(kinds[part], name, float(value), f"evaluation of the run, step {step}", settings.data.val)
        for name, value in ((key.removeprefix("val/"), found[key]) for key in found if key.startswith("val/"))
        if (part := name.partition("/")[0]) in kinds and name.count("/") == 1 and 0 <= float(value) < math.inf
    ]
