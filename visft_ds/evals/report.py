"""`visft report`: a page about one run, or about several side by side; one HTML file that needs no network.

It reads only what runs (run.json, metrics.jsonl), visft evaluate (RUN/evaluation-SPLIT) and visft judge
left on disk. A run may still be training; what it has not recorded is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scipy.ndimage import uniform_filter1d

from visft_ds.config import ResolvedConfig
from visft_ds.config.record import RunFile, read_run, recorded_config
from visft_ds.config.tree import flatten
from visft_ds.data.fetch import is_url
from visft_ds.data.shards import Manifest
from visft_ds.evals.pages import Series, embedded, line_chart, render
from visft_ds.evals.records import MAIN, METRICS, Evaluation, counted, read_evaluation, read_judged
from visft_ds.files import write_text
from visft_ds.flags import check_extra
from visft_ds.monitor.metrics import read_metrics
from visft_ds.redaction import redacted, redacted_values
from visft_ds.run_files import METRICS_FILE
from visft_ds.tasks.pictures import split_panels

_MOST_IMAGES = 6  # that a task shows
_NONE = "–"
_WINDOW = 1 / 40  # a smoothed value is the mean over this share of the line

History = Sequence[Mapping[str, Any]]  #: records of a run's metrics.jsonl: steps, evaluations, events
Rows = dict[str, list[str]]  #: name of a row -> text of each run


@dataclass(frozen=True)
class _Run:
    label: str
    folder: Path
    config: ResolvedConfig
    record: RunFile
    history: History


def report_runs(folders: Sequence[Path], judged: Path | None, out: Path | None) -> Path:
    """Write the page; returns its path.

    Raises:
        ValueError: a folder without a run, a file that is no page, records that cannot be read.
    """
    check_extra("visft report", "report", ["matplotlib"])
    if out is None and len(folders) > 1:
        raise ValueError(f"--out is needed for {len(folders)} runs: name the page, as in --out report.html")
    path = out or folders[0] / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {path} would be overwritten with a page: name a file that ends in .html")
    runs = _read_runs(folders)
    labels = [run.label for run in runs]
    evaluations = [evaluation for run in runs for evaluation in _evaluations(run, alone=len(runs) == 1)]
    text = render(
        "report.html.j2",
        title=f"{'Runs' if len(runs) > 1 else 'Run'} {', '.join(labels)}",
        labels=labels,
        states=[_state(run) for run in runs],
        beyond=read_judged(judged) if judged else None,
        evaluations=evaluations,
        results=_metrics_by_task(evaluations),
        mains=list(MAIN.values()),
        visualizations=_visualizations(evaluations),
        curves=_charts({run.label: run.history for run in runs}),
        facts=_side_by_side([_facts(run) for run in runs]),
        settings=_differing([run.config for run in runs]),
        environment=_side_by_side([_environment(run.record) for run in runs]),
    )
    write_text(path, text)
    return path


def _read_runs(folders: Sequence[Path]) -> list[_Run]:
    """The runs, each by the name of its folder, or by its path where several have that name."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for name, folder in zip(names, folders, strict=True):
        label = name if names.count(name) == 1 else str(folder)
        file = folder / METRICS_FILE  # not there when the disk was full
        history = list(read_metrics(file)) if file.is_file() else []
        runs.append(_Run(label, folder, recorded_config(folder), read_run(folder), history))
    return runs


def _state(run: _Run) -> str:
    steps = run.config.total_steps
    visft = run.config.visft
    last = max((entry["step"] for entry in run.history if "loss/loss" in entry), default=0)
    done = f"finished: {steps} steps" if last >= steps else f"{last} of {steps} steps"
    return f"{run.label}: stage {visft.stage} of {visft.model.name}, {done}."


def _evaluations(run: _Run, alone: bool) -> list[Evaluation]:
    """Evaluations of a run: that of visft evaluate, else the last during training, if `alone` also the
    first.
    """
    data = run.config.visft.data
    folder = run.folder / f"evaluation-{data.val}"
    if (folder / METRICS).is_file():
        return [read_evaluation(run.label, folder)]
    entries = [entry for entry in run.history if any(name.startswith("val/") for name in entry)]
    shown = [entries[0], entries[-1]] if alone and len(entries) > 1 else entries[-1:]
    images = _images_of_evaluations(run)
    evaluations = []
    for entry in shown:
        names = [name for name in entry if name.startswith("val/")]
        metrics = {name.removeprefix("val/"): float(entry[name]) for name in names}
        label = f"step {entry['step']}" if alone else run.label
        record = {"data": {"where": f"{data.root}/{data.val}"}}
        evaluations.append(Evaluation(label, run.folder, metrics, images, record))
    return evaluations


def _images_of_evaluations(run: _Run) -> str:
    """Number of images in an evaluation during training, in words."""
    data = run.config.visft.data
    limit = run.config.visft.run.eval_limit
    total = None
    if not is_url(data.root):
        with suppress(ValueError, OSError):  # the split may be on another machine
            total = len(Manifest.load(data.root, data.val))
    known = [number for number in (limit, total) if number]
    return counted(min(known, default=None), total)


