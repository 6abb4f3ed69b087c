"""Intervals over seeds and items, and decisions about many numbers: against plain loops and known cases."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.evals.test_judge import _record, _run, world
from visft_ds.evals.judge.intervals import holm, over_both, over_seeds, two_sided
from visft_ds.evals.judge.models import parse_arms
from visft_ds.evals.judge.protocol import Score
from visft_ds.evals.judge.table import rows_of, section, verdict

__all__ = ["world"]  # the fixture
ARMS = {"base": ["base"], "new": ["new 1", "new 2", "new 3"]}


def test_several_seeds_against_plain_loops() -> None:
    """Items by plain resampling of whole groups, seeds by scipy's t; both together as sums of independent draws."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 3)
    base = (rng.random(120) < 0.5).astype(np.float64)
    news = [np.where(rng.random(120) < 0.1 + 0.1 * seed, 1.0, base) for seed in range(3)]
    labels = [label for of in ARMS.values() for label in of]
    results = {label: {"a": Score("a", of, groups)} for label, of in zip(labels, (base, *news), strict=True)}
    (row,) = rows_of(results, ARMS)
    each = [float((new - base).mean()) for new in news]
    of = row.seeds["new"]
    assert of.each == pytest.approx(each) and row.differences["new"].value == pytest.approx(np.mean(each))
    low, high = stats.t.interval(0.95, 2, loc=np.mean(each), scale=stats.sem(each))
    assert (of.seeds.low, of.seeds.high) == pytest.approx((low, high))
    items, both = [], []
    changes = np.mean([new - base for new in news], axis=0).reshape(40, 3)
    error = stats.sem(each)
    for _ in range(8000):
        mean = changes[rng.integers(0, 40, 40)].mean()
        items.append(mean)
        both.append(mean + error * rng.standard_t(2))
    for found, plain in ((of.items, items), (row.differences["new"], both)):
        width = float(np.subtract(*np.quantile(plain, [0.975, 0.025])))
        assert found.high - found.low == pytest.approx(width, rel=0.1)
    assert row.differences["new"].high - row.differences["new"].low > max(high - low, of.items.high - of.items.low)


def test_seeds_are_paired_with_those_of_the_first_arm() -> None:
    """What two trainings of one seed share is no difference between recipes."""
    rng = np.random.default_rng(0)
    shared = [rng.random(50) + 0.3 * seed for seed in range(2)]
    pairs = {"a": ["a 1", "a 2"], "b": ["b 1", "b 2"]}
    results = {f"{arm} {seed + 1}": {"n": Score("n", shared[seed] + (arm == "b"))} for arm in "ab" for seed in (0, 1)}
    (row,) = rows_of(results, pairs)
    assert row.seeds["b"].each == pytest.approx((1, 1)) and row.p["b"] < 0.001
    (row,) = rows_of(results, {"a": ["a 1"], "b": ["b 1", "b 2"]})
    assert row.seeds["b"].each == pytest.approx((1, 1 + float((shared[1] - shared[0]).mean())))


def test_of_few_items_nothing_is_shown() -> None:
    """All of n are of one sign by chance in 2^(1 - n) of cases; captions of one image are one item."""
    for count, groups in ((5, None), (30, np.repeat(np.arange(5), 6))):
        results = {name: {"n": Score("n", np.full(count, value), groups)} for name, value in (("a", 0.0), ("b", 1.0))}
        (row,) = rows_of(results, primary="n")
        assert not row.shown["b"] and row.p["b"] == 2.0**-4 and row.differences["b"].low == 0.0
    results = {name: {"n": Score("n", np.full(6, value))} for name, value in (("a", 0.0), ("b", 1.0))}
    (row,) = rows_of(results, primary="n")
    assert row.shown["b"] and row.p["b"] == 2.0**-5


