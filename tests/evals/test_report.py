"""visft report: a page of any runs out of their folders; complete, self-contained, escaped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from visft_ds.config import resolve
from visft_ds.data.shards import Manifest
from visft_ds.evals import report as pages
from visft_ds.evals.cli import report
from visft_ds.evals.pages import Series, line_chart
from visft_ds.evals.records import FORMAT, VERSION
from visft_ds.monitor.metrics import MetricsWriter
from visft_ds.run.record import write_run
from visft_ds.tasks.pictures import save_picture, side_by_side

METRICS = {"box/AP": 0.25, "box/AP50": 0.5, "box/APl": -1.0, "box/AP/star": 0.3, "caption/CIDEr": 1.25}


def _run(folder: Path, *settings: str) -> Path:
    """A run of three steps, evaluated at its start and its end."""
    schedule = [
        f"scheduler.params.{name}={steps}"
        for name, steps in (("total_num_steps", 3), ("warmup_num_steps", 1))
    ]
    config = resolve(stage=2, model="debug", settings=[*schedule, *settings])
    write_run(folder, config.to_dict(), 1, ["visft", "train", "--stage", "2"])
    with MetricsWriter(folder) as writer:
        for step in range(4):
            if step:
                values = {
                    "loss/loss": 4.0 / step,
                    "loss/detection": 4.0 / step,
                    "lr/lora": 1e-3,
                    "grad_norm": math.inf if step == 2 else 1.0,  # fp16 overflowed
                }
                writer.step(step, values | {"images_per_second": 16.0, "memory/peak_gib": 1.5})
            if step in (0, 3):
                writer.evaluation(step, {"box/AP50": 0.1 * step, "caption/CIDEr": 1.0})
    return folder


def _evaluate(run: Path, more: float = 0.0, images: tuple[int, ...] = (1, 2), total: int = 2) -> None:
    """RUN/evaluation-val as visft evaluate writes it."""
    folder = run / f"evaluation-{resolve(stage=2, model='debug').visft.data.val}"
    drawings = []
    for image in images:
        pixels = np.full((20, 30, 3), 100 + image, dtype=np.uint8)
        drawn = side_by_side((pixels, "ground truth: 1"), (pixels // 2, "predicted: 1"))
        save_picture(drawn, folder / f"visualizations/detection-{image}.jpg")
        drawings.append({"image_id": image, "file": f"visualizations/detection-{image}.jpg"})
    record = {
        "format": FORMAT,
        "version": VERSION,
        "metrics": {name: value + more if value >= 0 else value for name, value in METRICS.items()},
        "data": {"where": "shards/<val>", "images": len(images), "total": total},
        "visualizations": {"detection": drawings},
    }
    (folder / "metrics.json").write_text(json.dumps(record))


def _page(*words: Path | str) -> str:
    """The page, which loads nothing."""
    assert report([str(word) for word in words]) == 0
    path = Path(words[-1]) if str(words[-1]).endswith(".html") else Path(words[0]) / "report.html"
    text = path.read_text(encoding="utf-8")
    assert all(
        load.startswith("data:image/jpeg;base64,") for load in re.findall(r' (?:src|href)="([^"#]+)', text)
    )
    assert not re.search(r"https?://(?!www\.w3\.org/)|url\((?!#)|<script", text)
    return text


def _cells(text: str, name: str) -> list[str]:
    row = re.search(rf"<th>{name} .*?</tr>", text, re.S)
    assert row is not None
    return re.findall(r"<td>([^<]*)<small>([^<]*)</small>", row[0])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are their titles: matplotlib takes most of the time."""
    monkeypatch.setattr(
        pages, "line_chart", lambda series, *, title, **_: f"<svg>{title}: {len(series)}</svg>"
    )


