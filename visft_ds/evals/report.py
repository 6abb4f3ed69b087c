"""report.html: what was trained and how well it does, in one file that needs nothing else and no network.

Reads only what runs (run.json, metrics.jsonl) and visft evaluate (metrics.json, results, pictures) left on disk.
A difference has a colour only where it has an interval, and that leaves zero out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from visft_ds.config.resolve import flatten
from visft_ds.evals import curves
from visft_ds.evals.benchmarks.intervals import LEVEL, Interval
from visft_ds.evals.compare import MAIN, Evaluation, compare_results
from visft_ds.evals.jackknife import PARTS
from visft_ds.evals.out_of_domain import Comparison
from visft_ds.evals.page import embed, render
from visft_ds.monitor.metrics import RunFile
from visft_ds.redaction import redacted_values, redacted_words
from visft_ds.run.folder import read_run, recorded_config
from visft_ds.tasks.pictures import INK, Picture, grid, letters, paper, split_panels

#: Name of a metric, without the part before the slash -> what it means.
MEANINGS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "small objects, area below 32² pixels",
    "APm": "medium objects",
    "APl": "large objects, area from 96² pixels",
    "AR100": "recall with 100 predictions an image",
    "CIDEr": "weighted n-grams shared with the true captions, 0 to 10",
    "BLEU-1": "share of right words",
    "BLEU-2": "runs of up to two words",
    "BLEU-3": "up to three",
    "BLEU-4": "up to four",
    "ROUGE-L": "longest common subsequence of words",
}
_MOST_CATEGORIES = 20
_NONE = "–"
#: Pictures of a task; fewer where each task has two sections of them.
_MOST_PICTURES, _MOST_OF_TWO = 6, 4
_ROWS = 2  # of each task on the sheet of `comparison`
_HEAD = 34  # height of the line of labels on it, pixels


Drawn = Mapping[str, Mapping[int, Picture]]  #: task -> image id -> ground truth beside prediction


@dataclass(frozen=True)
class Report:
    """All that a report shows; sections without content are left out."""

    title: str
    introduction: Sequence[str]  #: paragraphs
    runs: Mapping[str, Path]  #: label -> run folder
    evaluations: Sequence[Evaluation]  #: before ... after: the difference shown is last - first
    merged: Evaluation | None = None  #: the last one again, with the adapter merged into the weights
    training: Sequence[Evaluation] = ()  #: the same models as `evaluations`, on images they were trained on
    files: Mapping[str, Path] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)  #: what it does -> text to paste
    seconds: Mapping[str, float] = field(default_factory=dict)  #: step -> its duration
    beyond: Comparison | None = None  #: the same two models out of domain, which is shown first
    changes: Mapping[str, Interval] = field(default_factory=dict)  #: number -> last - first, see `jackknife.changes`
    without: str = "visft report computes them"  #: why there are no changes
    histories: Mapping[str, curves.History] = field(default_factory=dict)  #: of runs whose records have been read
    drawn: Mapping[str, Drawn] | None = None  #: label -> pictures; None: those of `evaluations`

    @property
    def tasks(self) -> list[str]:
        """The tasks that any evaluation has numbers of."""
        return [task for task in MAIN if any(task in evaluation.tasks for evaluation in self.evaluations)]


def write_report(path: Path, report: Report) -> Path:
    """Write the page; returns its path.

    Raises:
        ValueError: a run or evaluation that is not there or not finished.
    """
    where = " on held-out images" if report.training else ""
    most = _MOST_OF_TWO if report.training else _MOST_PICTURES
    results = [
        _results(f"Results{where}", report.evaluations, report.merged, report.changes, report.without),
        _results("Results on training images", report.training, None, {}, "they are of images that were learnt"),
    ]
    drawn = report.drawn if report.drawn is not None else _drawn(report.evaluations)
    pictures = []
    for task in report.tasks if report.drawn is None else MAIN:
        title = f"{task.capitalize()}: the same images, {'before and after' if len(drawn) == 2 else 'side by side'}"
        pictures.append(_pictures(f"{title}{where and ', held out'}", drawn, task, most))
        pictures.append(_pictures(f"{title}, trained on", _drawn(report.training), task, most))
    read = report.histories
    histories = {label: read.get(label) or curves.read_history(folder) for label, folder in report.runs.items()}
    text = render(
        "evals/report.html.j2",
        title=report.title,
        report=report,
        cards=[*_beyond_card(report.beyond), *(_card(report, task) for task in report.tasks)],
        sheets=[embed(sheet) for sheet in report.beyond.pictures] if report.beyond else [],
        results=results,
        pictures=pictures,
        curves=curves.charts(histories),
        missing=curves.missing(histories),
        times=_times(report, histories),
        categories=_categories(report),
        colours=curves.COLOURS,
        runs=_runs(report),
        seconds={name: f"{value:.1f} s" for name, value in report.seconds.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def comparison(evaluations: Sequence[Evaluation], rows: int = _ROWS) -> Picture | None:
    """Sheet for all tasks: under a line of labels so many images of each, a row an image with its ground truth and
    the predictions of each evaluation; None without pictures.
    """
    panels: list[Picture] = []
    drawn = _drawn(evaluations)
    for task in MAIN:
        for row in list(_panels(drawn, task).values())[:rows]:
            panels += row
    if not panels:
        return None
    columns = 1 + len(evaluations)
    sheet = grid(panels, columns=columns)
    head = Image.fromarray(paper(_HEAD, sheet.shape[1]))
    draw = ImageDraw.Draw(head)
    for place, label in enumerate(("ground truth", *(evaluation.label for evaluation in evaluations))):
        left = 12 + place * (sheet.shape[1] - 12) / columns
        draw.text((left, _HEAD / 2 + 4), label, fill=INK, font=letters(20), anchor="lm")
    return np.concatenate([np.asarray(head), sheet])


def _drawn(evaluations: Sequence[Evaluation]) -> dict[str, Drawn]:
    return {one.label: {task: one.pictures(task) for task in MAIN} for one in evaluations}


def _panels(of_models: Mapping[str, Drawn], task: str) -> dict[int, list[Picture]]:
    """Image id -> [ground truth, prediction of each model], for the images that were drawn of all of them."""
    drawn = [pictures.get(task, {}) for pictures in of_models.values()]
    if not drawn:
        return {}
    shared = [image_id for image_id in drawn[0] if all(image_id in other for other in drawn)]
    halves = {image_id: [split_panels(pictures[image_id]) for pictures in drawn] for image_id in shared}
    return {image_id: [pairs[0][0], *(pair[1] for pair in pairs)] for image_id, pairs in halves.items()}


def _card(report: Report, task: str) -> dict[str, Any]:
    name = MAIN[task]
    values = [evaluation.metrics.get(name, math.nan) for evaluation in report.evaluations]
    lines = [f"{name.replace('/', ' ')} {report.evaluations[-1].label}"]
    if len(values) > 1:
        change = _change(report.evaluations, name)
        known = report.changes.get(name)
        interval = f", {_interval(known, 3)}" if known else ""
        difference = f" ({change:+.3f}{interval})" if math.isfinite(change) else ""
        lines.append(f"{report.evaluations[0].label}: {_number(values[0], 3)}{difference}")
    for evaluation in report.training[-1:]:
        lines.append(f"on training images: {_number(evaluation.metrics.get(name, math.nan), 3)}")
    return {"value": _number(values[-1], 3), "lines": lines}


def _beyond_card(beyond: Comparison | None) -> list[dict[str, Any]]:
    if beyond is None:
        return []
    line = next(line for line in beyond.lines() if line.main)
    return [
        {
            "value": line.after,
            "lines": [f"{line.name} out of domain, percent", f"before: {line.before}", beyond.verdict()],
        }
    ]


def _results(
    title: str,
    evaluations: Sequence[Evaluation],
    merged: Evaluation | None,
    changes: Mapping[str, Interval],
    without: str,
) -> dict[str, Any]:
    last = evaluations[-1] if evaluations else None
    tasks = last.tasks if last else []
    told = f", and beside it its {LEVEL:.0%} interval over images (Student's t, a jackknife of {PARTS} parts); coloured"
    return {
        "title": title,
        "evaluations": evaluations,
        "merged": merged,
        "tasks": [_rows(evaluations, merged, task, changes) for task in tasks],
        "intervals": f"{told} is what leaves zero out."
        if changes
        else f"; without intervals, so without colours: {without}.",
        "differences": [compare_results(last, merged, task).text() for task in tasks] if last and merged else [],
    }


def _rows(
    evaluations: Sequence[Evaluation], merged: Evaluation | None, task: str, changes: Mapping[str, Interval]
) -> list[dict[str, Any]]:
    """A task's numbers: each evaluation, the difference, the merged weights."""
    rows, prefix = [], MAIN[task].partition("/")[0]
    for name in evaluations[-1].metrics:
        if not name.startswith(f"{prefix}/") or name.count("/") > 1:
            continue
        change, known = _change(evaluations, name), changes.get(name)
        rows.append(
            {
                "name": name,
                "meaning": MEANINGS.get(name.partition("/")[2], ""),
                "main": name == MAIN[task],
                "numbers": [_number(evaluation.metrics.get(name, math.nan)) for evaluation in evaluations],
                "change": f"{change:+.4f}" if math.isfinite(change) else _NONE,
                "interval": _interval(known, 4) if known else "",
                "kind": ("up" if change > 0 else "down") if known and known.sure else "",
                "merged": _number(merged.metrics.get(name, math.nan)) if merged else "",
            }
        )
    return rows