def _metrics_by_task(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Names of all metrics, for each task that has some; without those of single categories."""
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics)
    groups = []
    for main in MAIN.values():
        kind = main.partition("/")[0]
        group = [name for name in names if name.startswith(f"{kind}/") and name.count("/") == 1]
        if group:
            groups.append(group)
    return groups


def _visualizations(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """For each task, by image, ground truth and the prediction of each evaluation that drew it."""
    by_task = []
    for task in MAIN:
        drawn = {evaluation.label: evaluation.visualizations(task) for evaluation in evaluations}
        drawn = {label: drawings for label, drawings in drawn.items() if drawings}
        first = next(iter(drawn.values()), {})
        shared = [image for image in first if all(image in drawings for drawings in drawn.values())]
        rows: Rows = {}
        for image in shared[:_MOST_IMAGES]:
            pairs = [split_panels(drawings[image]) for drawings in drawn.values()]
            truths, predictions = zip(*pairs, strict=True)
            rows[str(image)] = [embedded(panel) for panel in (truths[0], *predictions)]
        if rows:
            by_task.append({"task": task, "labels": ["ground truth", *drawn], "rows": rows})
    return by_task


def _charts(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Charts by kind, {"title", "charts"}; a number that no run recorded is a chart less, never an error."""
    chart = partial(_chart, histories)
    rough = {"smooth": True, "linear": False}
    kinds = {
        "Loss by task": [chart(f"loss/{task}", f"{task} loss", "weighted loss", **rough) for task in MAIN],
        "Evaluation during training": [chart(f"val/{name}", name, "") for name in MAIN.values()],
        "Learning rate and gradient": [
            _rates(histories),
            chart("grad_norm", "gradient norm", "L2 norm, before clipping", **rough),
        ],
        "Speed and memory": [
            chart("images_per_second", "images per second", "images/s", smooth=True),
            chart("memory/peak_gib", "peak memory of the fullest device", "GiB"),
        ],
    }
    groups = [{"title": title, "charts": list(filter(None, charts))} for title, charts in kinds.items()]
    return [group for group in groups if group["charts"]]


def _points(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps and numbers of a name, without those that are no numbers."""
    steps = []
    values = []
    for entry in history:
        value = float(entry.get(name, math.nan))  # infinity and NaN are recorded as texts
        if math.isfinite(value):
            steps.append(entry["step"])
            values.append(value)
    return steps, values


def _chart(
    histories: Mapping[str, History],
    name: str,
    title: str,
    unit: str,
    *,
    smooth: bool = False,
    linear: bool = True,
) -> str:
    """A line of each run; to be `smooth`, pale behind it as it was recorded."""
    series: list[Series] = []
    for run, history in histories.items():
        steps, values = _points(history, name)
        curve = Series(steps, values, run if len(histories) > 1 else "")
        if smooth and values:
            means = uniform_filter1d(values, 1 + int(_WINDOW * len(values)), mode="nearest")
            curve = Series(steps, list(means), curve.name or "smoothed", behind=values)
        series.append(curve)
    return line_chart(series, title=title, y_label=unit, linear=linear)


def _rates(histories: Mapping[str, History]) -> str:
    """A line for each learning rate of each run; groups that always have the same share one."""
    series: list[Series] = []
    for run, history in histories.items():
        names = sorted({name for entry in history for name in entry if name.startswith("lr/")})
        names_of_rates: dict[tuple[float, ...], list[str]] = {}
        for name in names:
            rates = tuple(_points(history, name)[1])
            names_of_rates.setdefault(rates, []).append(name)
        for alike in names_of_rates.values():
            groups = ", ".join(name.removeprefix("lr/") for name in alike)
            label = f"{run}: {groups}" if len(histories) > 1 else groups
            series.append(Series(*_points(history, alike[0]), label))
    return line_chart(series, title="learning rate", y_label="", linear=True)


def _facts(run: _Run) -> dict[str, str]:
    config = run.config
    visft = config.visft
    optimizer = config.optimizer
    trained = []
    for group in visft.param_groups:
        rate = optimizer.params.lr if group.lr is None else group.lr
        trained.append(f"{group.name} ({group.params}, learning rate {rate:g})")
    adapter = "none"
    if lora := visft.lora:
        adapter = f"rank {lora.rank}, alpha {lora.alpha:g}, on {'+'.join(lora.targets)}"
    return {
        "backbone": f"{visft.model.name}, weights: {visft.model.weights or 'random'}",
        "what trains": ", ".join(trained),
        "adapter": adapter,
        "steps": f"{config.total_steps}, {config.scheduler.params.warmup_num_steps} of them warm-up",
        "optimiser": f"{optimizer.type}, clipping {config.gradient_clipping:g}",
        "processes": f"{run.record.world_size}, ZeRO-{config.deepspeed['zero_optimization']['stage']}",
        "precision": visft.model.precision,
        "data": f"{visft.data.root}, split {visft.data.train}",
        "seed": str(visft.seed),
    }


def _environment(record: RunFile) -> dict[str, str]:
    return {
        "started": record.started or _NONE,
        "command": " ".join(redacted(word) for word in record.command),
        "commit": record.commit or _NONE,
        **record.versions,
    }


def _differing(configs: Sequence[ResolvedConfig]) -> Rows:
    """Settings that are not the same in all runs."""
    settings = []
    for config in configs:
        flat = flatten(redacted_values(config.to_dict()))
        settings.append({key: str(value) for key, value in flat if key != "visft.run.out"})
    return {key: texts for key, texts in _side_by_side(settings).items() if len(set(texts)) > 1}


def _side_by_side(runs: Sequence[Mapping[str, str]]) -> Rows:
    names = dict.fromkeys(name for texts in runs for name in texts)
    return {name: [texts.get(name, _NONE) for texts in runs] for name in names}
