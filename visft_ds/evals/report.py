"""report.html: what was trained and how well it does, in one file that needs nothing else and no network.

Reads only what runs (run.json, metrics.jsonl) and tools/evaluate.py (metrics.json, results, pictures) left on disk.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from visft_ds.evals.charts import Series, line_chart, smooth, thin
from visft_ds.evals.pictures import Picture, grid, split_panels
from visft_ds.monitor.metrics import read_metrics

#: What tools/evaluate.py leaves in its folder; METRICS is written last.
FORMAT, VERSION = "visft_ds evaluation", 1
METRICS, PICTURES = "metrics.json", "pictures"

#: Rows of the results table, in this order: name of the metric -> what it means.
MEANINGS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "small objects, area below 32² pixels",
    "APm": "medium objects",
    "APl": "large objects, area from 96² pixels",
    "AR100": "recall with 100 predictions an image",
}
_COLOURS = ("#2c6fbb", "#c2571a", "#3c8d40", "#8a4fa3")
_MOST_CATEGORIES = 20


def results_name(task: str) -> str:
    """Name of the file with a task's results."""
    return f"{task}_results.json"


@dataclass(frozen=True)
class Evaluation:
    """A folder written by tools/evaluate.py."""

    label: str
    folder: Path
    record: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Name -> value in [0, 1]; -1 where the data has no such objects."""
        metrics: Mapping[str, float] = self.record["metrics"]
        return metrics

    def pictures(self, task: str) -> dict[int, Picture]:
        """Image id -> ground truth beside prediction."""
        files = self.record["pictures"].get(task, ())
        return {entry["image_id"]: np.asarray(Image.open(self.folder / entry["file"])) for entry in files}


def read_evaluation(label: str, folder: Path) -> Evaluation:
    """Open an evaluation.

    Raises:
        ValueError: the folder holds none, or an unfinished one.
    """
    path = folder / METRICS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no finished evaluation: {error}; make it with tools/evaluate.py") from error
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f"{path} is no evaluation of this release ({FORMAT} {VERSION})")
    return Evaluation(label, folder, record)


@dataclass(frozen=True)
class Difference:
    """How far the predictions of two models on the same images are apart."""

    results: int
    other_class: int  #: results whose best class differs
    score: float  #: largest absolute difference of a score
    box: float  #: largest absolute difference of a box coordinate, pixels

    def text(self) -> str:
        """One sentence."""
        classes = "the same class everywhere" if not self.other_class else f"{self.other_class} with another class"
        return (
            f"{self.results} predictions compared: scores differ by at most {self.score:.1e}, boxes by at most "
            f"{self.box:.1e} pixels, {classes}"
        )


def compare_results(first: Evaluation, second: Evaluation, task: str = "detection") -> Difference:
    """Compare two result files query by query.

    Raises:
        ValueError: they are not about the same images.
    """
    pair = [orjson.loads((one.folder / results_name(task)).read_bytes()) for one in (first, second)]
    images = [[result["image_id"] for result in results] for results in pair]
    if images[0] != images[1]:
        raise ValueError(f"{first.folder} and {second.folder} evaluated other images, or in another order")
    rows = list(zip(*pair, strict=True))
    boxes = [abs(a - b) for one, other in rows for a, b in zip(one["bbox"], other["bbox"], strict=True)]
    return Difference(
        results=len(rows),
        other_class=sum(one["category_id"] != other["category_id"] for one, other in rows),
        score=max((abs(one["score"] - other["score"]) for one, other in rows), default=0.0),
        box=max(boxes, default=0.0),
    )


@dataclass(frozen=True)
class Report:
    """All that a report shows; sections without content are left out."""

    title: str
    introduction: Sequence[str]  #: paragraphs
    runs: Mapping[str, Path]  #: label -> run folder
    evaluations: Sequence[Evaluation]  #: before ... after: the difference shown is last - first
    merged: Evaluation | None = None  #: the last one again, with the adapter merged into the weights
    training: Sequence[Evaluation] = ()  #: the same models as `evaluations`, on images they were trained on
    task: str = "detection"
    files: Mapping[str, Path] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)  #: what it does -> text to paste
    seconds: Mapping[str, float] = field(default_factory=dict)  #: step -> its duration


def write_report(path: Path, report: Report) -> Path:
    """Write the page; returns its path.

    Raises:
        ValueError: a run or evaluation that is not there or not finished.
    """
    where = " on held-out images" if report.training else ""
    sections = [
        _header(report),
        _results(f"Results{where}", report.evaluations, report.merged, report.task),
        _results("Results on training images", report.training, None, report.task),
        _pictures(f"The same images, before and after{where and ', held out'}", report.evaluations, report.task),
        _pictures("The same images, before and after, trained on", report.training, report.task),
        _curves(report),
        _categories(report),
        _runs(report),
        _table("Seconds", {name: f"{value:.1f} s" for name, value in report.seconds.items()}),
        _table("Files", {name: str(file) for name, file in report.files.items()}, code=True),
        _commands(report),
    ]
    page = _PAGE.format(title=html.escape(report.title), style=_STYLE, body="\n".join(filter(None, sections)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def comparison(evaluations: Sequence[Evaluation], task: str = "detection") -> Picture | None:
    """One sheet: a row an image with its ground truth and the predictions of each evaluation; None without pictures."""
    rows = _panels(evaluations, task)
    if not rows:
        return None
    return grid([panel for row in rows.values() for panel in row], columns=1 + len(evaluations))


def _panels(evaluations: Sequence[Evaluation], task: str) -> dict[int, list[Picture]]:
    """Image id -> [ground truth, prediction of each evaluation], for the images that all evaluations drew."""
    drawn = [one.pictures(task) for one in evaluations]
    if not drawn:
        return {}
    shared = [image_id for image_id in drawn[0] if all(image_id in other for other in drawn)]
    halves = {image_id: [split_panels(pictures[image_id]) for pictures in drawn] for image_id in shared}
    return {image_id: [pairs[0][0], *(pair[1] for pair in pairs)] for image_id, pairs in halves.items()}


def _header(report: Report) -> str:
    cards = []
    for one in report.evaluations:
        cards.append((f"AP50 {one.label}", _number(one.metrics.get("box/AP50", math.nan))))
    if len(report.evaluations) > 1:
        change = _change(report.evaluations, "box/AP50")
        cards.append(("change of AP50", f"{change:+.3f}" if math.isfinite(change) else "–"))
    for one in report.training[-1:]:
        cards.append((f"AP50 {one.label}, training images", _number(one.metrics.get("box/AP50", math.nan))))
    shown = "".join(f"<div class=card><b>{html.escape(v)}</b><span>{html.escape(n)}</span></div>" for n, v in cards)
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in report.introduction)
    return f"<header><h1>{html.escape(report.title)}</h1>{paragraphs}<div class=cards>{shown}</div></header>"


def _results(title: str, evaluations: Sequence[Evaluation], merged: Evaluation | None, task: str) -> str:
    if not evaluations:
        return ""
    columns = [*evaluations, *([merged] if merged else [])]
    several = len(evaluations) > 1
    head = "".join(f"<th>{html.escape(one.label)}</th>" for one in columns) + ("<th>difference</th>" if several else "")
    rows = []
    for name in [name for name in evaluations[0].metrics if name.count("/") == 1]:
        cells = "".join(f"<td>{_number(one.metrics.get(name, math.nan))}</td>" for one in columns)
        if several:
            change = _change(evaluations, name)
            kind = "up" if change > 0 else "down" if change < 0 else ""
            cells += f'<td class="{kind}">{f"{change:+.4f}" if math.isfinite(change) else "–"}</td>'
        meaning = MEANINGS.get(name.partition("/")[2], "")
        rows.append(f"<tr><th>{html.escape(name)} <small>{html.escape(meaning)}</small></th>{cells}</tr>")
    data = evaluations[-1].record["data"]
    note = f"<p>Measured on {data['images']} images of {html.escape(data['where'])}.</p>"
    if several:
        first, last = evaluations[0].label, evaluations[-1].label
        note += f"<p>The difference is {html.escape(last)} − {html.escape(first)}.</p>"
    if merged:
        difference = compare_results(evaluations[-1], merged, task)
        label = html.escape(evaluations[-1].label)
        note += f"<p><b>Merged weights against the adapter ({label}).</b> {html.escape(difference.text())}.</p>"
    table = f"<table class=numbers><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return _section(title, table + note)


def _pictures(title: str, evaluations: Sequence[Evaluation], task: str) -> str:
    rows = _panels(evaluations, task)
    if not rows:
        return ""
    labels = ["ground truth", *(one.label for one in evaluations)]
    columns = f'style="grid-template-columns: repeat({len(labels)}, 1fr)"'
    cells = [f"<div class=label>{html.escape(label)}</div>" for label in labels]
    for image_id, panels in rows.items():
        cells += [
            f'<img src="{_embed(panel)}" alt="image {image_id}, {html.escape(label)}">'
            for label, panel in zip(labels, panels, strict=True)
        ]
    return _section(title, f"<div class=pictures {columns}>{''.join(cells)}</div>")


def _curves(report: Report) -> str:
    charts = []
    for label, folder in report.runs.items():
        path = folder / "metrics.jsonl"
        if not path.is_file():  # a run goes on without it when its disk is full
            continue
        records = [entry for entry in read_metrics(path) if "loss/loss" in entry]
        series: list[Series] = []
        tasks = sorted({name[5:] for entry in records for name in entry if name.startswith("loss/")} - {"loss"})
        for place, task in enumerate(task for task in tasks if "/" not in task):
            points = [(entry["step"], float(entry[f"loss/{task}"])) for entry in records if f"loss/{task}" in entry]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            colour = _COLOURS[place % len(_COLOURS)]
            series.append(Series(*thin(xs, ys), colour, faint=True))
            series.append(Series(*thin(xs, smooth(ys)), colour, name=f"{task}, smoothed"))
        charts.append(
            line_chart(series, title=f"{label}: training loss", x_label="optimiser step", y_label="weighted loss")
        )
    shown = "".join(f"<figure>{chart}</figure>" for chart in charts)
    return _section("Training curves", f"<div class=charts>{shown}</div>") if charts else ""


def _categories(report: Report) -> str:
    """Bars of the average precision of each category; of many, those that changed most."""
    if not report.evaluations:
        return ""
    first, last = report.evaluations[0].metrics, report.evaluations[-1].metrics
    names = [name for name in last if name.count("/") == 2 and name in first and min(first[name], last[name]) >= 0]
    total = len(names)
    names = sorted(names, key=lambda name: abs(last[name] - first[name]), reverse=True)[:_MOST_CATEGORIES]
    if not names:
        return ""
    rows = []
    for name in sorted(names, key=lambda name: last[name], reverse=True):
        bars = "".join(
            f'<div class=bar><i style="width:{90 * one.metrics[name]:.1f}%;background:{colour}"></i>'
            f"<span>{one.metrics[name]:.3f}</span></div>"
            for one, colour in zip(report.evaluations, _COLOURS, strict=False)
        )
        rows.append(f"<tr><th>{html.escape(name.split('/')[2])}</th><td>{bars}</td></tr>")
    legend = " ".join(
        f'<span class=key><i style="background:{colour}"></i>{html.escape(one.label)}</span>'
        for one, colour in zip(report.evaluations, _COLOURS, strict=False)
    )
    which = f"the {len(names)} of {total} categories that changed most" if len(names) < total else "every category"
    return _section(f"Average precision of {which}", f"<p>{legend}</p><table class=bars>{''.join(rows)}</table>")


def _runs(report: Report) -> str:
    if not report.runs:
        return ""
    records = {label: _run_record(folder) for label, folder in report.runs.items()}
    facts = {label: _run_facts(record) for label, record in records.items()}
    names = list(dict.fromkeys(name for one in facts.values() for name in one))
    head = "".join(f"<th>{html.escape(label)}</th>" for label in facts)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(one.get(name, '–'))}</td>" for one in facts.values())
        + "</tr>"
        for name in names
    )
    last = list(records.values())[-1]
    commit = (last.get("git") or {}).get("commit")
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    versions += f", commit {commit[:12]}" if commit else ""
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return _section("What was run", f"{table}<p class=faint>{html.escape(versions)}</p>")


def _run_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable run record: {error}") from error
    return record


def _run_facts(record: Mapping[str, Any]) -> dict[str, str]:
    config = record["config"]
    visft, optimizer, schedule = config["visft"], config["optimizer"], config["scheduler"]
    lora, model = visft["lora"], visft["model"]
    tasks = {name: task for name, task in visft["tasks"].items() if task}
    facts = {
        "backbone": f"{model['name']}, weights: {model['weights'] or 'random'}",
        "what trains": ", ".join(f"{group['name']} ({group['params']})" for group in visft["param_groups"]),
        "adapter": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {'+'.join(lora['targets'])}" if lora else "none",
        "tasks": ", ".join(f"{name}: {task['batch_size']} images a step" for name, task in tasks.items()),
        "steps": f"{schedule['params']['total_num_steps']}, {schedule['params']['warmup_num_steps']} of them warm-up",
        "optimiser": f"{optimizer['type']}, learning rate {optimizer['params']['lr']:g}, clipping "
        f"{config['gradient_clipping']:g}",
        "processes": f"{record['world_size']}, ZeRO-{config['zero_optimization']['stage']}",
        "precision": model["precision"],
        "data": f"{visft['data']['root']}, split {visft['data']['train']}",
        "seed": str(visft["seed"]),
        "started": record["started"],
    }
    return facts


def _commands(report: Report) -> str:
    if not report.commands:
        return ""
    shown = "".join(f"<p>{html.escape(n)}</p><pre>{html.escape(text)}</pre>" for n, text in report.commands.items())
    return _section("What to do next", shown)


def _table(title: str, rows: Mapping[str, str], *, code: bool = False) -> str:
    if not rows:
        return ""
    tag = "code" if code else "span"
    escaped = [(html.escape(name), html.escape(value)) for name, value in rows.items()]
    shown = "".join(f"<tr><th>{name}</th><td><{tag}>{value}</{tag}></td></tr>" for name, value in escaped)
    return _section(title, f"<table class=plain>{shown}</table>")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _change(evaluations: Sequence[Evaluation], name: str) -> float:
    values = [evaluations[place].metrics.get(name, math.nan) for place in (0, -1)]
    return values[1] - values[0] if min(values) >= 0 else math.nan


def _number(value: float) -> str:
    return f"{value:.4f}" if value >= 0 else "–"


def _embed(picture: Picture) -> str:
    buffer = io.BytesIO()
    # No subsampling of colour: it would blur the thin coloured frames.
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f6; color: #25272a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 60px; }
header, section { background: #fff; border: 1px solid #e3e4e6; border-radius: 10px;
  padding: 18px 24px; margin: 16px 0; }
h1 { font-size: 25px; margin: 4px 0 8px; } h2 { font-size: 18px; margin: 2px 0 12px; } p { margin: 8px 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #eceded; vertical-align: top; }
th { font-weight: 600; } thead th { color: #55585c; } td { overflow-wrap: anywhere; }
small, .faint { color: #74777b; font-weight: 400; font-size: 13px; } small { margin-left: 6px; }
.numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; }
.up { color: #1d7a33; } .down { color: #b3261e; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px; }
.card { background: #f4f7fb; border-radius: 8px; padding: 10px 18px; min-width: 150px; }
.card b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; } .card span { color: #55585c; }
.pictures { display: grid; gap: 8px; } .pictures img { width: 100%; display: block; border-radius: 4px; }
.label { font-weight: 600; color: #55585c; }
.charts { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; flex: 1 1 420px; }
figure svg { width: 100%; height: auto; }
.bars th { width: 130px; font-weight: 400; vertical-align: middle; }
.bar { display: flex; align-items: center; gap: 8px; height: 16px; }
.bar i { height: 11px; border-radius: 2px; min-width: 1px; }
.bar span { font-size: 12px; color: #55585c; font-variant-numeric: tabular-nums; }
.plain th { width: 260px; font-weight: 400; }
.key { margin-right: 18px; }
.key i { display: inline-block; width: 22px; height: 10px; border-radius: 2px; margin-right: 6px; }
pre { background: #f4f5f6; border-radius: 6px; padding: 10px 14px; overflow-x: auto; white-space: pre-wrap; }
code, pre { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { header, section { break-inside: avoid; border: 0; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
