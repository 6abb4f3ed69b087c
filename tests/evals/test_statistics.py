"""Intervals over test items, training images and seeds, and decisions about many numbers: against plain
loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats

from visft_ds.evals.judge.benchmark import FloatArray, IntArray, Number, Score, mean_ratio
from visft_ds.evals.judge.in_context import recall, remember
from visft_ds.evals.judge.intervals import Spread, combined, holm, interval, resampled, spread_of
from visft_ds.evals.judge.table import Row, Trial, rows_of, section
from visft_ds.evals.judge.verdict import judged


def _row(base: Score, *new: Score) -> Row:
    """The row of one number of a base and of an arm with a seed for each further score."""
    arms = {"base": ["base"], "new": [f"new {seed}" for seed in range(len(new))]}
    results = {label: {"n": score} for label, score in zip(("base", *arms["new"]), (base, *new), strict=True)}
    (row,) = rows_of(results, arms, [Trial("new")], "n")
    return row


def test_bootstrap_is_that_of_resampled_items() -> None:
    """Spread of the mean against plain resampling and, for shares, the formula; several arrays share the
    draws.
    """
    rng = np.random.default_rng(0)
    values = rng.random(200)
    means = resampled([values], None, rng)[0]
    plain = values[rng.integers(0, 200, (4000, 200))].mean(axis=1)
    # the standard error of a standard deviation of 4,000 draws is 1.1 %
    assert means.std() == pytest.approx(plain.std(), rel=0.06)
    assert means.mean() == pytest.approx(values.mean(), abs=0.002)
    right = (rng.random(1000) < 0.3).astype(np.float64)
    share = right.mean()
    assert resampled([right], None, rng)[0].std() == pytest.approx(
        math.sqrt(share * (1 - share) / 1000), rel=0.06
    )
    unions = rng.integers(50, 100, (60, 1, 3)).astype(np.float64)  # and of a mean of ratios of sums
    ratios = np.concatenate([unions * rng.random((60, 1, 3)), unions], axis=1)
    plain = mean_ratio(ratios[rng.integers(0, 60, (4000, 60))].sum(axis=1))
    means = resampled([ratios, ratios + np.array([1.0, 0.0])[:, None]], None, rng)
    assert means[0].std() == pytest.approx(plain.std(), rel=0.06)
    assert (means[1] - means[0]).std() < means[0].std() / 5


def test_items_of_a_group_are_drawn_together() -> None:
    """Five captions that all say the same about an image are one piece of evidence, not five."""
    rng = np.random.default_rng(0)
    once = rng.random(100)
    alone = resampled([once], None, rng)[0].std()
    grouped = resampled([np.repeat(once, 5)], np.repeat(np.arange(100), 5), rng)[0].std()
    assert grouped == pytest.approx(alone, rel=0.06)
    # groups of other sizes: the mean over items, not over groups
    values, groups = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 7])
    assert set(np.unique(resampled([values], groups, rng)[0]).tolist()) == {0.0, 0.75, 1.0}


def test_differences_are_paired() -> None:
    """Both models fail on the same items but one: the difference is sure, though each number is not."""
    base = np.array([0.0, 1.0] * 100)
    better = base.copy()
    better[:40:2] = 1.0
    results = {"base": {"a": Score("a", base)}, "new": {"a": Score("a", better)}, "poor": {}}
    arms = {name: [name] for name in results}
    (row,) = rows_of(results, arms, [Trial("new")], "a")
    change = row.differences["new"]
    assert change.value == pytest.approx(0.1) and change.better and 0.05 < change.low < change.high < 0.15
    assert row.values.keys() == {"base", "new"} and row == rows_of(results, arms, [Trial("new")], "a")[0]
    lines = section([row], list(arms), "a").rows
    assert lines[0][2:5] == ["50.00", "new", "60.00"] and lines[0][5].startswith("+10.00 [")
    assert lines[1][3:] == ["poor", "", ""]


def test_an_error_is_better_when_lower_and_written_in_its_own_unit() -> None:
    results = {"base": {"n": Score("n", np.full(9, 0.5))}, "new": {"n": Score("n", np.full(9, 0.25))}}
    arms = {arm: [arm] for arm in results}
    (row,) = rows_of(results, arms, [Trial("new")], "n", numbers={"n": Number("n", "", lower=True)})
    assert row.differences["new"].better and not row.differences["new"].worse
    assert section([row], ["base", "new"], "n").rows == [
        ["n", "9", "0.500", "new", "0.250", "-0.250 [-0.250, -0.250] *"]
    ]


def test_items_training_images_and_seeds_against_plain_loops() -> None:
    """Whole groups by plain resampling, training images by their spread, seeds by scipy's t, as independent
    draws.
    """
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 3)
    base = (rng.random(120) < 0.5).astype(np.float64)
    news = [np.where(rng.random(120) < 0.1 + 0.1 * seed, 1.0, base) for seed in range(3)]
    before, after = rng.normal(0, 0.05, 10), rng.normal(0, 0.05, (3, 10))
    row = _row(
        Score("n", base, groups, retrained=before),
        *(Score("n", of, groups, retrained=more) for of, more in zip(news, after, strict=True)),
    )
    of, each = row.differences["new"], [float((new - base).mean()) for new in news]
    assert of.each == pytest.approx(each) and of.value == pytest.approx(np.mean(each))
    changes = np.mean([new - base for new in news], axis=0).reshape(40, 3)
    spread, error = (after.mean(axis=0) - before).std(ddof=1), stats.sem(each)
    items = np.array([changes[rng.integers(0, 40, 40)].mean() for _ in range(8000)])
    whole = items + spread * rng.standard_t(9, 8000) + error * rng.standard_t(2, 8000)
    for found, plain in ((of.alone, items), (of, whole)):
        assert found.high - found.low == pytest.approx(
            np.subtract(*np.quantile(plain, [0.975, 0.025])), rel=0.1
        )
    assert spread > items.std() / 2


def test_seeds_are_paired_with_those_of_the_first_arm() -> None:
    """What two trainings of one seed share is no difference between recipes."""
    rng = np.random.default_rng(0)
    shared = [rng.random(50) + 0.3 * seed for seed in range(2)]
    pairs = {"a": ["a 1", "a 2"], "b": ["b 1", "b 2"]}
    results = {
        f"{arm} {seed + 1}": {"n": Score("n", shared[seed] + (arm == "b"))} for arm in "ab" for seed in (0, 1)
    }
    (row,) = rows_of(results, pairs, [Trial("b")], "n")
    assert row.differences["b"].each == pytest.approx((1, 1)) and row.differences["b"].p < 0.001
    (row,) = rows_of(results, {"a": ["a 1"], "b": ["b 1", "b 2"]}, [Trial("b")], "n")
    assert row.differences["b"].each == pytest.approx((1, 1 + float((shared[1] - shared[0]).mean())))


def test_of_few_items_nothing_is_shown() -> None:
    """All of n are of one sign by chance in 2^(1 - n) of cases; captions of one image are one item."""
    for count, groups in ((5, None), (30, np.repeat(np.arange(5), 6))):
        of = _row(*(Score("n", np.full(count, value), groups) for value in (0.0, 1.0))).differences["new"]
        assert not of.shown and of.p == 2.0**-4 and of.low == 0.0
    of = _row(*(Score("n", np.full(6, value)) for value in (0.0, 1.0))).differences["new"]
    assert of.shown and of.p == 2.0**-5


@pytest.mark.parametrize("of_seeds", [0.03, 0.1])
def test_the_interval_over_both_covers_what_it_says(of_seeds: float) -> None:
    """True difference 0, three seeds, 100 items, both with a spread: 95 % is kept where one kind alone does
    not.
    """
    rng, repeats, missed = np.random.default_rng(0), 300, {"both": 0, "items": 0, "seeds": 0}
    for _ in range(repeats):
        seeds, items = rng.normal(0, of_seeds, (3, 1)), rng.normal(0, 0.5, (1, 100))
        drawn = seeds + items + rng.normal(0, 0.1, (3, 100))
        counts = rng.multinomial(100, np.full(100, 0.01), size=500)
        values, means = drawn.mean(axis=1), drawn @ counts.T / 100
        for name, (low, high) in {
            "both": np.quantile(combined(values, means, None, rng), [0.025, 0.975]),
            "items": np.quantile(means.mean(axis=0), [0.025, 0.975]),
            "seeds": stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values)),
        }.items():
            missed[name] += not low <= 0 <= high
    covered = {name: 100 * (1 - count / repeats) for name, count in missed.items()}
    assert covered["both"] >= 93 and min(covered["items"], covered["seeds"]) < covered["both"] - 3


def test_holm_by_hand() -> None:
    """Steps of 0.05 / 4, / 3, ...: what comes after the first failure is not shown, however small."""
    assert holm({"a": 0.04, "b": 0.012, "c": 0.016, "d": 0.03}) == {"b", "c"}
    assert holm({"a": 0.02, "b": 0.02}) == {"a", "b"} and holm({}) == set()


def test_retrained_probes_are_few_and_count_as_such() -> None:
    """Five probes, difference 0, and training images decide: by a normal value 12 % would seem to differ."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(1500):
        value = rng.normal()
        draws = combined(np.array([value]), np.full((1, 1000), value), rng.normal(size=5), rng)
        found = interval(value, draws)
        missed += not found.low <= 0 <= found.high
    assert 0.03 < missed / 1500 < 0.075


