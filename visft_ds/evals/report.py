"""`visft report`: a page about one run, or about several side by side; one HTML file that needs no network.

It reads only what runs (run.json, metrics.jsonl), visft evaluate (RUN/evaluation-SPLIT) and visft judge
left on disk. A run may still be training; what it has not recorded is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.ndimage import uniform_filter1d

from visft_ds.config import ResolvedConfig
from visft_ds.config.record import RunFile, read_run, recorded_config
from visft_ds.config.resolve import flatten
from visft_ds.data.fetch import is_url
from visft_ds.data.shards import Manifest
from visft_ds.evals.pages import Series, embedded, line_chart, render
from visft_ds.evals.records import MAIN, METRICS, Evaluation, counted, read_evaluation, read_judged
from visft_ds.flags import check_extra
from visft_ds.monitor.metrics import read_metrics
from visft_ds.redaction import redacted, redacted_values
from visft_ds.run_files import METRICS_FILE
from visft_ds.tasks.pictures import split_panels

_MOST_PICTURES = 6  # of a task
_NONE = "–"
_WINDOW = 1 / 40  # a smoothed value is the mean over this share of the line

History = Sequence[Mapping[str, Any]]  #: records of a run's metrics.jsonl: steps, evaluations, events


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
    names = [folder.resolve().name for folder in folders]
    labels = [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]
    if out is None and len(folders) > 1:
        raise ValueError(f"--out is needed for {len(folders)} runs: name the page, as in --out report.html")
    path = out or folders[0] / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {path} would be overwritten with a page: name a file that ends in .html")
    runs = []
    for label, folder in zip(labels, folders, strict=True):
        file = folder / METRICS_FILE  # not there when the disk was full
        history = list(read_metrics(file)) if file.is_file() else []
        runs.append(_Run(label, folder, recorded_config(folder), read_run(folder), history))
    parts = [main.partition("/")[0] for main in MAIN.values()]
    evaluations = [one for run in runs for one in _evaluations(run, alone=len(runs) == 1)]
    measured = dict.fromkeys(name for one in evaluations for name in one.metrics if name.count("/") == 1)
    text = render(
        "report.html.j2",
        title=f"{'Runs' if len(runs) > 1 else 'Run'} {', '.join(labels)}",
        labels=labels,
        states=[_state(run) for run in runs],
        beyond=read_judged(judged) if judged else None,
        evaluations=evaluations,
        results=[
            found for part in parts if (found := [name for name in measured if name.startswith(f"{part}/")])
        ],
        mains=list(MAIN.values()),
        pictures=[one for task in MAIN if (one := _pictures(evaluations, task))["rows"]],
        curves=_charts({run.label: run.history for run in runs}),
        facts=_side_by_side([_facts(run) for run in runs]),
        settings=_differing([run.config for run in runs]),
        environment=_side_by_side([_environment(run.record) for run in runs]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _state(run: _Run) -> str:
    steps, visft = run.config.total_steps, run.config.visft
    last = max((entry["step"] for entry in run.history if "loss/loss" in entry), default=0)
    done = f"finished: {steps} steps" if last >= steps else f"{last} of {steps} steps"
    return f"{run.label}: stage {visft.stage} of {visft.model.name}, {done}."


def _evaluations(run: _Run, alone: bool) -> list[Evaluation]:
    """Evaluations of a run: that of visft evaluate, else the last during training, if `alone` also the
    first.
    """
    data, limit = run.config.visft.data, run.config.visft.run.eval_limit
    made = run.folder / f"evaluation-{data.val}"
    if (made / METRICS).is_file():
        return [read_evaluation(run.label, made)]
    total = None
    if not is_url(data.root):
        with suppress(ValueError, OSError):  # the split may be on another machine
            total = len(Manifest.load(data.root, data.val))
    images = min(limit, total) if limit and total else limit or total
    record = {"data": {"where": f"{data.root}/{data.val}"}}
    entries = [entry for entry in run.history if any(name.startswith("val/") for name in entry)]
    found = []
    for entry in entries[:1] + entries[1:][-1:] if alone else entries[-1:]:
        metrics = {name[4:]: float(value) for name, value in entry.items() if name.startswith("val/")}
        label = f"step {entry['step']}" if alone else run.label
        found.append(Evaluation(label, run.folder, metrics, counted(images, total), record))
    return found


def _pictures(evaluations: Sequence[Evaluation], task: str) -> dict[str, Any]:
    """By image, ground truth and the prediction of each evaluation that drew it."""
    drawn = {one.label: one.pictures(task) for one in evaluations if one.record.get("pictures", {}).get(task)}
    shared = [image for image in next(iter(drawn.values()), {}) if all(image in of for of in drawn.values())]
    rows: dict[int, list[str]] = {}
    for image in shared[:_MOST_PICTURES]:
        pairs = [split_panels(of[image]) for of in drawn.values()]
        rows[image] = [embedded(panel) for panel in (pairs[0][0], *(pair[1] for pair in pairs))]
    return {"task": task, "labels": ["ground truth", *drawn], "rows": rows}


def _charts(histories: Mapping[str, History]) -> list[dict[str, Any]]:
    """Charts by kind, {"title", "charts"}; a number that no run recorded is a chart less, never an error."""
    rough = {"smooth": True, "linear": False}
    kinds = {
        "Loss by task": [
            _chart(histories, f"loss/{task}", f"{task} loss", "weighted loss", **rough) for task in MAIN
        ],
        "Evaluation during training": [_chart(histories, f"val/{name}", name, "") for name in MAIN.values()],
        "Learning rate and gradient": [
            _rates(histories),
            _chart(histories, "grad_norm", "gradient norm", "L2 norm, before clipping", **rough),
        ],
        "Speed and memory": [
            _chart(histories, "images_per_second", "images per second", "images/s", smooth=True),
            _chart(histories, "memory/peak_gib", "peak memory of the fullest device", "GiB"),
        ],
    }
    found = {title: [chart for chart in drawn if chart] for title, drawn in kinds.items()}
    return [{"title": title, "charts": drawn} for title, drawn in found.items() if drawn]


def _points(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps and numbers of a name, without those that are no numbers."""
    having = [entry for entry in history if math.isfinite(entry.get(name, math.nan))]
    return [entry["step"] for entry in having], [float(entry[name]) for entry in having]


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
    for label, history in histories.items():
        steps, values = _points(history, name)
        told = label if len(histories) > 1 else "smoothed" if smooth else ""
        shown = (
            uniform_filter1d(values, 1 + int(_WINDOW * len(values)), mode="nearest")
            if smooth and values
            else values
        )
        series.append(Series(steps, list(shown), told, behind=values if smooth else ()))
    return line_chart(series, title=title, y_label=unit, linear=linear)


