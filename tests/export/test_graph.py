"""Parts of an exported graph beside what they have to equal, without an export."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf
from torch import nn

import visft_ds
from tests.tasks.cases import batch_of
from visft_ds.cli import main
from visft_ds.data.decode import levels
from visft_ds.data.masks import code_of
from visft_ds.data.transforms import Crop, Pad, Resize
from visft_ds.export import answers, cli, command
from visft_ds.export.answers import Picture
from visft_ds.export.graph import Answer, Frame, FrameMap, levels_of, resized, resized_levels
from visft_ds.export.verify import Difference
from visft_ds.ops.deform_attn import gathered
from visft_ds.predict import exported
from visft_ds.predict.exported import results_of_outputs
from visft_ds.predict.images import OpenedImage
from visft_ds.predict.results import Prediction
from visft_ds.settings.bands import Bands
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks import TASKS
from visft_ds.tasks.masks.interpolation import interpolated


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (48, 64, (32, 32)),
        (64, 43, (32, 32)),
        (10, 7, (32, 32)),
        (43, 64, (43, 64)),
        (128, 96, (32, 17)),
        (900, 1200, (32, 43)),
    ],
)
def test_pictures_are_scaled_exactly_as_training_scales_them(
    height: int, width: int, size: tuple[int, int]
) -> None:
    """Byte by byte, larger and smaller: boxes could not be equal to a thousandth of a pixel otherwise."""
    noise = torch.randint(0, 256, (2, height, width, 3), generator=torch.Generator().manual_seed(0))
    pictures = noise.to(torch.uint8).permute(0, 3, 1, 2)
    expected = tvf.resize(pictures, list(size), antialias=True)
    assert torch.equal(resized(pictures.float(), size).to(torch.uint8), expected)


def test_bands_become_levels_and_are_scaled_as_in_training() -> None:
    """Of 16 bits, beyond their range, and of floats without a number; larger and smaller."""
    random = np.random.default_rng(0)
    values = random.integers(0, 6000, (48, 66, 4)).astype(np.uint16)
    unknown = np.where(values % 7 == 0, np.nan, values).astype(np.float32)
    for pictures in (values, unknown):
        kind = str(pictures.dtype)
        bands = Bands(
            count=4, numbers=(1, 2, 3, 4), kind=kind, range=(90, 4095), mean=(0.5,) * 4, std=(1,) * 4
        )  # type: ignore[arg-type]
        expected = torch.from_numpy(levels(pictures, bands)).permute(2, 0, 1)[None]
        ours = levels_of(torch.from_numpy(pictures).float().permute(2, 0, 1)[None], bands)
        torch.testing.assert_close(ours, expected)
        for size in ((32, 40), (96, 67), (48, 66)):
            scaled = tvf.resize(expected, list(size), antialias=True)
            torch.testing.assert_close(resized_levels(ours, size), scaled, rtol=0, atol=2e-4)  # of 255


@pytest.mark.parametrize(("size", "padded"), [((32, 32), (32, 32)), ((30, 41), (32, 48))])
def test_maps_are_interpolated_as_in_an_evaluation(size: tuple[int, int], padded: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    shares = [side / whole for side, whole in zip(size, padded, strict=True)]
    expected = interpolated(maps, shares, (61, 83))
    fine = Picture(61, 83, size, padded).fine(maps)
    torch.testing.assert_close(fine, expected, rtol=0, atol=2e-6)  # float32 beside float64 positions


def test_points_are_gathered_as_grid_sample_takes_them() -> None:
    """Inside, across the border and beyond it."""
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 5, 7, generator=random)
    points = 2.6 * torch.rand(3, 11, 4, 2, generator=random) - 1.3
    expected = F.grid_sample(maps, points, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(gathered(maps, points), expected, rtol=0, atol=2e-6)


def test_a_frame_is_what_evaluation_makes_of_a_picture() -> None:
    assert Frame.of([Resize(30, 41)], 14) == ((30, 41), (42, 42))
    assert Frame.of([Resize(30, 41), Pad(32, 64, 128, outside=True)], 16) == ((30, 41), (32, 64))
    with pytest.raises(ValueError, match="no export has"):
        Frame.of([Crop(0, 0, 4, 4)], 14)


def _prediction(*boxes: tuple[int, float, float], side: int = 20) -> Prediction:
    """Prediction of boxes of a category, a score and a left side, in a square."""
    results = [
        {"category_id": id_, "score": score, "bbox": [left, 2.0, 5.0, 5.0]} for id_, score, left in boxes
    ]
    return Prediction(np.zeros((side, side, 3), np.uint8), None, {}, {"detection": results})


def test_what_differs_from_our_predictions_is_said() -> None:
    """Equal scores may stand in any order; a pixel, a score, a category and a number may not differ."""
    ours = _prediction((1, 0.9, 3.0), (2, 0.9, 4.0))
    for theirs, word in (
        (_prediction((2, 0.9, 4.0), (1, 0.9, 3.0)), ""),
        (_prediction((1, 0.9, 3.01), (2, 0.9, 4.0)), "pixels"),
        (_prediction((1, 0.9001, 3.0), (2, 0.9, 4.0)), "scores"),
        (_prediction((1, 0.9, 3.0), (1, 0.9, 4.0)), "categories"),
        (_prediction((1, 0.9, 3.0)), "1 objects, ours 2"),
    ):
        difference = Difference("detection")
        difference.add(ours, theirs)
        text = "; ".join(difference.problems())
        assert word in text and bool(word) == bool(text), text


def test_boxes_in_large_pictures_may_differ_by_the_rounding_of_their_size() -> None:
    """float32 has four digits behind the point of a side of 640; what is beyond a thousandth is counted."""
    difference = Difference("detection")
    difference.add(_prediction((1, 0.9, 3.0), side=640), _prediction((1, 0.9, 3.004), side=640))
    assert difference.problems() == [] and "(1 beyond 0.001)" in difference.describe()
    difference.add(_prediction((1, 0.9, 3.0), side=640), _prediction((1, 0.9, 3.01), side=640))
    assert "boxes differ by 0.01 pixels" in difference.problems()[0]


def test_segments_are_compared_with_those_that_cover_them() -> None:
    """In any order, and of the same category."""

    def of(*segments: tuple[int, int, float]) -> Prediction:
        """Rows of a picture, each segment from one row to the end, of a category and a score."""
        results = []
        for number, (top, category, score) in enumerate(segments, 1):
            mask = np.zeros((8, 8), bool)
            mask[top : top + 4] = True
            segment = {"id": number, "category_id": category, "score": score}
            results.append({**segment, "segmentation": code_of(mask)})
        return Prediction(np.zeros((8, 8, 3), np.uint8), None, {}, {"panoptic": results})

    ours = of((0, 5, 0.9), (4, 5, 0.9))
    for theirs, word in (
        (of((4, 5, 0.9), (0, 5, 0.9)), ""),
        (of((0, 5, 0.9), (4, 6, 0.9)), "other categories"),
        (of((0, 5, 0.9)), "1 segments, ours 2"),
        (of((0, 5, 0.9), (4, 5, 0.91)), "scores"),
        (of((0, 5, 0.9), (5, 5, 0.9)), "pixels"),
    ):
        difference = Difference("panoptic")
        difference.add(ours, theirs)
        text = "; ".join(difference.problems())
        assert word in text and bool(word) == bool(text), text


@pytest.mark.parametrize("bits", ["--half", "--int8"])
def test_fewer_bits_need_a_task_whose_loss_is_measured(
    bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing compares the maps of a backbone alone; refused before the run is read."""
    words = ["export", str(tmp_path), "--tasks", "none", bits, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"{bits} needs a task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


IMAGE = OpenedImage(np.zeros((6, 6, 3), np.uint8), None)


class FixedMaps(nn.Module):
    """In place of a backbone: the maps of two pictures of noise, in a frame of which they fill a part."""

    frame = Frame((44, 60), (48, 64))

    def __init__(self) -> None:
        super().__init__()
        valid = torch.ones(2, 6, 8, dtype=torch.bool)
        cells = torch.tensor([[5.5, 7.5]]).expand(2, -1)
        features = torch.randn(2, 32, 6, 8, generator=torch.Generator().manual_seed(0))
        self.maps = [FrameMap(features, valid, cells, part=(6, 8))]

    def forward(self, images: torch.Tensor) -> list[FrameMap]:
        return self.maps


#: Masks that hide others, and masks of one kind of stuff.
SEGMENTS = {"num_queries": 20, "blocks": 1, "hidden_dim": 32, "num_heads": 2, "score": 0.8, "overlap": 0.3}
SEGMENTS |= {"stuff": (6,), "type": "plain"}
PLAIN = {"type": "plain", "num_queries": 6, "blocks": 1, "hidden_dim": 32, "num_heads": 2}


def difference_of(task: str, head: dict[str, object]) -> Difference:
    """Answers of a new head beside the task's own results; no runtime is in it."""
    torch.manual_seed(0)
    spec = TASKS[task]
    if spec.config.has_classes:
        head = {"num_classes": 3, **head}
    settings = spec.settings("head", spec.options("head", head))
    built = spec.build_head([(32, 8)], settings, None).eval()
    if task == "detection":  # all scores near 0.02 else
        torch.nn.init.normal_(built.class_embed.weight, std=0.1)
    if head["type"] == "plain":  # one class for all pixels else
        torch.nn.init.normal_(built.classes.weight)
        torch.nn.init.normal_(built.mask3.weight)
    maps = FixedMaps()
    with torch.no_grad():
        answer = Answer(task, maps, built, (5, 6, 9))(torch.zeros(2, 61, 83, 3, dtype=torch.uint8))
        output = built(maps.maps)
    sizes = torch.tensor([[44, 60]] * 2)
    stored = torch.tensor([[61, 83]] * 2)
    batch = batch_of(2, images=torch.zeros(2, 3, 48, 64), sizes=sizes, original_sizes=stored)
    results = spec.results(output, batch, None, (5, 6, 9))
    compared = Difference(task)
    for image in range(2):
        outputs = {name: value[image].numpy() for name, value in answer.items()}
        theirs = results_of_outputs(task, outputs, (5, 6, 9), (61, 83), 0.0)
        ours = [result for result in results if result["image_id"] == image + 1]
        has_masks = "box_masks" in outputs
        pixels = np.zeros((61, 83, 3), np.uint8)
        names = {5: "cup", 6: "car", 9: "cat"}  # a class map has no others
        compared.add(
            Prediction(pixels, None, names, {task: ours}, has_masks),
            Prediction(pixels, None, names, {task: theirs}, has_masks),
        )
    return compared


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("detection", {"type": "dense", "width": 32, "max_detections": 7}),
        ("detection", {"type": "dense", "width": 32, "max_detections": 7, "masks": True, "box_map": 0}),
        ("segmentation", PLAIN),
        ("semantic", PLAIN),
        ("panoptic", SEGMENTS),
        ("semantic", {"type": "linear"}),
        ("depth", {"type": "linear"}),
        ("depth", {"type": "dpt", "hidden_dim": 8}),
        ("depth", {"type": "linear", "relative": True}),
    ],
    ids=["dense", "dense with masks", "plain", "plain classes", "panoptic", "linear", "depth", "dpt", "unit"],
)
def test_an_answer_is_what_the_task_makes_of_its_head(task: str, head: dict[str, object]) -> None:
    """Where a picture fills part of a frame, decoded with and without suppressed doubles."""
    compared = difference_of(task, head)
    assert compared.problems() == []
    assert task in ("semantic", "depth") or compared.objects > 4
    assert (compared.borders == 0) == (task == "depth" or (task == "detection" and not head.get("masks")))


