"""report.html: complete, self-contained, honest about what is missing."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visft_ds.config import resolve
from visft_ds.evals.benchmarks.intervals import Interval
from visft_ds.evals.charts import MOST_POINTS, Series, line_chart, smooth, thin
from visft_ds.evals.compare import FORMAT, VERSION, Evaluation, compare_results, read_evaluation
from visft_ds.evals.report import Report, comparison, write_report
from visft_ds.monitor.metrics import MetricsWriter, RunRecord
from visft_ds.tasks.captioning.pictures import draw_caption
from visft_ds.tasks.pictures import draw_detections, save_png, split_panels
from visft_ds.tasks.segmentation.pictures import draw_masks

VOID = {"meta", "img", "path", "br", "use", "rect"}
METRICS = {
    **{"box/AP": 0.25, "box/AP50": 0.5, "box/APl": -1.0, "box/AP/star": 0.3, "box/AP/<ring>": 0.2},
    **{"mask/AP": 0.375, "mask/AP50": 0.75, "mask/AP/star": 0.4, "caption/CIDEr": 1.25, "caption/BLEU-4": 0.0},
}
TASKS = ("detection", "segmentation", "captioning")
#: A square of 4 x 4 in an image of 20 x 30 pixels, and the same one pixel lower, run by run down the columns.
SQUARE = [42, 4, 16, 4, 16, 4, 16, 4, 494]
LOWER = [43, 4, 16, 4, 16, 4, 16, 4, 493]


class _Page(HTMLParser):
    """Open tags must be closed in order; collects what a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in VOID


def _evaluation(
    folder: Path,
    label: str,
    metrics: dict[str, float],
    *,
    shift: float = 0.0,
    images: tuple[int, ...] = (1, 2),
    mask: list[int] | None = None,
    caption: str = "a star",
) -> Evaluation:
    """A folder as tools/evaluate.py writes it, one result of each task and image."""
    box = {"category_id": 1, "bbox": [1.0, 2.0 + shift, 3.0, 4.0], "score": 0.5 + shift / 10}
    square = {"size": [20, 30], "counts": mask or SQUARE}
    results = {
        "detection": [{"image_id": image, **box} for image in images],
        "segmentation": [{"image_id": image, **box, "segmentation": square} for image in images],
        "captioning": [{"image_id": image, "caption": caption} for image in images],
    }
    pictures: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    pixels = np.full((20, 30, 3), 100, dtype=np.uint8)
    area = np.zeros((20, 30), dtype=bool)
    area[2:9, 2:9] = True
    for image in images:
        drawn = {
            "detection": draw_detections(pixels + image, [[2, 2, 9, 9]], ["star"], [[4, 4, 9, 9]], ["star"], [0.9]),
            "segmentation": draw_masks(pixels, [area], ["star"], [area], ["star"], [0.9]),
            "captioning": draw_caption(pixels, ["A star."], caption, caption.split(), np.full((2, 4, 4), 1 / 16)),
        }
        for task, picture in drawn.items():
            save_png(picture, folder / f"pictures/{task}-{image}.png")
            pictures[task].append({"image_id": image, "file": f"pictures/{task}-{image}.png"})
    record = {
        "format": FORMAT,
        "version": VERSION,
        "metrics": metrics,
        "data": {"where": "shards/val", "images": len(images)},
        "pictures": pictures,
        **({"caption_tokenizer": "rules-7"} if "caption/CIDEr" in metrics else {}),
    }
    folder.mkdir(exist_ok=True)
    for task, entries in results.items():
        (folder / f"{task}_results.json").write_text(json.dumps(entries))
    (folder / "metrics.json").write_text(json.dumps(record))
    return read_evaluation(label, folder)


def _run(folder: Path, stage: int, losses: list[float]) -> Path:
    RunRecord(resolve(stage=stage, model="debug").to_dict(), 2, ["train.py"]).write(folder)
    with MetricsWriter(folder) as writer:
        for step, loss in enumerate(losses, 1):
            values = {"loss/loss": 3 * loss, "loss/detection/ce": loss / 2}
            writer.step(step, values | {f"loss/{task}": loss for task in TASKS[: 3 if stage == 1 else 1 + step % 3]})
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("report")
    after = {name: value + 0.125 for name, value in METRICS.items() if value >= 0} | {"box/APl": -1.0}
    return Report(
        title="A <b>bold</b> title",
        introduction=["What & why."],
        runs={f"stage {n}": _run(folder / f"stage{n}", n, [30.0 / n / (1 + s) for s in range(40)]) for n in (1, 2)},
        evaluations=[
            _evaluation(folder / "before", "after stage 1", METRICS),
            _evaluation(folder / "after", "after stage 2", after, shift=0.5),
        ],
        merged=_evaluation(folder / "merged", "merged", after, shift=0.5000001),
        files={"adapter": Path("out/adapter")},
        commands={"Train on": "deepspeed --num_gpus 8 launchers/train.py --stage 2 > log"},
        seconds={"stage 1": 12.25},
    )


