"""`tools/profile.py heads` and `ap`: what they print and write, whether it can be true, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.profile import main
from visft_ds.ops.deform_attn import deform_attn
from visft_ds.profiling import average_precision, heads
from visft_ds.profiling.heads import SAMPLING, WHOLE, HeadOptions, measure_heads
from visft_ds.profiling.sampling import BOTH, FORWARD, NEIGHBOURS, OURS, formulations, four_neighbours
from visft_ds.profiling.timing import BACKWARD, CRITERION, HEAD, MATCHER, matchers
from visft_ds.tasks.segmentation import pixel_decoder
from visft_ds.tasks.segmentation.loss import SegmentationCriterion

SMALL = ["heads", "--small", "--repeats", "2", "--grid", "5x6", "--objects", "3"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of all heads at debug size."""
    file = tmp_path_factory.mktemp("heads") / "heads.json"
    before = torch.get_num_threads()
    assert main([*SMALL, "--threads", str(before + 1), "--json", str(file)]) == 0
    record: dict[str, Any] = json.loads(file.read_text())
    assert record["hardware"]["threads"] == before + 1 and torch.get_num_threads() == before
    return record


def test_parts_lie_inside_one_another(measured: dict[str, Any]) -> None:
    assert list(measured["tasks"]) == ["detection", "segmentation", "captioning"]
    for task, numbers in measured["tasks"].items():
        assert (MATCHER in numbers["seconds"]) == (task != "captioning")
        assert (SAMPLING in numbers["seconds"]) == (task == "segmentation")
        # inner <= outer in every step, hence in every order statistic
        for key in ("median", "low", "high", "least", "most"):
            seconds = {part: spread[key] for part, spread in numbers["seconds"].items()}
            shares = {part: spread[key] for part, spread in numbers["shares"].items()}
            for found in (seconds, shares):
                assert 0 < found.get(MATCHER, 1e-9) < found[CRITERION] < found[WHOLE]
                assert 0 < found.get(SAMPLING, 1e-9) < found[HEAD] < found[WHOLE]
                assert 0 < found[BACKWARD] < found[WHOLE]
            assert shares[WHOLE] == 1.0
        assert all(spread["count"] == 2 for spread in numbers["seconds"].values())
        # The median of two is their mean, so shares add up; missing is the weighting of the losses, and Python.
        parts = sum(numbers["shares"][part]["median"] for part in (HEAD, CRITERION, BACKWARD))
        assert 0.5 < parts <= 1.0


def test_sizes_and_bytes_are_those_of_the_head(measured: dict[str, Any]) -> None:
    tasks = measured["tasks"]
    assert tasks["segmentation"]["sizes"] == {
        "images": 2, "width": 64, "grid": [5, 6], "objects": 6, "masks": [6, 18, 21],
    }  # fmt: skip
    assert tasks["captioning"]["sizes"]["caption_ids"] == [2, 11]  # 9 words, <start> and <end>
    for task, numbers in tasks.items():
        head = heads._build(task, HeadOptions(small=True), torch.device("cpu")).head
        assert numbers["parameters"]["count"] == sum(parameter.numel() for parameter in head.parameters())
        memory = numbers["memory_bytes"]
        assert (
            numbers["parameters"]["bytes"]
            == 4 * numbers["parameters"]["count"]
            == memory["at_peak"]["weights, trained"]
        )
        assert sum(memory["at_peak"].values()) == memory["peak"] and memory["allocator_peak"] is None
        assert 0 < memory["at_peak"]["activations"] <= memory["saved"] < memory["peak"]
        assert memory["at_peak"]["other"] >= 4 * 2 * 64 * 5 * 6  # the features


def test_memory_grows_with_the_images_and_parameters_do_not() -> None:
    one, two = (
        measure_heads(HeadOptions(tasks=("detection",), small=True, batch=batch, repeats=1))["tasks"]["detection"]
        for batch in (1, 2)
    )
    assert one["parameters"] == two["parameters"]
    # All that is kept belongs to an image, but a few masks and positions
    assert 1.8 < two["memory_bytes"]["saved"] / one["memory_bytes"]["saved"] <= 2.0


def test_the_hooks_are_gone(measured: dict[str, Any]) -> None:
    assert pixel_decoder.deform_attn is deform_attn
    ((_, _, function),) = matchers(SegmentationCriterion())
    assert function.__module__ == "visft_ds.tasks.segmentation.mask_matching"


