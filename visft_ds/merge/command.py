"""`visft merge`: an adapter into full weights, or alone, in the form that a library loads."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from visft_ds.config.backbones import named
from visft_ds.config.record import read_run, recorded_config
from visft_ds.evals.records import MAIN
from visft_ds.files import write_text, writing
from visft_ds.flags import check_extra
from visft_ds.interop import FORMATS, export, layouts, transformers_names
from visft_ds.interop.adapter import Adapter, average
from visft_ds.interop.card import README, card, repository_of
from visft_ds.interop.weights import write_safetensors
from visft_ds.merge.source import adapter_at, base_of
from visft_ds.monitor.metrics import read_metrics
from visft_ds.ops import DTYPES
from visft_ds.pretrained import TIMM
from visft_ds.run_files import METRICS_FILE, run_around
from visft_ds.tasks import config_class

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_MAKE = {**export.FORMATS, "transformers": transformers_names.written}


def merge_files(given: argparse.Namespace) -> int:
    """Write what the flags of `visft_ds.merge.cli` ask for; returns the exit status.

    Raises ValueError for files or flags that do not fit each other.
    """
    _check(given)
    adapter = _read_adapter(given)
    chosen = None if given.base is None else named(given.base, download=given.download)
    place = base_of(given.adapter[0]) if chosen is None else chosen.file(download=given.download)
    run = run_around(given.adapter[0]) if given.adapter else None
    repository = repository_of(
        given.base if given.base or run is None else recorded_config(run).visft.model.weights
    )
    file = layouts.open_model(place)
    told = (
        adapter.model
        if adapter and adapter.model["preset"].startswith(TIMM)
        else chosen and chosen.description
    )
    model = dict(told) if told and layouts.MODEL not in file.metadata else layouts.model_in(file)
    if adapter is not None and "layers" in adapter.model:
        model["layers"] = adapter.model["layers"]
    model = model if given.format == "onnx" else layouts.whole(model, file)
    backbone = layouts.built(model, "meta")
    own = layouts.fingerprint_of(backbone, place)
    if adapter is not None:
        if layouts.MERGED in file.metadata:
            raise ValueError(
                f"{place} has an adapter merged in already, and this one would come on top: give the base"
            )
        adapter.install(backbone)  # on the meta device: a check of shapes
        if problem := layouts.other_base(
            "the adapter", adapter.base, {own, file.metadata.get(layouts.BASE, own)}
        ):
            print(f"warning: {problem}", file=sys.stderr)
    print(f"base     {place}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=given.out.parent, prefix=f".{given.out.name}.tmp-") as folder:
        stage, facts, share = Path(folder) / "out", dict[str, str](), export.Share()
        stage.mkdir()
        weights = stage / (given.out.name if given.out.suffix else FORMATS[given.format])
        dtype, names = DTYPES[given.dtype], layouts.base_parameters(backbone)
        if given.format == "peft":
            assert adapter is not None
            adapter.save(stage, repository)
        elif given.format == "onnx":
            merged = layouts.built(model)
            layouts.fill(
                merged, export.merge(layouts.open_backbone(merged, place), adapter, dtype, names, share)
            )
            export.write_onnx(merged, weights)
        else:
            made_of = {
                name: file.metadata[name] for name in (layouts.BASE, layouts.MERGED) if name in file.metadata
            }
            if adapter is not None:
                settings = {"rank": adapter.rank, "alpha": adapter.alpha, "sha256": adapter.fingerprint()}
                made_of = {layouts.BASE: own, layouts.MERGED: json.dumps(settings)}
            tower = export.merge(layouts.tower_in(file, model), adapter, dtype, names, share)
            written = _MAKE[given.format](tower, file, backbone)
            if weights.suffix == ".safetensors":
                write_safetensors(weights, written.tensors, {layouts.MODEL: json.dumps(model), **made_of})
            else:  # of programs that read by torch.load alone
                tensors = {name: one.read().contiguous() for name, one in written.tensors.items()}
                with writing(weights) as target:
                    torch.save(tensors, target)
            for name, content in written.files.items():
                write_text(stage / name, json.dumps(content, indent=2) + "\n")
        if share.wanted:
            facts["share of the change that is in the file"] = (
                f"{share.retained:.2%}, error {share.error:.2g}"
            )
            print(f"merged   {share.retained:.1%} of the change is in the file, error {share.error:.2g}")
            if share.retained < 0.9 or share.error > 0.5:
                print(
                    f"warning: {given.dtype} cannot hold this change: write --dtype fp32, or fp16 where it fits"
                )
        if given.verify:
            # 8 half-steps of the weights (0.4 to 3 were measured); in fp32 the order of B(Ax) or (BA)x costs
            # 1e-5.
            library, allowed = export.LIBRARIES[given.format], max(1e-5, 4 * torch.finfo(dtype).eps)
            found = export.difference(given.format, stage, place, model, adapter)
            print(f"verify   relative difference {found:.3g} by {library}, allowed {allowed:.2g}")
            if found > allowed:
                print(
                    "merge: the result does not compute what base + adapter does: not written",
                    file=sys.stderr,
                )
                return 1
        if given.out.suffix:
            for path in stage.glob(f"{given.out.name}*"):  # weights of a large graph lie beside it
                os.replace(path, given.out.with_name(path.name))
        else:
            measured = _describe_run(run, given, facts)
            text = card(given.out.name, given.format, backbone, adapter, repository, facts, measured)
            write_text(stage / README, text)
            os.replace(stage, given.out)
    more = "" if given.out.suffix else "; README.md: how to load it"
    print(f"out      {given.out} ({given.format}, {given.dtype}){more}")
    return 0


def _check(given: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before any file is read."""
    if given.out.exists():
        raise ValueError(f"{given.out} exists and is not overwritten: choose another --out")
    if not given.adapter and (given.base is None or given.scale != 1 or given.format == "peft"):
        raise ValueError("--adapter PATH is needed, or --base FILE to write in another --format or --dtype")
    if not abs(given.scale) <= 1e9:
        raise ValueError(f"--scale {given.scale:g} is not allowed: give a number from -1e9 to 1e9")
    if given.out.suffix not in ("", Path(FORMATS[given.format]).suffix):
        raise ValueError(
            f"{given.out}: not a suffix of --format {given.format}; a name without a dot is a folder"
        )
    if given.format in ("peft", "onnx") and given.dtype != "fp32":
        raise ValueError(f"--dtype is of full weights; --format {given.format} is written in fp32")
    if given.format == "onnx":
        check_extra("--format onnx", "onnx", ("onnx", "onnxscript", "onnxruntime"))
    library = export.LIBRARIES.get(given.format)
    if given.verify and (library is None or find_spec(library) is None):
        allowed = ", ".join(f"{form} ({name})" for form, name in export.LIBRARIES.items())
        raise ValueError(
            f"--verify: no library that is installed here loads --format {given.format}; {allowed} can be"
        )