def test_p_values_are_those_of_students_t() -> None:
    """Of one kind of spread alone; of two of the same size with Welch's degrees of freedom; and far out in
    the tail.
    """
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1, 40)
    items = spread_of(np.array([values.mean()]), resampled([values], None, rng), None, 40)
    # the bootstrap divides by n and not by n - 1; the spread of 4,000 draws is known to 1 %
    assert items.two_sided(float(values.mean())) == pytest.approx(
        stats.ttest_1samp(values, 0).pvalue, rel=0.2
    )
    probes = rng.normal(0, 2, 5)
    alone = spread_of(np.array([1.0]), np.ones((1, 10)), probes, 40)
    assert (alone.error, alone.freedom) == (pytest.approx(probes.std(ddof=1)), pytest.approx(4))
    three = np.array([1.0, 2.0, 4.0])
    seeds = spread_of(three, np.ones((3, 10)), None, 40)
    assert seeds.two_sided(float(three.mean())) == pytest.approx(stats.ttest_1samp(three, 0).pvalue)
    both = spread_of(three, np.ones((3, 10)), np.array([0.0, 1.0, 2.0, 3.0, 4.0]), 40)
    mine, theirs = three.var(ddof=1) / 3, 2.5
    assert both.freedom == pytest.approx((mine + theirs) ** 2 / (mine**2 / 2 + theirs**2 / 4))
    assert 0 < Spread(0.01, 400).two_sided(0.24) < 1e-20
    assert (Spread(0.0, 9).two_sided(0.0), Spread(0.0, 9).two_sided(0.1)) == (1.0, 0.0)