def _pictures(title: str, drawn: Mapping[str, Drawn], task: str, most: int) -> dict[str, Any]:
    rows = list(_panels(drawn, task).items())[:most]
    return {
        "title": title,
        "task": task,
        "labels": ["ground truth", *drawn],
        "rows": {image_id: [embed(panel) for panel in panels] for image_id, panels in rows},
    }


def _times(report: Report, histories: Mapping[str, curves.History]) -> list[dict[str, Any]]:
    """Bars of what the time of each run went into."""
    configs = {label: recorded_config(folder).to_dict()["visft"] for label, folder in report.runs.items()}
    spent = [curves.time_by_part(history, configs[label]) for label, history in histories.items()]
    data = [curves.time_of_data(history) for history in histories.values()]
    parts = [("Training, by the clock", spent), ("Making samples, by all readers of the main process", data)]
    return [{"title": title, "rows": _shares(seconds)} for title, seconds in parts if any(seconds)]


def _shares(seconds: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, str]]]:
    """Part -> of each run, the share of its sum and a text."""
    sums = [sum(of_run.values()) or 1.0 for of_run in seconds]
    return {
        part: [
            (
                max(0.0, of_run.get(part, 0.0) / total),
                f"{of_run.get(part, 0.0) / total:.0%}, {of_run.get(part, 0.0):.1f} s",
            )
            for of_run, total in zip(seconds, sums, strict=True)
        ]
        for part in dict.fromkeys(part for of_run in seconds for part in of_run)
    }


