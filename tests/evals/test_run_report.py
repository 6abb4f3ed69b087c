"""visft report: a page of any runs out of their folders, whatever they have recorded."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from visft_ds.config import resolve
from visft_ds.data.shards import Manifest
from visft_ds.evals import curves
from visft_ds.evals.curves import History, read_history, time_by_part, time_of_data
from visft_ds.evals.report_cli import main
from visft_ds.monitor.metrics import MetricsWriter, RunRecord
from visft_ds.tasks.pictures import draw_detections

OPTIONAL = {"images_per_second/detection": 20.0, "memory/peak_gib": 1.5, "mfu": 0.25}


def _run(folder: Path, *settings: str, seed: int = 0) -> Path:
    """A run of three steps, evaluated and drawn at its start and end."""
    schedule = [f"scheduler.params.{name}={steps}" for name, steps in (("total_num_steps", 3), ("warmup_num_steps", 1))]
    config = resolve(stage=2, model="debug", settings=[*schedule, *settings])
    RunRecord(config.to_dict(), 1, ["visft", "train", "--token", "hidden"]).write(folder)
    noise = np.random.default_rng(seed)
    pixels = noise.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    with MetricsWriter(folder) as writer:
        for step in range(4):
            if step:
                values = {"loss/loss": 4.0 / step, "loss/detection": 4.0 / step, "lr/lora": 1e-3, "gradient_norm": 1.0}
                speed = {"images_per_second": 16.0, "data_wait_seconds": 0.5, "data_seconds/read": 1.0 * step}
                writer.step(step, values | speed | OPTIONAL)
                writer.evaluation(step, {"box/AP50": 0.1 * step, "caption/CIDEr": 1.0})
            picture = draw_detections(pixels, [[2, 2, 9, 9]], ["star"], [[4, 4, 9, 9]], ["star"], [step / 4])
            writer.image(step, "detection/000000000007", picture)
        writer.save(3, {"save/stall_seconds": 0.25}, folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are their titles: matplotlib takes most of the time."""
    monkeypatch.setattr(curves, "line_chart", lambda series, *, title, **_: f"<svg>{title}: {len(series)}</svg>")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("runs") / "first")


def _page(*words: Path | str) -> str:
    assert main([str(word) for word in words]) == 0
    page = Path(words[-1]) if str(words[-1]).endswith(".html") else Path(words[0]) / "report.html"
    return page.read_text(encoding="utf-8")


def test_a_run_alone(run: Path) -> None:
    """With real charts."""
    text = _page(run)
    titles = re.findall("<h[23]>(.*?)</h[23]>", text)
    assert titles[:2] == ["Results", "Detection: the same images, before and after"]
    assert titles[2:7] == [
        "Training curves",
        *("Loss by task", "Evaluation during training", "Learning rate and gradient", "Speed and memory"),
    ]
    assert {"Where the time went", "What was run", "Environment"} <= set(titles)
    for chart in ("detection loss", "box/AP50", "learning rate", "gradient norm", "peak memory of the fullest device"):
        assert f'aria-label="{chart}"' in text, chart
    assert "first: stage 2 of debug, finished: 3 steps." in text and "not recorded" not in text
    labels = re.findall("<div class=label>(.*?)</div>", text)
    assert labels == ["ground truth", "step 0", "step 3"] and text.count("data:image/jpeg") == 3
    row = re.search(r"<tr class=main><th>box/AP50 .*?</tr>", text)
    assert row is not None and re.findall(r"<td[^>]*>([^<]*)", row[0]) == ["0.1000", "0.3000", "+0.2000"]
    assert "without intervals, so without colours: " in text and "hidden" not in text and "--token ***" in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)


def test_runs_side_by_side(run: Path, tmp_path: Path, undrawn: None) -> None:
    other = _run(tmp_path / "second", "visft.lora.rank=4", seed=1)
    text = _page(run, other, "--out", tmp_path / "new/both.html")
    assert "<svg>detection loss: 4</svg>" in text and "<svg>learning rate: 2</svg>" in text
    assert "<summary>1 settings differ" in text and "<th>visft.lora.rank</th>" in text
    assert re.findall("<div class=label>(.*?)</div>", text) == ["ground truth", "first", "second"]
    assert "The difference is second − first" in text


def test_runs_of_one_name_are_told_by_their_paths(run: Path, tmp_path: Path, undrawn: None) -> None:
    text = _page(run, _run(tmp_path / "first"), "--out", tmp_path / "both.html")
    assert f"<h1>Runs {run}, {tmp_path / 'first'}</h1>" in text


def test_a_group_that_stands_still_has_the_rate_zero(tmp_path: Path, undrawn: None) -> None:
    heads = '[{"name": "lora", "params": "backbone.*.lora_*"}, {"name": "heads", "params": "heads.*", "lr": 0}]'
    text = _page(_run(tmp_path / "run", f"visft.param_groups={heads}", "optimizer.params.lr=0.25"))
    assert "lora (backbone.*.lora_*, learning rate 0.25), heads (heads.*, learning rate 0)" in text


def test_what_is_cut_off_or_damaged_costs_no_page(run: Path, tmp_path: Path, undrawn: None) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    (events,) = (cut / "tensorboard").iterdir()
    whole = events.read_bytes()
    events.write_bytes(whole[: whole.rindex(b"IEND")])  # in the last picture
    text = _page(cut)
    assert "cut: 1 damaged lines of metrics.jsonl are left out." in text
    assert re.findall("<div class=label>(.*?)</div>", text)[1:] == ["step 0", "step 2"]
    events.write_bytes(whole.replace(b"IDAT", b"IDAX"))
    assert "There are no pictures: a picture in " in _page(cut)