@pytest.mark.parametrize(
    ("task", "head"),
    [("segmentation", PLAIN), ("semantic", PLAIN), ("panoptic", SEGMENTS), ("semantic", {"type": "linear"})],
    ids=["plain", "plain classes", "panoptic", "linear"],
)
def test_masks_that_are_shifted_by_less_than_half_a_pixel_are_refused(
    task: str, head: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = answers._spread

    def shifted(cells: int, side: int, frame: int, pixels: int, like: torch.Tensor) -> torch.Tensor:
        return right(cells, side, frame, 4 * pixels, like)[3::4]  # three eighths to the right, or down

    monkeypatch.setattr(answers, "_spread", shifted)
    problems = difference_of(task, head).problems()
    assert any("pixels differ of" in problem for problem in problems), problems


def test_a_query_that_looks_at_other_cells_by_rounding_alone_is_followed() -> None:
    """Our prediction looks at the export's cells; where a logit is far from 0 this is no rounding."""
    torch.manual_seed(0)
    spec = TASKS["segmentation"]
    options = {"num_queries": 3, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2}
    settings = spec.settings("head", spec.options("head", {"num_classes": 3, "n_points": 2, **options}))
    head = spec.build_head([(32, 8)], settings, None).eval()
    maps = FixedMaps().maps
    answer = Answer("segmentation", FixedMaps(), head, (5, 6, 9))
    with torch.no_grad():
        attended = answer(torch.zeros(2, 61, 83, 3, dtype=torch.uint8))["attended"]
    assert attended.shape == (2, 1, 3, 48)

    class Fake:
        def head(self, task: str) -> nn.Module:
            return head

        @torch.no_grad()
        def predict_opened(self, images: object, threshold: float) -> list[torch.Tensor]:
            return [head(maps).masks[-1]]

    fake: Any = Fake()
    same, other = Difference("segmentation"), Difference("segmentation")
    own: Any = same.follow(fake, IMAGE, attended.numpy())
    assert torch.equal(own, fake.predict_opened((), 0.0)[0])
    assert (same.choices, same.cells, same.problems()) == (0, 2 * 3 * 48, [])
    turned = attended.clone()
    turned[0, 0, 1, 20] ^= True
    moved: Any = other.follow(fake, IMAGE, turned.numpy())
    assert other.choices == 1 and not torch.equal(own, moved)
    assert "other cells" in other.problems()[0]
    other.farthest = 1e-5
    assert other.problems() == []


def test_nothing_on_either_side_is_no_proof() -> None:
    difference = Difference("detection")
    difference.add(_prediction(), _prediction())
    assert difference.problems() == [] and "nothing was compared" in difference.describe()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--half", "--int8"], "exclude each other"),
        (["--int8", "--format", "torch"], "is of --format onnx"),
        (["--web", "--format", "torch"], "--web shows boxes"),
        (["--web", "--tasks", "none"], "--web shows boxes"),
        (["--out", "."], "is not overwritten"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_at_once(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the run is read, which is none here."""
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--verify", "0"], ["--verify", "-1"], ["--picture-size", "480"]])
def test_wrong_numbers_are_refused_with_what_is_allowed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path), "--out", str(tmp_path / "out"), *words])
    assert "is not allowed: give" in capsys.readouterr().err


def _flags(run: Path, *words: str) -> argparse.Namespace:
    """Flags of a command."""
    return cli._parser().parse_args(["--run", str(run), "--out", str(run / "out"), *words])


def test_pictures_to_compare_are_asked_for_where_there_are_none(tmp_path: Path) -> None:
    """A backbone alone is compared on noise."""
    with pytest.raises(ValueError, match="give --images"):
        command._Pictures(_flags(tmp_path)).some(16)
    assert len(command._Pictures(_flags(tmp_path, "--tasks", "none")).some(16)) == 1


class Measured:
    """In place of pictures: metrics that come one after another."""

    def __init__(self, *metrics: dict[str, float]) -> None:
        self.left = list(metrics)

    def metrics(self, *_: object) -> dict[str, float]:
        return self.left.pop(0)


@pytest.mark.parametrize(
    ("before", "after", "words", "reason"),
    [
        ({"box/AP50": 0.9, "mask/AP": 0.7}, {"box/AP50": 0.895, "mask/AP": 0.8}, ["--half"], None),
        ({"box/AP50": 0.9, "mask/AP": 0.7}, {"box/AP50": 0.9, "mask/AP": 0.68}, ["--int8"], "mask/AP falls"),
        ({"box/AP50": 0.9}, {"box/AP50": 0.5}, ["--int8", "--allow-loss"], None),
        ({"box/APs": 0.9}, {"box/APs": 0.5}, ["--int8"], None),
        ({}, {}, ["--half"], "nobody knows"),
    ],
)
def test_more_than_a_point_is_not_lost_unasked(
    before: dict[str, float], after: dict[str, float], words: list[str], reason: str | None, tmp_path: Path
) -> None:
    flags = _flags(tmp_path, *words, "--verify", "all")
    model = SimpleNamespace(tasks=("detection",), has_instances=True)
    expected = nullcontext() if reason is None else pytest.raises(ValueError, match=reason)
    with expected:
        command._measured(flags, model, {}, {}, Measured(before, after))  # type: ignore[arg-type]


def test_what_has_no_export_is_refused() -> None:
    window = {"window": 512, "fixed_size": None}
    stream = Stream("semantic", ("semantic",), 1.0, 1, 1, window)
    with pytest.raises(ValueError, match="windows of 512 pixels"):
        command._check_windows("semantic", stream)
    command._check_windows("semantic", replace(stream, image={**window, "fixed_size": 320}))


def test_a_head_of_its_own_kind_is_refused() -> None:
    maps = FixedMaps()
    answer = Answer("detection", maps, nn.Identity(), (5, 6, 9))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="detection head has no export"):
        answer(torch.zeros(2, 61, 83, 3, dtype=torch.uint8))


def test_maps_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [torch.ones(1, 2, 3, 3)]
    images = [OpenedImage(np.zeros((6, 6, 3), np.uint8), None)]
    for scale, is_close in ((1.00001, True), (1.001, False)):
        theirs = {"features": scale * np.ones((1, 2, 3, 3), np.float32)}
        monkeypatch.setattr(command, "_maps_of", lambda *_: ours)
        monkeypatch.setattr(
            command, "open_exported", lambda _, out=theirs: exported.ExportedFile({}, lambda _: out)
        )
        with nullcontext() if is_close else pytest.raises(ValueError, match="features differ by"):
            command._verified_maps(None, images, tmp_path)  # type: ignore[arg-type]


def test_files_of_another_origin_are_refused(tmp_path: Path) -> None:
    for name in ("other.onnx", "other.pt2"):
        (tmp_path / name).write_bytes(b"no model")
        with pytest.raises(ValueError, match=name):
            exported.open_exported(tmp_path / name)
    with pytest.raises(ValueError, match="this release reads"):
        exported._facts('{"format": "visft_ds export 0"}')


def test_a_folder_of_an_export_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "features.onnx").touch()
    with pytest.raises(ValueError, match="leave out all but its folder"):
        visft_ds.load(tmp_path, tasks="detection")
    alone = exported.ExportedFile({"task": None}, dict)
    monkeypatch.setattr(exported, "open_exported", lambda _: alone)
    with pytest.raises(ValueError, match="backbone alone"):
        visft_ds.load(tmp_path)