def _categories(report: Report) -> list[dict[str, Any]]:
    """For boxes and masks, the average precision of each category; of many, those that changed most."""
    halves = [_bars(report, prefix) for prefix in ("box", "mask")] if report.evaluations else []
    return [half for half in halves if half["rows"]]


def _bars(report: Report, prefix: str) -> dict[str, Any]:
    first, last = report.evaluations[0].metrics, report.evaluations[-1].metrics
    names = [name for name in last if name.startswith(f"{prefix}/") and name.count("/") == 2]
    names = [name for name in names if name in first and min(first[name], last[name]) >= 0]
    total = len(names)
    names = sorted(names, key=lambda name: abs(last[name] - first[name]), reverse=True)[:_MOST_CATEGORIES]
    names.sort(key=lambda name: last[name], reverse=True)
    return {
        "prefix": prefix,
        "which": f"the {len(names)} of {total} categories that changed most"
        if len(names) < total
        else "every category",
        "rows": {
            name.split("/")[2]: [(value := one.metrics[name], f"{value:.3f}") for one in report.evaluations]
            for name in names
        },
    }


def _runs(report: Report) -> dict[str, Any]:
    if not report.runs:
        return {}
    records = [read_run(folder) for folder in report.runs.values()]
    configs = [recorded_config(folder).to_dict() for folder in report.runs.values()]
    facts = [_run_facts(record, config) for record, config in zip(records, configs, strict=True)]
    values = [dict(flatten(redacted_values(config))) for config in configs]
    keys = [key for key in dict.fromkeys(key for of_run in values for key in of_run) if key != "visft.run.out"]
    settings = {key: [str(of_run.get(key, _NONE)) for of_run in values] for key in keys}
    return {
        "facts": _side_by_side(facts),
        "environment": _side_by_side([_environment(record) for record in records]),
        "settings": {key: texts for key, texts in settings.items() if len(set(texts)) > 1},
    }