@pytest.fixture(scope="module")
def text(report: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page."""
    return write_report(tmp_path_factory.mktemp("page") / "new/report.html", report).read_text(encoding="utf-8")


def test_everything_is_on_the_page(text: str) -> None:
    page = _Page(text)
    assert page.open == []
    assert "A &lt;b&gt;bold&lt;/b&gt; title" in text and "<b>bold" not in text and "&lt;ring&gt;" in text
    wanted = {
        "box/AP50": ["0.5000", "0.6250", "+0.1250", "0.6250"],  # before, after, difference, merged
        "box/APl": ["–"] * 4,
        "mask/AP50": ["0.7500", "0.8750", "+0.1250", "0.8750"],
        "caption/CIDEr": ["1.2500", "1.3750", "+0.1250", "1.3750"],
        "caption/BLEU-4": ["0.0000", "0.1250", "+0.1250", "0.1250"],
    }
    for name, cells in wanted.items():
        row = re.search(rf"<th>{name} .*?</tr>", text)
        assert row is not None and re.findall(r"<td[^>]*>([^<]*)</td>", row[0]) == cells
    assert "cut into words by <code>rules-7</code>" in text
    assert "scores differ by at most 1.0e-08" in text and "2 captions compared: 2 are the same" in text
    assert "2 masks compared" in text and "0 of 1200 pixels are not the same" in text
    assert text.count("<svg") == 3 and 'aria-label="captioning loss"' in text  # of both runs
    assert len(re.findall(r"<h3>(?:box|mask) AP of every category</h3>", text)) == 2
    for task in ("Detection", "Segmentation", "Captioning"):
        assert f"<h2>{task}: the same images, before and after</h2>" in text
    lora = resolve(stage=2, model="debug").visft.lora
    assert lora is not None
    rank = f"rank {lora.rank}, alpha {lora.alpha:g}, on q+v"
    assert "images for all of detection, segmentation, captioning" in text  # stage 1 learns from shared images
    assert "one task: detection in 30 % of the steps" in text
    for told in (
        "out/adapter",
        "--stage 2 &gt; log",
        "12.2 s",
        "<th>deepspeed</th>",
        rank,
        "Measured on 2 images",
        "settings differ",
    ):
        assert told in text, told


def test_only_what_its_interval_tells_from_zero_has_a_colour(tmp_path: Path) -> None:
    pair = [_evaluation(tmp_path / name, name, METRICS, images=()) for name in ("before", "after")]
    pair[1].record["metrics"] = {name: value + 0.125 for name, value in METRICS.items() if value >= 0}
    known = {"box/AP50": Interval(0.125, 0.1, 0.15), "box/AP": Interval(0.125, -0.01, 0.26)}
    known["mask/AP"] = Interval(-0.125, -0.15, -0.1)
    pair[1].record["metrics"]["mask/AP"] = METRICS["mask/AP"] - 0.125
    text = write_report(tmp_path / "report.html", Report("t", [], {}, pair, changes=known)).read_text(encoding="utf-8")
    found = re.findall(r'<th>(\S+) .*<td class="(.*?)">([^<]*?)(?: <small>(.*?)</small>)?</td></tr>', text)
    cells = {name: rest for name, *rest in found}
    assert cells["box/AP50"] == ["up", "+0.1250", "+0.1000 to +0.1500"]
    assert cells["box/AP"] == ["", "+0.1250", "-0.0100 to +0.2600"]
    assert cells["mask/AP"] == ["down", "-0.1250", "-0.1500 to -0.1000"]
    assert cells["mask/AP50"] == ["", "+0.1250", ""]
    assert "before: 0.500 (+0.125, +0.100 to +0.150)" in text


def test_names_and_captions_of_the_data_cannot_become_code(report: Report, tmp_path: Path) -> None:
    bad = "a <script>alert('x')"
    first, second = (
        _evaluation(tmp_path / name, bad, {**METRICS, f"box/AP/{bad}": 0.5}, caption=caption)
        for name, caption in {"first": "a star", "second": bad}.items()
    )
    second.record["data"]["where"] = second.record["caption_tokenizer"] = bad
    runs, merged, texts = {bad: report.runs["stage 2"]}, replace(first, label=bad), {bad: bad}
    everywhere = Report(bad, [bad], runs, [first, second], merged, [first], {bad: Path(bad)}, texts, {bad: 1.0})
    text = write_report(tmp_path / "report.html", everywhere).read_text(encoding="utf-8")
    assert "<script" not in text and _Page(text).open == [] and text.count("a &lt;script&gt;alert(&#39;x") > 30


def test_the_page_needs_no_network_and_no_other_file(report: Report, text: str) -> None:
    loads = _Page(text).loads
    assert len(loads) == 3 * 2 * 3 and all(load.startswith("data:image/jpeg;base64,") for load in loads)
    assert re.findall(r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink))|url\((?!#)", text) == []
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(loads[0].split(",")[1]))))
    truth, _ = split_panels(report.evaluations[0].pictures("detection")[1])
    # JPEG of flat colours with thin lines: a wrong panel would be off by far more
    assert picture.shape == truth.shape and np.abs(picture.astype(int) - truth.astype(int)).mean() < 4


def test_pictures_are_compared_image_by_image(report: Report, tmp_path: Path) -> None:
    """One row an image that all evaluations drew; the ground truth stands there once."""
    other = _evaluation(tmp_path / "fewer", "fewer", METRICS, images=(2,))
    one, both = comparison([report.evaluations[0], other]), comparison(report.evaluations)
    assert one is not None and both is not None
    assert one.shape[1] == both.shape[1] and one.shape[0] < both.shape[0]
    assert comparison([]) is None
    assert comparison([_evaluation(tmp_path / "bare", "bare", METRICS, images=())]) is None


def test_the_sheet_holds_so_many_rows_of_every_task(report: Report) -> None:
    sheets = [comparison(report.evaluations, rows=rows) for rows in (1, 2)]
    assert sheets[0] is not None and sheets[1] is not None
    panels = [split_panels(report.evaluations[0].pictures(task)[1])[0].shape[0] for task in TASKS]
    assert sheets[1].shape[0] - sheets[0].shape[0] >= sum(panels)
    assert sheets[0].shape[1] == sheets[1].shape[1]


def test_sections_without_content_are_left_out(tmp_path: Path) -> None:
    only = _evaluation(tmp_path / "only", "now", {"box/AP": 0.5}, images=())
    text = write_report(tmp_path / "report.html", Report("t", [], {}, [only])).read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text) == ["Results"] and "difference" not in text
    assert _Page(text).open == []


def test_pictures_of_one_model_are_not_called_before_and_after(tmp_path: Path) -> None:
    only = _evaluation(tmp_path / "only", "now", METRICS)
    text = write_report(tmp_path / "report.html", Report("t", [], {}, [only])).read_text(encoding="utf-8")
    assert "<h2>Detection: the same images, side by side</h2>" in text and "before and after" not in text


def test_training_images_are_kept_apart(report: Report, tmp_path: Path) -> None:
    trained = [_evaluation(tmp_path / "trained", "after stage 1", {"box/AP": 0.875})]
    text = write_report(tmp_path / "report.html", replace(report, training=trained)).read_text(encoding="utf-8")
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:2] == ["Results on held-out images", "Results on training images"]
    assert "0.8750" in text.split("Results on training images")[1].split("</section>")[0]
    assert len(_Page(text).loads) == 3 * (2 * 3 + 2 * 2)
    assert titles[2:4] == [
        f"Detection: the same images, before and after{end}" for end in (", held out", ", trained on")
    ]


def test_many_categories_show_those_that_changed(tmp_path: Path) -> None:
    before = {f"box/AP/thing {n}": 0.5 for n in range(80)}
    after = {name: 0.5 + 0.005 * n for n, name in enumerate(before)}
    pair = [_evaluation(tmp_path / name, name, m, images=()) for name, m in (("before", before), ("after", after))]
    text = write_report(tmp_path / "report.html", Report("t", [], {}, pair)).read_text(encoding="utf-8")
    assert "the 20 of 80 categories that changed most" in text
    assert "thing 79<" in text and "thing 60<" in text and "thing 59<" not in text


def test_a_diverged_run_is_shown_as_such(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 1, [3.0, math.nan, 2.0, math.inf])
    text = write_report(tmp_path / "report.html", Report("t", [], {"run": run}, [])).read_text(encoding="utf-8")
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S) and "<svg" in text


def test_results_are_compared_query_by_query(tmp_path: Path) -> None:
    first = _evaluation(tmp_path / "first", "first", METRICS)
    other = _evaluation(tmp_path / "second", "second", METRICS, shift=0.25, mask=LOWER, caption="a <bar>")
    difference = compare_results(first, other)
    assert (difference.results, difference.other_class) == (2, 0)
    assert difference.box == 0.25 and difference.score == pytest.approx(0.025)
    masks = compare_results(first, other, "segmentation")
    # a row of 4 pixels is left and another one won, in each of two images of 600
    assert (masks.pixels, masks.other_pixels) == (1200, 16) and masks.score == difference.score
    assert "16 of 1200 pixels are not the same, the same class everywhere" in masks.text()
    captions = compare_results(first, other, "captioning")
    assert captions.text() == "2 captions compared: 0 are the same, 'a star' became 'a <bar>'"
    third = _evaluation(tmp_path / "third", "third", METRICS, images=(1, 3))
    for task in TASKS:
        with pytest.raises(ValueError, match="evaluated other images"):
            compare_results(first, third, task)


def test_a_task_that_was_not_evaluated_is_not_mentioned(tmp_path: Path) -> None:
    """A COCO tree without captions."""
    boxes = {name: value for name, value in METRICS.items() if not name.startswith("caption/")}
    pair = [_evaluation(tmp_path / name, name, boxes) for name in ("before", "after")]
    text = write_report(tmp_path / "report.html", Report("t", [], {}, pair, pair[1])).read_text(encoding="utf-8")
    assert "aption" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S) and "mask AP50" in text


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing holds no finished evaluation.*visft evaluate"):
        read_evaluation("x", tmp_path / "nothing")
    (tmp_path / "metrics.json").write_text('{"format": "something else"}')
    with pytest.raises(ValueError, match="no evaluation of this release"):
        read_evaluation("x", tmp_path)
    with pytest.raises(ValueError, match="there is no run in"):
        write_report(tmp_path / "report.html", Report("t", [], {"run": tmp_path}, []))
    assert not (tmp_path / "report.html").exists()


def _chart(xs: list[float], ys: list[float]) -> tuple[str, list[list[tuple[float, float]]]]:
    """A chart, and the points of its line, unbroken run by run, from the lower left."""
    series = [Series(xs, ys, "#123456", name="a & $b$ <c>")]
    text, again = (line_chart(series, title="t", x_label="x", y_label="y") for _ in range(2))
    assert text == again and text.startswith("<svg ") and "a &amp; $b$ &lt;c&gt;" in text and "nan" not in text
    path = re.search(r'<path d="M([^"]*)" clip-path="[^"]*" style="fill: none; stroke: #123456', text)
    runs = path[1].split("M") if path else []
    return text, [[(float(x), -float(y)) for x, y in re.findall(r"(\S+) (\S+) \n", run)] for run in runs]


@pytest.mark.parametrize(("ys", "share"), [([10.0, 6.0, 2.5], 4 / 7.5), ([100.0, 10.0, 1.0], 0.5)])
def test_chart_places_points_between_its_axes(ys: list[float], share: float) -> None:
    """Where the middle value lies between the others; on a wide chart by its logarithm."""
    text, [[first, middle, last]] = _chart([0, 50, 100], ys)
    assert first[0] < last[0] and middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.01)
    assert (first[1] - middle[1]) / (first[1] - last[1]) == pytest.approx(share, abs=1e-3) and ">100</text>" in text


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_chart_has_gaps_where_values_are_missing(missing: float) -> None:
    assert [len(line) for line in _chart([0, 1, 2, 3, 4, 5], [5, 4, missing, 3, 2, 1])[1]] == [2, 3]
    dots = re.findall(r'<use [^>]*style="fill: #123456', _chart([0, 1, 2], [100, missing, 1])[0])
    assert len(dots) == 3, "lone points, and the one in the legend"
    assert "no finite values" in _chart([1], [missing])[0]


def test_smoothing_follows_without_lag_at_the_start() -> None:
    assert smooth([4.0, 4.0, 4.0]) == [4.0, 4.0, 4.0]
    assert smooth([8.0, 0.0] + [0.0] * 998)[1] == 4.0  # the mean of both, not a tenth of the way
    gap = smooth([1.0, math.nan, 1.0])
    assert math.isnan(gap[1]) and gap[2] == 1.0
    noisy = [math.sin(1e3 * n) for n in range(3000)]
    assert np.std(smooth(noisy)[50:]) < 0.5 * np.std(noisy)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 150_000])
def test_long_lines_are_thinned_and_keep_their_end(count: int) -> None:
    xs, ys = thin(list(range(count)), [float(n) for n in range(count)])
    assert xs[-1:] == list(range(count))[-1:] and len(xs) == len(ys) <= 2 * MOST_POINTS
    assert len(xs) == count or len(xs) >= MOST_POINTS