@pytest.mark.parametrize("freedom", [2, 9, 249])
def test_what_is_called_detectable_is_seen_in_four_of_five_repetitions(freedom: int) -> None:
    rng = np.random.default_rng(0)
    values = Spread(1.0, freedom).detectable + rng.normal(size=20_000)
    errors = np.sqrt(rng.chisquare(freedom, 20_000) / freedom)
    seen = values / errors > stats.t.ppf(0.975, freedom)
    assert 0.75 < seen.mean() < 0.87


def test_losses_are_told_however_many_numbers_there_are() -> None:
    """30 numbers of one seed that all fall by 24 points: draws alone give no p below 0.0005, too much for
    Holm's first steps."""
    rng = np.random.default_rng(0)
    arms = ("base", "tuned", "noise", "half", "control")
    results: dict[str, dict[str, Score]] = {arm: {} for arm in arms}
    falls = np.where(np.arange(500) < 150, 0.0, 1.0)
    for number in range(31):
        before = (rng.random(500) < 0.8) * 1.0
        for arm in arms:
            changed = arm != "base" and number > 0
            results[arm][f"n {number}"] = Score(f"n {number}", before * falls if changed else before)
    trial = Trial("tuned", ("noise", "control"), "half", 0.2)
    rows = rows_of(results, {arm: [arm] for arm in arms}, [trial], "n 0")
    assert all(row.differences["tuned"].shown and row.differences["tuned"].worse for row in rows[1:])
    assert not any(row.differences["half"].shown for row in rows[1:])
    (verdict,) = judged(rows, [trial], "n 0", "base")
    assert "30 of 30 other numbers" in verdict.sentences[1]