def test_inputs_are_the_same_whatever_else_is_measured() -> None:
    state = torch.get_rng_state()
    for task in heads.DEFAULTS:
        kept = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            case = heads._build(task, HeadOptions(small=True), torch.device("cpu"))
            assert torch.initial_seed() == seed
            kept.append([*case.tensors(), *case.head.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    torch.set_rng_state(state)


def test_the_other_formulation_is_the_same_sum() -> None:
    """Two levels, points outside the maps, and all gradients, in float64."""
    shapes = [(4, 6), (2, 3)]
    value = torch.randn(2, 30, 3, 2, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(2, 5, 3, 2, 4, 2, dtype=torch.float64) * 1.6 - 0.3).requires_grad_()
    weights = torch.rand(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (deform_attn, four_neighbours):
        out = function(value, shapes, locations, weights)
        results.append((out, *torch.autograd.grad(out.square().sum(), (value, locations, weights))))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


def test_formulations_are_compared_and_agree(measured: dict[str, Any]) -> None:
    compared = measured["deformable_attention"]
    assert list(compared["formulations"]) == list(formulations())
    assert compared["sizes"] == {"images": 2, "grid": [5, 6], "heads": 4, "channels": 8, "points": 4}
    for name, numbers in compared["formulations"].items():
        seconds = numbers["seconds"]
        assert 0 < seconds[FORWARD]["median"] < seconds[BOTH]["median"]
        assert numbers["saved_bytes"] > 0
        assert numbers["largest_difference"] < 1e-5  # float32 sums of 16 terms of size 1
        assert numbers["ratio"]["least"] == numbers["ratio"]["most"] == 1.0 if name == OURS else True
    saved = {name: numbers["saved_bytes"] for name, numbers in compared["formulations"].items()}
    assert saved[NEIGHBOURS] > saved[OURS]  # four gathered values of every sample against one


def test_the_tables_show_the_numbers(measured: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL[:2], "--tasks", "segmentation", "--repeats", "1", "--batch", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "== heads: debug sizes, cpu, float32"
    titles = [line for line in lines if line.startswith("--")]
    assert titles[1] == "-- segmentation: 1 image of 8x8 cells, width 64, 7 objects, masks 28x28"
    assert titles[2:] == [
        "-- segmentation: memory",
        "-- deformable attention, one layer: 1 x 8x8 cells, 4 heads of 8 channels, 4 points",
        "-- side by side",
    ]
    assert any(line.startswith("     of it matcher") and line.endswith(" %") for line in lines)
    rows = {task: heads._side_by_side(task, numbers) for task, numbers in measured["tasks"].items()}
    assert rows["captioning"][3] == "none" and rows["detection"][3].endswith(" %")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["heads", "--tasks", "detection", "boxes"], "--tasks detection boxes: give one or more of detection,"),
        (["heads", "--tasks", "detection", "detection"], "each once"),
        (["heads", "--grid", "48"], "'48' is no grid: give rows and columns such as 48x48"),
        (["heads", "--grid", "0x3"], "--grid 0 must be at least 1"),
        (["heads", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["heads", "--threads", "0"], "--threads 0 must be at least 1"),
        (["heads", "--objects", "-1"], "--objects -1 must be at least 0"),
        (["heads", "--dropout", "1"], "--dropout 1.0 is not allowed"),
        (["heads", "--small", "--full"], "--full chooses a grid"),
        (["heads", "--small", "--width", "many"], "--width"),
        (["heads", "--widht", "3"], "--widht: unknown argument; did you mean --width?"),
        (["heads", "--json", "nowhere/at/all.json"], "there is no folder"),
        (["ap", "--images", "0"], "--images 0 must be at least 1"),
        (["ap", "images"], "images: unknown argument"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads", "--small", "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_a_step_that_does_not_fit_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(heads, "_measure_times", full)
    with pytest.raises(ValueError, match="give a smaller --grid or --batch"):
        measure_heads(HeadOptions(small=True))


def test_no_objects_can_be_measured() -> None:
    found = measure_heads(HeadOptions(tasks=("detection", "segmentation"), small=True, objects=0, repeats=1))
    assert all(numbers["sizes"]["objects"] == 0 for numbers in found["tasks"].values())


# ------------------------------------------------------------------------------------------------------------ AP


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_average_precision_is_compared(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ap.json"
    flags = ["--masks"] if kind == "mask" else []
    assert main(["ap", "--images", "12", "--detections", "20", "--repeats", "2", "--json", str(file), *flags]) == 0
    printed = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["sizes"]["annotations"] == 84 and record["sizes"]["results"] == 240
    assert record["equal"] and record["largest_difference"] <= 1e-9 and f"of {7 + 80} numbers: within 1e-09" in printed
    assert 0.02 < record["values"][f"{kind}/AP"] < 0.9, "the case must not be trivial"
    assert {"box/AP", "mask/AP"} & record["values"].keys() == {f"{kind}/AP"}
    seconds = record["seconds"]
    assert seconds["ours"]["count"] == record["ratio"]["count"] == 2
    least, most = (seconds["pycocotools"][a] / seconds["ours"][b] for a, b in (("least", "most"), ("most", "least")))
    assert least <= record["ratio"]["median"] <= most
    assert f"{record['ratio']['median']:.2f}" in printed and "pycocotools 2." in printed


def test_numbers_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = average_precision.coco_average_precision

    def wrong(*arguments: Any, **named: Any) -> dict[str, float]:
        values = right(*arguments, **named)
        return values | {"box/AP75": values["box/AP75"] + 1e-6}

    monkeypatch.setattr(average_precision, "coco_average_precision", wrong)
    assert main(["ap", "--images", "3", "--detections", "9"]) == 1
    assert "largest difference  1.0e-06 of 87 numbers: BEYOND 1e-09" in capsys.readouterr().out


def test_the_case_is_the_same_in_every_run() -> None:
    options = average_precision.PrecisionOptions(images=3, objects=4, detections=6, masks=True)
    truth, results = average_precision.make_case(options)
    assert (truth, results) == average_precision.make_case(options)
    assert [len(truth[name]) for name in ("images", "annotations")] == [3, 12] and len(results) == 18
    scores = [result["score"] for result in results]
    assert all(0 <= score <= 1 for score in scores) and len(set(scores)) == 18