def test_an_interval_where_the_images_are_here(tmp_path: Path, split: Manifest, undrawn: None) -> None:
    """And a change that it does not tell from zero has no colour."""
    (tmp_path / "shards").symlink_to(split.root)
    runs = []
    for name in ("before", "after"):
        run = _run(tmp_path / name, f"visft.data.root={split.root}", f"visft.data.val={split.split}")
        (run / "validation/step_00000003").mkdir(parents=True)
        results = [{"image_id": i, "caption": "a star"} for i in split.index["image_id"].tolist()]
        for task, entries in (("captioning", results), ("detection", [])):
            (run / f"validation/step_00000003/{task}_results.json").write_text(str(entries).replace("'", '"'))
        runs.append(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visft_ds.evals.jackknife.PARTS", 5)
        text = _page(*runs, "--out", tmp_path / "both.html")
    row = re.search(r"<th>caption/CIDEr .*?</tr>", text)
    assert row is not None and '<td class="">+0.0000 <small>+0.0000 to +0.0000</small></td>' in row[0]
    assert "coloured is what leaves zero out" in text
    assert "without colours: 12 images are too few, 20 are needed" in _page(*runs, "--out", tmp_path / "few.html")
    elsewhere = _run(tmp_path / "elsewhere", f"visft.data.root={tmp_path}/nowhere", f"visft.data.val={split.split}")
    assert "were not judged on the same images" in _page(elsewhere, runs[1], "--out", tmp_path / "other.html")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "there is no run in nowhere: nowhere/run.json does not exist"),
        (["run", "run/"], "run is given twice"),
        (["run", "--out", "run/run.json"], "--out run/run.json would be overwritten with a page"),
        (["run", "other"], "--out is needed for 2 runs"),
        (["broken"], "broken holds no readable run record"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other", "broken"):
        RunRecord(resolve(stage=2, model="debug").to_dict(), 1, []).write(name)
    Path("broken/run.json").write_text('{"config": ')
    assert main(words) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.rglob("*.html"))


def test_time_is_divided_and_pauses_are_not_counted() -> None:
    """Two starts; the second begins an hour later, with clocks at zero."""

    def step(number: int, time: float, read: float) -> dict[str, float]:
        speed = {"images_per_second": 16.0, "data_wait_seconds": 0.5, "data_seconds/read": read}
        return {"step": number, "loss/loss": 1.0, "loss/detection": 1.0, "time": time, **speed}

    steps = [step(1, 100, 1), step(2, 105, 3), step(3, 3705, 1), step(4, 3708, 2)]
    history = History(steps, [{"kind": "save", "step": 2, "save/stall_seconds": 0.25}])
    visft = {"mode": "turns", "tasks": {"detection": {"batch_size": 32}, "segmentation": None}}
    assert time_by_part(history, visft) == {
        "computing": 4 * (2 - 0.5),
        "waiting for data": 4 * 0.5,
        "standing still to save": 0.25,
        "evaluating, and the rest": (5 - 2) + (3 - 2) - 0.25,
    }
    assert time_of_data(history) == {"read": 3 + 2}
    assert time_by_part(History([{"step": 1, "loss/loss": 1.0}], []), visft) == {}


def test_a_diverged_run_has_no_division_of_time(run: Path) -> None:
    steps = [{**entry, "images_per_second": "nan"} for entry in read_history(run).steps]
    assert time_by_part(History(steps, []), resolve(stage=2, model="debug").to_dict()["visft"]) == {}


@pytest.mark.slow
def test_the_page_fits_into_narrow_and_wide_windows(tmp_path: Path) -> None:
    """At each width nothing makes the page wider than the window, and what is not in a part that scrolls lies in it.

    One start of the browser: a frame has the width that its page sees as the window's.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    runs = [_run(tmp_path / name) for name in ("a-run-with-a-rather-long-name-of-its-own", "second", "third")]
    pages = [_page(runs[0]), _page(*runs, "--out", tmp_path / "all.html")]
    widths = (360, 768, 1600)
    frames = [f'<iframe width={width} srcdoc="{html.escape(page)}"></iframe>' for page in pages for width in widths]
    script = """onload = () => { document.title = [...document.querySelectorAll("iframe")].map(frame => {
      const page = frame.contentDocument, room = page.documentElement.clientWidth
      const out = [...page.querySelectorAll("main *")].filter(one => !one.closest(".scroll > *, pre, svg *")
        && one.getBoundingClientRect().right > room + 0.5)
      return [frame.width - room, page.documentElement.scrollWidth - room, page.querySelectorAll("section").length,
              ...out.map(one => one.tagName)].join(" ") }).join("|") }"""
    (tmp_path / "frames.html").write_text(f"<!doctype html><title></title><script>{script}</script>{''.join(frames)}")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--virtual-time-budget=10000", "--dump-dom", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    found = title[1].split("|")
    assert len(found) == len(frames)
    for told in found:
        bar, beyond, sections, *out = told.split()
        assert 0 <= int(bar) <= 20 and int(beyond) <= 0 and int(sections) >= 5 and out == [], found