def test_a_run_alone(tmp_path: Path, split: Manifest) -> None:
    """With real charts; numbers of a part of the images say so."""
    data = (f"visft.data.root={split.root}", f"visft.data.val={split.split}", "visft.run.eval_limit=5")
    text = _page(_run(tmp_path / "run", *data))
    for chart in (
        "detection loss",
        "box/AP50",
        "learning rate",
        "gradient norm",
        "peak memory of the fullest device",
    ):
        assert f'aria-label="{chart}"' in text, chart
    assert "run: stage 2 of debug, finished: 3 steps." in text
    assert _cells(text, "box/AP50") == [("0.0000", ""), ("0.3000", "+0.3000")]
    assert "5 of 12 images" in text and "5 images" in _page(_run(tmp_path / "away", "visft.run.eval_limit=5"))


def test_each_run_is_compared_with_the_first(tmp_path: Path, undrawn: None) -> None:
    runs = [
        _run(tmp_path / name, f"visft.lora.rank={rank}") for name, rank in (("a", 4), ("b", 8), ("<c>", 8))
    ]
    for index, run in enumerate(runs):
        _evaluate(run, (0.0, 0.125, -1e-6)[index], total=200)
    text = _page(*runs, "--out", tmp_path / "new/all.html")
    assert _cells(text, "box/AP50") == [("0.5000", ""), ("0.6250", "+0.1250"), ("0.5000", "+0.0000")]
    assert _cells(text, "box/APl") == [("–", ""), ("–", "–"), ("–", "–")]
    assert "2 of 200 images" in text and "Evaluated on shards/&lt;val&gt;." in text
    assert (
        "<svg>detection loss: 3</svg>" in text and "1 settings differ" in text and "visft.lora.rank" in text
    )
    assert re.findall("<div class=label>(.*?)</div>", text) == ["ground truth", "a", "b", "&lt;c&gt;"]
    assert text.count("data:image/jpeg") == 2 * 4


def test_what_was_judged_stands_on_the_page(tmp_path: Path, undrawn: None) -> None:
    rows = [
        {
            "name": f"segmentation/b {name}",
            "items": 9,
            "lower": False,
            "values": {"before": 0.5, "after": 0.5 + by},
        }
        | {
            "differences": {
                "after": {
                    "value": by,
                    "low": by - 0.02,
                    "high": by + 0.02,
                    "better": False,
                    "worse": worse,
                    "shown": worse,
                }
            }
        }
        for name, by, worse in (("in-context mIoU", 0.004, False), ("linear mIoU", -0.03, True))
    ]
    record = {
        "format": "visft_ds judge 3",
        "variants": {"before": [], "after": []},
        "rows": rows,
        "primary": rows[0]["name"],
    }
    record["verdicts"] = [{"variant": "after", "word": "not shown", "sentences": ["One.", "Two."]}]
    (tmp_path / "table").mkdir()
    (tmp_path / "table/judge.json").write_text(json.dumps(record))
    text = _page("--run", _run(tmp_path / "run"), "--judge", tmp_path / "table", "--out", tmp_path / "r.html")
    assert (
        '<small class="">+0.40 [-1.60, +2.40]<' in text
        and '<small class="down">-3.00 [-5.00, -1.00] *<' in text
    )
    assert "after: not shown.</b> One. Two." in text
    for damaged in ({"rows": 3}, {**record, "rows": [{}]}):
        (tmp_path / "table/judge.json").write_text(json.dumps(damaged))
        assert report([str(tmp_path / "run"), "--judge", str(tmp_path / "table")]) == 2


def test_a_chart_is_the_same_bytes_every_time() -> None:
    """With names escaped, and values of a wide range on a logarithmic axis."""
    series = [Series([0, 2], [100.0, 1.0], "a & $b$ <c>")]
    text, again = (line_chart(series, title="t", y_label="y") for _ in range(2))
    assert (
        text == again
        and text.startswith("<svg ")
        and "a &amp; $b$ &lt;c&gt;" in text
        and ">50</text>" in text
    )
