"""An adapter into full weights, or alone, in the form of a library: of `visft merge` and `visft export`."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from visft_ds.config.backbones import named
from visft_ds.config.record import read_run, recorded_config
from visft_ds.evals.records import MAIN
from visft_ds.files import write_text
from visft_ds.interop import export, layouts
from visft_ds.interop.adapter import Adapter, average
from visft_ds.interop.card import README, card, repository_of
from visft_ds.interop.formats import ADAPTERS, FORMATS
from visft_ds.interop.peft_folder import write_folder
from visft_ds.interop.weights import Weights, write_safetensors
from visft_ds.merge.source import adapter_at, base_of
from visft_ds.models import Backbone
from visft_ds.monitor.metrics import read_metrics
from visft_ds.ops import DTYPES
from visft_ds.pretrained import TIMM
from visft_ds.run_files import METRICS_FILE, check_new, run_around
from visft_ds.tasks import config_class

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


@dataclass(frozen=True)
class Base:
    """The weights that are converted, or that an adapter comes on top of."""

    path: Path
    file: Weights
    model: dict[str, Any]  #: description of the backbone, see `layouts.model_of`
    backbone: Backbone  #: on the meta device
    fingerprint: str
    repository: str | None  #: on the hub
    run: Path | None  #: that the adapter is of


def merge_files(flags: Namespace) -> None:
    """Write what the flags of `visft_ds.merge.cli`, or weights that those of `visft_ds.export.cli`, ask for.

    Raises ValueError for files or flags that do not fit each other, and for outputs that differ from ours.
    """
    _check(flags)
    adapter, base = open_parts(flags)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=flags.out.parent, prefix=f".{flags.out.name}.tmp-") as folder:
        stage = Path(folder) / "out"
        stage.mkdir()
        facts: dict[str, str] = {}
        if flags.format in ADAPTERS:
            assert adapter is not None
            written = adapter
            if flags.format == "peft_transformers":
                written = export.for_transformers(adapter, base.file, base.backbone)
            write_folder(written, stage, base.repository)
        else:
            facts = _write_weights(flags, base, adapter, stage)
        if flags.verify:
            _verify(flags, base, adapter, stage)
        if not flags.in_folder:
            os.replace(stage / flags.out.name, flags.out)
        else:
            measured = _describe_run(base.run, flags, facts)
            text = card(
                flags.out.name, flags.format, base.backbone, adapter, base.repository, facts, measured
            )
            write_text(stage / README, text)
            os.replace(stage, flags.out)
    more = "; README.md: how to load it" if flags.in_folder else ""
    print(f"out      {flags.out} ({flags.format}, {flags.dtype}){more}")


def open_parts(flags: Namespace) -> tuple[Adapter | None, Base]:
    """The adapter under the names of its base, and the base, both told.

    An adapter of another model is refused, and there is a warning of one that was trained on other base
    weights.
    """
    adapter = _read_adapter(flags)
    base = _open_base(flags, adapter)
    if adapter is not None:
        if layouts.MERGED in base.file.metadata:
            raise ValueError(
                f"{base.path} already contains a merged adapter: give the original weights with --backbone"
            )
        adapter = adapter.on(base.backbone)
        adapter.install(base.backbone)  # on the meta device: a check of shapes
        known = {base.fingerprint, base.file.metadata.get(layouts.BASE, base.fingerprint)}
        problem = layouts.other_base("the adapter", adapter.base, known)
        if problem:
            print(f"warning: {problem}", file=sys.stderr)
    print(f"base     {base.path}")
    return adapter, base


def _open_base(flags: Namespace, adapter: Adapter | None) -> Base:
    """The base weights of `--backbone`, or those of the run that the first adapter is of."""
    description: Any = None
    if flags.backbone is not None:
        chosen = named(flags.backbone, download=flags.download)
        path = chosen.file(download=flags.download)
        weights = flags.backbone
        description = chosen.description
    else:
        path, weights = base_of(flags.adapters[0])
    of_adapter: Mapping[str, Any] = {} if adapter is None else adapter.model or {}
    if of_adapter.get("preset", "").startswith(TIMM):
        description = of_adapter
    file = layouts.open_model(path)
    if description is None or layouts.MODEL in file.metadata:
        description = layouts.model_in(file)
    read = {key: of_adapter[key] for key in ("layers", "bands") if key in of_adapter}
    model = layouts.whole({**description, **read}, file)
    backbone = layouts.built(model, "meta")
    run = run_around(flags.adapters[0]) if flags.adapters else None
    fingerprint = layouts.fingerprint_of(backbone, path)
    return Base(path, file, model, backbone, fingerprint, repository_of(weights), run)


def _write_weights(flags: Namespace, base: Base, adapter: Adapter | None, stage: Path) -> dict[str, str]:
    """Write the weights, and the configuration that their library reads, into a folder.

    Returns, and prints, how much of the adapter's change is in the file.
    """
    header = base.file.metadata
    origin = {name: header[name] for name in (layouts.BASE, layouts.MERGED) if name in header}
    if adapter is not None:
        settings = {"rank": adapter.rank, "alpha": adapter.alpha, "sha256": adapter.fingerprint()}
        origin = {layouts.BASE: base.fingerprint, layouts.MERGED: json.dumps(settings)}
    share = export.Share()
    tower = layouts.tower_in(base.file, base.backbone)
    names = layouts.base_parameters(base.backbone)
    tower = export.merge(tower, adapter, DTYPES[flags.dtype], names, share)
    content = export.CONTENT[flags.format](tower, base.file, base.backbone)
    path = stage / (FORMATS[flags.format].file if flags.in_folder else flags.out.name)
    write_safetensors(path, content.tensors, {layouts.MODEL: json.dumps(base.model), **origin})
    for name, values in content.files.items():
        write_text(stage / name, json.dumps(values, indent=2) + "\n")
    if not share.change:
        return {}
    print(f"merged   {share.retained:.1%} of the change is in the file, error {share.error:.2g}")
    if share.retained < 0.9 or share.error > 0.5:
        print(f"warning: {flags.dtype} cannot hold this change: write --dtype fp32, or fp16 where it fits")
    return {"share of the change that is in the file": f"{share.retained:.2%}, error {share.error:.2g}"}


def _verify(flags: Namespace, base: Base, adapter: Adapter | None, stage: Path) -> None:
    """Compare what the library makes of the result with base + adapter, and print it.

    Raises ValueError where they differ.
    """
    # 8 half-steps of the weights (0.4 to 3 were measured); in fp32 the order of B(Ax) or (BA)x costs 1e-5.
    limit = max(1e-5, 4 * torch.finfo(DTYPES[flags.dtype]).eps)
    difference, in_layers = export.difference(flags.format, stage, base.file, base.model, adapter)
    library = FORMATS[flags.format].library
    print(f"verify   relative difference {difference:.3g} by {library}, allowed {limit:.2g}")
    if in_layers > limit:
        text = f"PEFT computes something else (relative difference {in_layers:.2g}) without merge_and_unload"
        print(f"warning: {text}: timm passes by layers that PEFT wraps", file=sys.stderr)
    if difference > limit:
        raise ValueError(
            f"verification failed: output differs by {difference:.3g} (limit {limit:.2g}); nothing is kept"
        )


def _check(flags: Namespace) -> None:
    """Refuse flags that contradict each other, before any file is read."""
    check_new(flags.out)
    if not abs(flags.scale) <= 1e9:
        raise ValueError(f"--scale {flags.scale:g} is not allowed: give a number from -1e9 to 1e9")
    if flags.format in ADAPTERS and flags.dtype != "fp32":
        raise ValueError(f"--dtype {flags.dtype} is of whole weights: adapters are written in fp32")
    library = FORMATS[flags.format].library
    if flags.verify and find_spec(library) is None:
        raise ValueError(
            f"{library}, which loads --format {flags.format} to compare it, is not installed here: install "
            "it, or leave the comparison out with --verify none"
        )


def _read_adapter(flags: Namespace) -> Adapter | None:
    """The mean of the adapters, with the effect that was asked for; None where the base is written as it
    is.
    """
    adapters = []
    for path in flags.adapters:
        adapter = adapter_at(path)
        if adapter is not None:
            adapters.append(adapter)
        text = adapter.describe() if adapter else "none, the run trained its backbone itself"
        print(f"adapter  {path}: {text}")
    needed = len(flags.adapters) > 1 or flags.scale != 1 or flags.format in ADAPTERS
    if needed and len(adapters) < len(flags.adapters):
        raise ValueError(
            "a run that trained its backbone itself has no adapter to average, scale or write alone"
        )
    return average(adapters).scaled(flags.scale) if adapters else None


def _describe_run(run: Path | None, flags: Namespace, facts: dict[str, str]) -> list[EvalResult]:
    """Numbers of the run that an adapter is of, for the card; what else is to be said of it is added to
    `facts`.

    Only an evaluation of what the run, or the export in it, holds counts, and none of a part of the images.
    """
    from huggingface_hub import EvalResult

    if flags.scale != 1:
        facts["scale of the adapter"] = f"{flags.scale:g}"
    if run is None or len(flags.adapters) > 1:
        return []
    config = recorded_config(run)
    settings = config.visft
    facts["tasks"] = ", ".join(settings.tasks.enabled())
    facts["steps"] = str(config.scheduler.params.total_num_steps)
    identity = read_run(run).identity
    if "masks" in identity:
        facts["masks"] = identity["masks"]
    files = [folder / METRICS_FILE for folder in (run, run.parent) if (folder / METRICS_FILE).is_file()]
    is_step = flags.adapters[0].name.startswith("step_")
    if not files or flags.scale != 1 or settings.run.eval_limit is not None or is_step:
        return []
    numbers: dict[int, dict[str, Any]] = {}
    for record in read_metrics(files[0]):
        numbers.setdefault(record["step"], {}).update(record)
    step = max(numbers, default=0)
    if settings.run.keep_best is not None:
        from visft_ds.checkpoint.saver import best_step, recorded_scores  # imports deepspeed: costs seconds

        step = best_step(recorded_scores(files[0], settings.run.keep_best)) or step
    hub_tasks = {name.partition("/")[0]: config_class(task).hub_task for task, name in MAIN.items()}
    results = []
    for name, value in numbers.get(step, {}).items():
        split, _, metric = name.partition("/")  # "val/box/AP50"
        part = metric.partition("/")[0]
        # -1 is COCO's mark for "nothing of this kind to find"
        if split == "val" and part in hub_tasks and 0 <= float(value) < math.inf:
            result = EvalResult(
                task_type=hub_tasks[part],
                dataset_type="custom",
                dataset_name=f"evaluation of the run, step {step}",
                dataset_split=settings.data.val,
                metric_type=metric,
                metric_value=float(value),
            )
            results.append(result)
    return results