@pytest.mark.parametrize("of_seeds", [0.03, 0.1])
def test_the_interval_over_both_covers_what_it_says(of_seeds: float) -> None:
    """True difference 0, three seeds, 100 items, both with a spread: 95 % is kept where one kind alone does not."""
    rng, repeats, missed = np.random.default_rng(0), 300, {"both": 0, "items": 0, "seeds": 0}
    for _ in range(repeats):
        seeds, items = rng.normal(0, of_seeds, (3, 1)), rng.normal(0, 0.5, (1, 100))
        drawn = seeds + items + rng.normal(0, 0.1, (3, 100))
        counts = rng.multinomial(100, np.full(100, 0.01), size=500)
        values, means = drawn.mean(axis=1), drawn @ counts.T / 100
        for name, low, high in (
            ("both", *np.quantile(over_both(values, means, rng), [0.025, 0.975])),
            ("items", *np.quantile(means.mean(axis=0), [0.025, 0.975])),
            ("seeds", over_seeds(values).low, over_seeds(values).high),
        ):
            missed[name] += not low <= 0 <= high
    covered = {name: 100 * (1 - count / repeats) for name, count in missed.items()}
    assert covered["both"] >= 93 and min(covered["items"], covered["seeds"]) < covered["both"] - 3


def test_holm_by_hand() -> None:
    """Steps of 0.05 / 4, / 3, ...: what comes after the first failure is not shown, however small."""
    assert holm({"a": 0.04, "b": 0.012, "c": 0.016, "d": 0.03}) == {"b": True, "c": True, "d": False, "a": False}
    assert holm({"a": 0.02, "b": 0.02}) == {"a": True, "b": True} and holm({}) == {}
    assert two_sided(np.array([-1.0, 1.0, 1.0])) == 1.0 and two_sided(np.ones(999)) == 2 / 1000


def test_one_number_is_decided_by_itself_and_the_others_by_holm() -> None:
    """Five numbers with a p value of about 0.02 each: alone each is sure, among four others none is."""
    rng = np.random.default_rng(0)
    base, noise = np.zeros(50), rng.normal(0, 1, 50)
    change = (noise - noise.mean()) / noise.std() + 2.4 / math.sqrt(50)
    names = [f"n {number}" for number in range(5)]
    results = {"base": {n: Score(n, base) for n in names}, "new": {n: Score(n, change) for n in names}}
    rows = rows_of(results, primary="n 3")
    assert all(row.differences["new"].sure for row in rows)
    assert [row.name for row in rows if row.shown["new"]] == ["n 3"]
    lines = section(rows, ["base", "new"], "n 3").rows
    assert [line[0] for line in lines if line[-1].endswith("*")] == ["n 3"]
    assert verdict(rows[3], "new").startswith("significant: +33.94 [+")
    weak = rows_of({"base": results["base"], "new": {n: Score(n, change - 0.3) for n in names}}, primary="n 3")
    assert verdict(weak[3], "new").startswith("not significant: +3.94 [-")


def test_arms_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt", "c.pt", "l,m.pt", "x"):
        Path(name).write_text("")
    found = parse_arms(["base=a.pt", "s=a.pt+x,c.pt+x#5@0.5"])["s"]
    parts = [(one.label, one.name, one.block, one.scale) for one in found]
    assert parts == [("s 1", "a.pt", None, 1.0), ("s 2", "c.pt", 5, 0.5)]
    assert len(parse_arms(["l,m.pt"])) == len(parse_arms(["x=l,m.pt"])) == 1  # a name that exists is never cut
    assert [one.label for one in parse_arms(["a.pt,b.pt"])["a"]] == ["a 1", "a 2"]
    with pytest.raises(ValueError, match="seeds"):
        parse_arms(["a=a.pt,b.pt", "b=a.pt,b.pt,c.pt"])


def test_the_command_compares_seeds_and_keeps_what_was_named(world: Path, tmp_path: Path) -> None:
    """An arm of three models; the record says which number was to decide, and no other is taken later."""
    base = world / "clip.safetensors"
    seeds = ",".join(f"{base}+{world}/adapter@{scale}" for scale in (0.8, 1, 1.2))
    command = [f"base={base}", f"seeds={seeds}", "--on", f"retrieval={world}/coco", "--out", str(tmp_path / "out")]
    first, other = (f"retrieval/coco text to image R@{count}" for count in (1, 5))
    status, said, errors = _run(*command, "--primary", first)
    assert status == 0, errors
    assert f"primary: {first}" in said and "significant: " in said
    record = _record(tmp_path / "out")
    assert record["primary"] == first and record["arms"]["seeds"] == ["seeds 1", "seeds 2", "seeds 3"]
    (row,) = (row for row in record["rows"] if row["name"] == first)
    assert row["differences"].keys() == row["shown"].keys() == {"seeds"} and len(row["seeds"]["seeds"]["each"]) == 3
    assert f"was judged by {first}" in _run(*command, "--primary", other)[2]