def _side_by_side(runs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for of_run in runs for name in of_run)
    return {name: [of_run.get(name, _NONE) for of_run in runs] for name in names}


def _environment(record: RunFile) -> dict[str, str]:
    commit = f"{record.git.commit[:12]}{', with changes' if record.git.modified else ''}" if record.git else _NONE
    times = f", then {len(record.earlier)} times more" if record.earlier else ""
    started = (record.earlier[0].get("started") if record.earlier else record.started) or _NONE
    command = " ".join(redacted_words(record.command))
    return {"started": f"{started}{times}", "command": command, "commit": commit, **record.versions}


def _run_facts(record: RunFile, config: Mapping[str, Any]) -> dict[str, str]:
    visft, optimizer, schedule = config["visft"], config["optimizer"], config["scheduler"]
    lora, model, rate = visft["lora"], visft["model"], optimizer["params"]["lr"]
    return {
        "backbone": f"{model['name']}, weights: {model['weights'] or 'random'}",
        "what trains": ", ".join(
            f"{group['name']} ({group['params']}, learning rate {rate if group['lr'] is None else group['lr']:g})"
            for group in visft["param_groups"]
        ),
        "adapter": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {'+'.join(lora['targets'])}" if lora else "none",
        "a step": _step_fact(visft),
        "steps": f"{schedule['params']['total_num_steps']}, {schedule['params']['warmup_num_steps']} of them warm-up",
        "optimiser": f"{optimizer['type']}, clipping {config['gradient_clipping']:g}",
        "processes": f"{record.world_size}, ZeRO-{config['zero_optimization']['stage']}",
        "precision": model["precision"],
        "data": f"{visft['data']['root']}, split {visft['data']['train']}",
        "seed": str(visft["seed"]),
    }


def _step_fact(visft: Mapping[str, Any]) -> str:
    """Description of the tasks that an optimiser step trains."""
    tasks = {name: task for name, task in visft["tasks"].items() if task}
    if visft["mode"] == "shared":
        return f"{visft['shared']['batch_size']} images for all of {', '.join(tasks)}"
    shares = {name: task["updates"] for name, task in tasks.items()}
    all_shares = sum(shares.values())
    return "one task: " + ", ".join(
        f"{name} in {100 * shares[name] / all_shares:.0f} % of the steps, {task['batch_size']} images"
        for name, task in tasks.items()
    )


def _change(evaluations: Sequence[Evaluation], name: str) -> float:
    values = [evaluations[place].metrics.get(name, math.nan) for place in (0, -1)]
    return values[1] - values[0] if min(values) >= 0 else math.nan


def _interval(known: Interval, digits: int) -> str:
    return f"{known.low:+.{digits}f} to {known.high:+.{digits}f}"


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if value >= 0 else _NONE
