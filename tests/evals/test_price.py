"""Gain against price: the knee by hand, and the command from a sweep to the merge that it names."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.evals.test_benchmarks import _record, _run, world
from tests.evals.test_retention import NAME, net
from visft_ds.evals.benchmarks.arms import Contender
from visft_ds.evals.benchmarks.intervals import Interval
from visft_ds.evals.benchmarks.models import ModelSpec
from visft_ds.evals.benchmarks.price import Point, knee_lines, knees, losses_section, points_of, price_section
from visft_ds.evals.benchmarks.run import Dose
from visft_ds.evals.benchmarks.table import Row, section
from visft_ds.interop.cli import main as merge

__all__ = ["net", "world"]  # fixtures


def _points(curve: list[tuple[float, float, float]], sweep: str | None = "s", least: float = 0.5) -> list[Point]:
    """Of (scale, gain, loss); gains below `least` are not shown."""
    return [
        Point(
            Contender(f"s@{scale}", (ModelSpec("s", "visft_ds", "base.pt", None, Path("a b")),), sweep, scale),
            Interval(gain, gain - least, gain + least),
            gain > least,
            Interval(loss, loss - 1, loss + 1),
        )
        for scale, gain, loss in curve
    ]


def test_the_knee_by_hand() -> None:
    """Science's numbers: heights 0.36, 0.38 and 0; then a free gain, a null result and a loss of nothing but gain."""
    found = knees(_points([(0.5, 4.5, 0.4), (1.0, 6.2, 0.9), (2.0, 9.2, 3.1)]))["s"]
    assert found is not None and found.arm.scale == 1.0
    found = knees(_points([(0.5, 4.5, 0.4), (1.0, 5.0, 0.9), (2.0, 5.5, 3.1)]))["s"]
    assert found is not None and found.arm.scale == 0.5
    free = knees(_points([(0.5, 4.0, -0.1), (1.0, 6.0, 0.0), (2.0, 5.0, -0.3)]))["s"]
    assert free is not None and free.arm.scale == 1.0  # nothing is lost: the largest gain
    assert knees(_points([(0.5, 0.3, 0.1), (1.0, 0.4, 0.5)])) == {"s": None}
    assert knees(_points([(1.0, -3.0, 1.0)])) == {"s": None} and knees(_points([(1.0, 3.0, 1.0)], None)) == {}
    lines = knee_lines(knees(_points([(0.5, 4.5, 0.4)])) | {"t": None})
    assert lines[1] == ("merge", "visft merge --base base.pt --adapter 'a b' --scale 0.5 --out merged.safetensors")
    assert lines[2] == ("t", "no knee: the gain is not shown at any scale")


def test_dose_gain_and_price_are_columns() -> None:
    """Prices are losses; doses of seeds are averaged, of the benchmark that the gain is of."""
    models = tuple(ModelSpec(f"new {seed}", "visft_ds", "x") for seed in (1, 2))
    arms = [Contender("base", (ModelSpec("base", "visft_ds", "x"),)), Contender("new", models)]
    gain, price = (
        Row(name, 5, {}, {"new": Interval(value, value - 0.01, value + 0.03)}, {}, {})
        for name, value in (("dense/b knn", 0.05), ("retention/x answers kept", -0.02))
    )
    doses = {
        f"new {seed}": {"probe/a": Dose("pooled", 9, 0.1), "dense/b": Dose("patches", 0.1 * seed, 1 - 0.1 * seed)}
        for seed in (1, 2)
    }
    told = price_section(arms, doses, gain, [price])
    assert told is not None and told.rows == [["new", "0.15", "0.85", "+5.00 [+4.00, +8.00] *", "-2.00 [-3.00, +1.00]"]]
    assert told.columns[3:] == ["gain: dense/b knn", "price: retention/x answers kept"]
    assert price_section(arms, {}, None, []) is None
    (point,) = points_of(arms, gain, price)
    assert (point.loss.value, point.loss.low, point.loss.high) == pytest.approx((0.02, -0.01, 0.03))
    many = section([gain], ["base", "a", "b", "c", "new"])
    assert [line[2] for line in many.rows] == ["base", "a", "b", "c", "new"] and many.rows[-1][4].endswith("*")


def test_trained_losses_of_a_run_are_told_once(tmp_path: Path) -> None:
    """First and last tenth of the steps that a task had; a sweep has many models of one run."""
    steps = [{"step": step, "loss/loss": 0.0, "loss/captioning": float(step)} for step in range(1, 31)]
    steps += [{"step": 31, "loss/loss": 0.0, "loss/detection": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"kind": "step", **step}) + "\n" for step in steps))
    models = tuple(ModelSpec(f"new@{scale}", "visft_ds", "x", trained=tmp_path) for scale in (1, 2))
    told = losses_section([Contender("base", (ModelSpec("base", "visft_ds", "x"),)), Contender("new", models)])
    assert told is not None
    assert told.rows == [[str(tmp_path), "detection", "7", "7"], [str(tmp_path), "captioning", "2", "29"]]
    assert losses_section([Contender("base", (ModelSpec("base", "visft_ds", "x"),))]) is None


def test_a_sweep_ends_in_the_merge_to_type(world: Path, net: Path, tmp_path: Path) -> None:
    model = f"own={net}/base.safetensors+{net}/adapter@0:1:0.5"
    command = ["--model", f"base=timm:{NAME}:{net}/base.safetensors", "--model", model]
    command += ["--benchmark", f"retention={net}/pictures", "--benchmark", f"probe={world}/shapes", "--out", tmp_path]
    assert "no such number" in _run(*command, "--price", "probe/shapes kmm")[2]
    status, said, errors = _run(*command, "--primary", "probe/shapes knn")
    assert status == 0, errors
    record = _record(tmp_path)
    assert record["price"] == ["retention/pictures answers kept"] and record["knees"].keys() == {"own"}
    assert "gain: probe/shapes knn" in said and "knees of the sweeps" in said
    svg = (tmp_path / "gain.svg").read_text()
    assert "lost: retention/pictures answers kept" in svg and "@0.5" in svg


def test_the_merge_of_a_knee_runs_as_printed(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec("own", "visft_ds", str(net / "base.safetensors"), None, net / "adapter")
    gain: Any = Interval(0.1, 0.05, 0.2)
    line = knee_lines({"own": Point(Contender("own@0.5", (spec,), "own", 0.5), gain, True, gain)})[1][1]
    monkeypatch.chdir(tmp_path)
    assert merge(shlex.split(line)[2:]) == 0 and (tmp_path / "merged.safetensors").is_file()