def _rates(histories: Mapping[str, History]) -> str:
    """A line for each learning rate of each run; groups that always have the same share one."""
    series: list[Series] = []
    for label, history in histories.items():
        alike: dict[tuple[float, ...], list[str]] = {}
        for name in sorted({name for entry in history for name in entry if name.startswith("lr/")}):
            alike.setdefault(tuple(_points(history, name)[1]), []).append(name)
        for group in alike.values():
            groups = ", ".join(name.removeprefix("lr/") for name in group)
            told = f"{label}: {groups}" if len(histories) > 1 else groups
            series.append(Series(*_points(history, group[0]), told))
    return line_chart(series, title="learning rate", y_label="", linear=True)


def _facts(run: _Run) -> dict[str, str]:
    config = run.config.to_dict()
    visft, optimizer, schedule = config["visft"], config["optimizer"], config["scheduler"]["params"]
    lora, model, rate = visft["lora"], visft["model"], optimizer["params"]["lr"]
    return {
        "backbone": f"{model['name']}, weights: {model['weights'] or 'random'}",
        "what trains": ", ".join(
            f"{group['name']} ({group['params']}, learning rate {rate if group['lr'] is None else group['lr']:g})"
            for group in visft["param_groups"]
        ),
        "adapter": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {'+'.join(lora['targets'])}"
        if lora
        else "none",
        "steps": f"{schedule['total_num_steps']}, {schedule['warmup_num_steps']} of them warm-up",
        "optimiser": f"{optimizer['type']}, clipping {config['gradient_clipping']:g}",
        "processes": f"{run.record.world_size}, ZeRO-{config['zero_optimization']['stage']}",
        "precision": model["precision"],
        "data": f"{visft['data']['root']}, split {visft['data']['train']}",
        "seed": str(visft["seed"]),
    }


def _environment(record: RunFile) -> dict[str, str]:
    command = " ".join([redacted(word) for word in record.command])
    return {
        "started": record.started or _NONE,
        "command": command,
        "commit": record.commit or _NONE,
        **record.versions,
    }


def _differing(configs: Sequence[ResolvedConfig]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs."""
    values = [dict(flatten(redacted_values(config.to_dict()))) for config in configs]
    texts = _side_by_side([{key: str(value) for key, value in of.items()} for of in values])
    return {key: of for key, of in texts.items() if len(set(of)) > 1 and key != "visft.run.out"}


def _side_by_side(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for of_run in runs for name in of_run)
    return {name: [of_run.get(name, _NONE) for of_run in runs] for name in names}