def test_the_primary_number_is_decided_by_itself_and_the_others_of_tuned_arms_by_holm() -> None:
    """Five numbers with a p value of about 0.02 each: each is sure alone, none is among the others."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 50)
    change = (noise - noise.mean()) / noise.std() + 2.4 / math.sqrt(50)
    names = [f"n {number}" for number in range(5)]
    results = {
        "base": {name: Score(name, np.zeros(50)) for name in names},
        "new": {name: Score(name, change) for name in names},
        "noise": {name: Score(name, -change) for name in names[:2]},
    }
    arms = {name: [name] for name in results}
    rows = rows_of(results, arms, [Trial("new", ("noise",))], "n 1", results)
    assert all(of.better or of.worse for row in rows for of in row.differences.values())
    assert [(row.name, arm) for row in rows for arm, of in row.differences.items() if of.shown] == [
        ("n 1", "new"),
        ("n 1", "noise"),
    ]
    assert [line[0] for line in section(rows, list(arms), "n 1").rows if line[-1].endswith("*")] == [
        "n 1",
        "n 1",
    ]
    assert rows[1].controls["new"]["noise"].value == pytest.approx(2 * rows[1].differences["new"].value)
    assert rows[1].last["new"].shown and rows[0].controls["new"].keys() == {"noise"}
    # Five differences beside the primary: one of p 0.005 is shown, the next one of 0.016 is not.
    results["new"]["n 0"] = Score("n 0", change + (stats.norm.isf(0.0025) - 2.4) / math.sqrt(50))
    found = {row.name: row.differences["new"].shown for row in rows_of(results, arms, [Trial("new")], "n 1")}
    assert found == {"n 0": True, "n 1": True, "n 2": False, "n 3": False, "n 4": False}


CLASSES, WIDTH = 5, 24


def _maps(rng: np.random.Generator, count: int) -> IntArray:
    """(count, 4, 4), an object of 2 x 2 places in each image, of one of four classes."""
    found = np.zeros((count, 4, 4), dtype=np.int64)
    for image in found:
        row, column = rng.integers(0, 3, 2)
        image[row : row + 2, column : column + 2] = rng.integers(1, CLASSES)
    return found


def _pair(seed: int, noise: float) -> Iterator[Score]:
    """A tower with noise of 1.6 in its features and another one, by in-context segmentation."""
    rng = np.random.default_rng(seed)
    prototypes, train, test = rng.normal(size=(CLASSES, WIDTH)), _maps(rng, 60), _maps(rng, 120)

    def features(labels: IntArray, spread: float) -> torch.Tensor:
        drawn = prototypes[labels] + spread * rng.normal(size=(*labels.shape, WIDTH))
        return torch.from_numpy(drawn).float().permute(0, 3, 1, 2)

    def overlaps(said: IntArray) -> FloatArray:
        answer, truth = (of[..., None] == np.arange(CLASSES) for of in (said, test))
        return np.stack(
            [(answer & truth).sum(axis=(1, 2)), (answer | truth).sum(axis=(1, 2))], axis=1
        ).astype(float)

    for spread in (1.6, noise):
        maps = features(train, spread)
        memory = remember(
            ((number, maps[number], torch.from_numpy(label)) for number, label in enumerate(train)),
            CLASSES,
            len(train),
            16,
        )
        said = torch.stack(list(recall(memory, [features(test, spread)]))).argmax(dim=2).numpy()
        own, *others = (overlaps(said[:, number]) for number in range(said.shape[1]))
        yield Score("n", own, retrained=mean_ratio(np.stack([of.sum(axis=0) for of in others])))


@pytest.mark.parametrize(
    ("pairs", "found", "false"), [(8, 7, 0), pytest.param(200, 190, 14, marks=pytest.mark.slow)]
)
def test_planted_gains_are_found_and_nulls_are_not(pairs: int, found: int, false: int) -> None:
    """Pairs of towers of which the second has less noise, 1.4, and pairs that differ by nothing but their
    noise.
    """
    planted = [_row(*_pair(seed, 1.4)).differences["new"] for seed in range(pairs)]
    null = [_row(*_pair(1000 + seed, 1.6)).differences["new"] for seed in range(pairs)]
    assert sum(of.low > 0 for of in planted) >= found and sum(of.shown for of in null) <= false