def _read_adapter(given: argparse.Namespace) -> Adapter | None:
    """The mean of the adapters, with the effect that was asked for; None where the base is written as it
    is.
    """
    found = [adapter_at(path) for path in given.adapter]
    for path, one in zip(given.adapter, found, strict=True):
        print(f"adapter  {path}: {one.describe() if one else 'none, the run trained its backbone itself'}")
    adapters = [one for one in found if one is not None]
    if len(adapters) < len(found) and (len(found) > 1 or given.scale != 1 or given.format == "peft"):
        raise ValueError(
            "a run that trained its backbone itself has no adapter to average, scale or write alone"
        )
    return average(adapters).scaled(given.scale) if adapters else None


def _describe_run(run: Path | None, given: argparse.Namespace, facts: dict[str, str]) -> list[EvalResult]:
    """Numbers of the run that an adapter is of, for the card; what else is to be said of it is added to
    `facts`.

    Only an evaluation of what the run, or the export in it, holds counts, and none of a part of the images.
    """
    from huggingface_hub import EvalResult

    if given.scale != 1:
        facts["scale of the adapter"] = f"{given.scale:g}"
    if run is None or len(given.adapter) > 1:
        return []
    config = recorded_config(run)
    settings = config.visft
    facts |= {
        "tasks": ", ".join(settings.tasks.enabled()),
        "steps": str(config.scheduler.params.total_num_steps),
    }
    facts |= {name: said for name, said in read_run(run).identity.items() if name == "masks"}
    file = next((one for folder in (run, run.parent) if (one := folder / METRICS_FILE).is_file()), None)
    complete = (
        given.scale == 1 and settings.run.eval_limit is None and not given.adapter[0].name.startswith("step_")
    )
    if file is None or not complete:
        return []
    records = list(read_metrics(file))
    step = max((record["step"] for record in records), default=0)
    if settings.run.keep_best is not None:
        from visft_ds.checkpoint.saver import best_step, recorded_scores  # imports deepspeed: costs seconds

        step = best_step(recorded_scores(file, settings.run.keep_best)) or step
    kinds = {name.partition("/")[0]: config_class(task).hub_task for task, name in MAIN.items()}
    where = f"evaluation of the run, step {step}"
    return [
        EvalResult(
            kind, "custom", where, name.removeprefix("val/"), float(value), dataset_split=settings.data.val
        )
        for record in records
        for name, value in record.items()
        if record["step"] == step and name.startswith("val/") and name.count("/") == 2
        if (kind := kinds.get(name.split("/")[1]))
        if 0 <= float(value) < math.inf  # -1 is COCO's mark for "nothing of this kind to find"
    ]
