"""Depth: maps under a geometry, losses, metrics by hand; the whole way, engines, photographs by heart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.depth_folder import write_depth
from tests.tasks.cases import batch_of, denominators, extents_of, map_of
from tests.tasks.whole_way import check_engines, of_one_task, whole_way
from tests.tiny import SETTINGS, losses, words_of
from visft_ds import evaluate, fit
from visft_ds.config import resolve
from visft_ds.data.depth import encoded, encoded_relative, read_numbers, values_of
from visft_ds.data.samples import Map, RawSample, Sample
from visft_ds.data.transforms import Crop, Flip, Op, Pad, Resize
from visft_ds.predict.results import Prediction
from visft_ds.randomness import generator
from visft_ds.shards.cli import main as make_shards
from visft_ds.tasks import TASKS
from visft_ds.tasks.depth.config import DepthHeadConfig, DepthLoss, DptHeadConfig
from visft_ds.tasks.depth.data import DepthTargets, depth_targets, moved
from visft_ds.tasks.depth.dpt import DptDepth
from visft_ds.tasks.depth.head import DepthOutput, metres_of
from visft_ds.tasks.depth.loss import DepthCriterion
from visft_ds.tasks.depth.results import depth_results, judged_part, measure_depth
from visft_ds.toy.coco import main as draw_toy

OPTIONS = TASKS["depth"].options("image", {"fixed_size": 32})


def _map(seed: int, *size: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    metres = draw.uniform(1, 9, size).astype(np.float32)
    metres[draw.random(size) < 0.1] = 0
    return metres


def _packed(*maps: np.ndarray, frame: tuple[int, int] | None = None, relative: bool = False) -> DepthTargets:
    samples = []
    for index, values in enumerate(maps):
        target = {"depth": values, "relative": np.array(relative)}
        samples.append(Sample(index, index, values.shape, values.shape, None, 0, {"depth": target}))
    return TASKS["depth"].pack(samples, frame or maps[0].shape)


def test_a_map_moves_with_its_picture() -> None:
    metres = _map(0, 12, 16)
    ops: Sequence[Op] = [Flip(), Resize(24, 32), Crop(-2, 3, 20, 30), Pad(25, 33, 0)]
    fine = metres[:, ::-1].repeat(2, axis=0).repeat(2, axis=1)
    expected = np.pad(np.pad(fine, ((2, 0), (0, 1)))[:20, 3:33], ((0, 5), (0, 3)))
    assert np.array_equal(moved(metres, ops), expected)
    small = F.interpolate(torch.from_numpy(metres)[None, None], (5, 7), mode="nearest-exact")[0, 0]
    assert np.array_equal(moved(metres, [Resize(5, 7)]), small)


def test_what_is_zoomed_is_nearer() -> None:
    """A quarter of a picture at its full size looks twice as large: as from half as far."""
    stored = encoded(np.full((48, 64), 4, np.float32))
    raw = RawSample(0, 0, (48, 64), None, (), (), depth=stored)
    for ops, metres in (
        ([Resize(32, 32)], 4.0),
        ([Crop(12, 16, 24, 32), Resize(32, 32)], 2.0),
        ([Crop(-24, -32, 96, 128), Resize(32, 32)], 8.0),
    ):
        target = depth_targets(OPTIONS, raw, ops, generator(0))
        assert target["depth"].shape == (32, 32) and target["depth"].max() == pytest.approx(metres)
    relative = depth_targets(OPTIONS, replace(raw, depth={**stored, "metres": None}), [*ops], generator(0))
    assert relative["relative"] and relative["depth"].max() == 4000
    without = depth_targets(OPTIONS, replace(raw, depth=None), [*ops], generator(0))
    assert not without["depth"].any() and without["depth"].shape == (32, 32)


def test_cells_have_a_weighted_mean_of_depths() -> None:
    scores = torch.tensor([[-1.0, 0.9, 1.9]])[..., None, None]  # weights 0.1, 1, 2 of 1, 3 and 5 metres
    assert metres_of(scores, 1.0, 5.0).item() == pytest.approx((0.1 + 3 + 10) / 3.1)


#: Our names -> those of transformers' Depth Anything.
THEIRS = {
    **{"conv1.": "head.conv1.", "conv2.": "head.conv2.", "conv3.": "head.conv3."},
    "levels.{n}.out.": "neck.convs.{n}.",
    "levels.{n}.": "neck.reassemble_stage.layers.{n}.",
    "fusions.{n}.skip.conv1.": "neck.fusion_stage.layers.{n}.residual_layer1.convolution1.",
    "fusions.{n}.skip.conv2.": "neck.fusion_stage.layers.{n}.residual_layer1.convolution2.",
    "fusions.{n}.residual.conv1.": "neck.fusion_stage.layers.{n}.residual_layer2.convolution1.",
    "fusions.{n}.residual.conv2.": "neck.fusion_stage.layers.{n}.residual_layer2.convolution2.",
    "fusions.{n}.": "neck.fusion_stage.layers.{n}.",
}


def _their_name(name: str) -> str:
    for ours, theirs in THEIRS.items():
        for number in "0123":
            beginning = ours.replace("{n}", number)
            if name.startswith(beginning):
                return theirs.replace("{n}", number) + name[len(beginning) :]
    raise AssertionError(name)


@pytest.mark.parametrize("grid", [(6, 8), (5, 7)])
def test_the_dpt_head_is_that_of_transformers(grid: tuple[int, int]) -> None:
    """On shared weights: Depth Anything's neck and head for metres."""
    theirs = pytest.importorskip("transformers.models.depth_anything.modeling_depth_anything")
    width, patch = 12, 4
    config = SimpleNamespace(
        **{"reassemble_hidden_size": width, "neck_hidden_sizes": [8, 16, 32, 32], "fusion_hidden_size": 8},
        **{"reassemble_factors": [4, 2, 1, 0.5], "head_in_index": -1, "head_hidden_size": 32},
        **{"patch_size": patch, "depth_estimation_type": "metric", "max_depth": 10.0},
    )
    torch.manual_seed(0)
    neck = theirs.DepthAnythingNeck(config)
    last = theirs.DepthAnythingDepthEstimationHead(config)
    stored = {f"neck.{name}": value for name, value in neck.state_dict().items()}
    stored |= {f"head.{name}": value for name, value in last.state_dict().items()}
    head = DptDepth([(width, patch)] * 4, DptHeadConfig(hidden_dim=8))
    own = [name for name in head.state_dict() if ".channels." not in name]
    head.load_state_dict({name: stored.pop(_their_name(name)) for name in own}, strict=False)
    assert all(".layers.0.residual_layer1." in name for name in stored)  # nobody reads them
    features = [torch.randn(2, width, *grid) for _ in range(4)]
    tokens = [F.pad(map_.flatten(2).mT, (0, 0, 1, 0)) for map_ in features]
    with torch.no_grad():
        expected = last(neck(tokens, *grid), *grid)
        actual = head([map_of(map_, torch.ones(2, *grid, dtype=torch.bool)) for map_ in features]).metres
    assert actual.shape == (2, patch * grid[0], patch * grid[1])
    assert torch.allclose(actual, expected, atol=1e-5) and expected.std() > 1e-3


@pytest.mark.parametrize("strides", [(4, 4, 4, 4), (4, 8, 16)])
def test_the_dpt_head_sees_an_image_alone(strides: tuple[int, ...]) -> None:
    """Whatever it is padded to, and whatever else is in the batch."""
    torch.manual_seed(0)
    head = DptDepth([(12, stride) for stride in strides], DptHeadConfig(hidden_dim=8)).eval()
    pixels = [(48, 64), (32, 48)]
    batch, alone = [], []
    for stride in strides:
        features = torch.randn(2, 12, 48 // stride, 64 // stride)
        batch.append(Map.of(features, torch.tensor(pixels), (48, 64)))
        part = features[1:, :, : 32 // stride, : 48 // stride]
        alone.append(Map.of(part, torch.tensor(pixels[1:]), (32, 48)))
    with torch.no_grad():
        both, one = head(batch).metres, head(alone).metres
    assert both.shape == (2, 48, 64) and torch.allclose(both[1, :32, :48], one[0], atol=1e-6)
    gradients = torch.autograd.grad(head(batch).metres.sum(), list(head.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def _losses(
    metres: torch.Tensor, *targets: DepthTargets, share: tuple[float, float] = (1.0, 1.0)
) -> dict[str, torch.Tensor]:
    criterion = DepthCriterion(DepthLoss())
    divisors = denominators("depth", criterion, *targets)
    return criterion(DepthOutput(metres, torch.tensor([share] * len(metres))), targets[0], divisors)


def test_silog_by_hand_and_gradients_of_a_step() -> None:
    """Errors of log are 0, 0, 1 and 1: variance 1/4, mean 1/2; the void pixel counts nowhere."""
    truth = np.array([[1, 2, 1, 0], [1, 2, 1, 0]], np.float32)
    metres = torch.tensor([[[1, 2, np.e, 5], [1, 2, np.e, 5]]])
    found = _losses(metres, _packed(truth))
    mean = 1 / 3
    assert found["silog"].item() == pytest.approx(np.sqrt(mean - mean**2 + 0.15 * mean**2), rel=1e-5)
    # across: 0 and 1 in each row, mean 1/2; of every second pixel 0 and 2 are neighbours: 1; then alone
    assert found["gradient"].item() == pytest.approx(0.5 + 1.0, rel=1e-5) and found["relative"] == 0
    assert _losses(3 * torch.from_numpy(truth)[None].clamp(min=1), _packed(truth))["gradient"] < 1e-5


def test_the_loss_depends_on_no_division_and_no_padding() -> None:
    maps = [_map(1, 16, 24), _map(2, 16, 24), np.zeros((16, 24), np.float32)]
    metres = torch.rand(3, 8, 12, dtype=torch.float64) * 5 + 1
    whole, every = _packed(*maps), [_packed(feature_map) for feature_map in maps]
    expected = _losses(metres, whole)
    alone = [_losses(metres[n : n + 1], every[n], *every[:n], *every[n + 1 :]) for n in range(3)]
    wider = _packed(*maps, frame=(20, 32))
    padded = F.pad(metres, (0, 4, 0, 2), value=7.0)
    for name, value in expected.items():
        assert torch.allclose(sum(one[name] for one in alone), value, rtol=1e-12)
        assert torch.allclose(
            _losses(padded, wider, share=(16 / 20, 24 / 32))[name], value, rtol=1e-5
        )  # float32 shares


class _Operators(TorchDispatchMode):
    """Counts operators."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_images_of_one_size_are_compared_together() -> None:
    """A GPU waits for the host at some hundred small operators an image."""
    numbers = []
    for images in (2, 16):
        with _Operators() as operators:
            _losses(torch.rand(images, 8, 12) + 1, _packed(*[_map(n, 16, 24) for n in range(images)]))
        numbers.append(operators.number)
    assert numbers[1] < 1.2 * numbers[0]


def test_relative_maps_tell_no_scale_and_no_offset() -> None:
    metres = torch.from_numpy(_map(3, 16, 24)).clamp(min=1)[None]
    exact = _losses(metres, _packed((7 / metres[0] + 3).numpy(), relative=True))
    assert exact["relative"] < 1e-5 and exact["gradient"] < 1e-4 and exact["silog"] == 0
    inverted = _losses(metres, _packed(metres[0].numpy(), relative=True))
    assert inverted["relative"] > 1  # what is nearer must be larger
    gradient = metres.clone().requires_grad_()
    _losses(gradient, _packed((9 - metres[0]).numpy(), relative=True))["relative"].backward()
    assert gradient.grad is not None and gradient.grad.isfinite().all()


def test_metrics_by_hand() -> None:
    """Of 2, 4 and 5 m: 2, 5 and 10; the pixels at 0, and beyond 10 m, do not count.

    Their definitions are those of dinov3/eval/depth/metrics.py; docs/evidence.md has its code's numbers.
    """
    truth = encoded(np.array([[2, 4, 5, 0, 12]], np.float32))
    predicted = encoded(np.array([[2, 5, 11, 1, 1]], np.float32))  # 11 is clipped
    images = {"images": [{"id": 7, "depth": truth}, {"id": 8, "depth": None}]}
    actual = measure_depth(images, [{"image_id": 7, "depth": predicted}], DepthHeadConfig())
    logs = np.log([1, 1.25, 2])
    expected = [
        (0 + 0.25 + 1) / 3,
        np.sqrt((0 + 1 + 25) / 3),
        100 * np.sqrt((logs**2).mean() - logs.mean() ** 2),
        1 / 3,  # 5 / 4 is not within 1.25
        2 / 3,
        2 / 3,
    ]
    assert list(actual.values()) == pytest.approx(expected)
    inverse = encoded(np.array([[0.5, 0.25, 0.2, 0, 1]], np.float32)) | {"metres": None}
    exact = encoded(np.array([[2, 4, 5, 1, 1]], np.float32))
    actual = measure_depth(
        {"images": [{"id": 7, "depth": inverse}]}, [{"image_id": 7, "depth": exact}], DepthHeadConfig()
    )
    assert actual["depth/AbsRel"] < 1e-6 and actual["depth/delta1"] == 1
    # Of a head without a unit, whose numbers are 3 / depth + 1.
    relative = encoded_relative(np.array([[2.5, 1.75, 1.6, 4, 4]], np.float32))
    for image in ({"id": 7, "depth": inverse}, {"id": 7, "depth": exact}):
        images = {"images": [image]}
        actual = measure_depth(images, [{"image_id": 7, "depth": relative}], DepthHeadConfig(relative=True))
        assert actual["depth/AbsRel"] < 1e-4 and actual["depth/delta1"] == 1
    with pytest.raises(ValueError, match="no depth"):
        measure_depth({"images": [{"id": 8, "depth": None}]}, [], DepthHeadConfig())


def test_published_crops() -> None:
    """Eigen's and Garg's, with the numbers of the published code (cleinc/bts)."""
    eigen = np.zeros((480, 640), dtype=bool)
    eigen[45:471, 41:601] = True
    garg = np.zeros((375, 1242), dtype=bool)
    garg[153:371, 44:1197] = True
    assert np.array_equal(judged_part((480, 640)), eigen) and np.array_equal(judged_part((375, 1242)), garg)
    assert judged_part((480, 641)).all()


def test_results_have_the_stored_size_and_millimetres() -> None:
    sizes, stored = torch.tensor([[16, 24], [16, 24]]), torch.tensor([[31, 47], [40, 50]])
    batch = batch_of(2, images=torch.zeros(2, 3, 16, 24), sizes=sizes, original_sizes=stored)
    batch = replace(batch, real=torch.tensor([True, False]))
    metres = torch.rand(2, 8, 12) * 5 + 1
    (result,) = depth_results(DepthOutput(metres, extents_of(batch)), batch)
    expected = F.interpolate(metres[:1, None], (31, 47), mode="bilinear")[0, 0]
    assert result["image_id"] == 1 and np.abs(values_of(result["depth"]) - expected.numpy()).max() < 6e-4
    (result,) = depth_results(DepthOutput(metres, extents_of(batch), relative=True), batch)
    numbers = values_of(result["depth"])
    assert result["depth"]["metres"] is None and numbers.max() == 65_535
    assert np.abs(numbers / (65_535 * expected.min().item()) - 1 / expected.numpy()).max() < 1e-4
    assert "without a unit" in TASKS["depth"].describe([result], {})
    prediction = Prediction(np.zeros((31, 47, 3), np.uint8), None, {}, {"depth": [result]})
    assert not prediction.depth_has_unit and " m" not in repr(prediction)


def test_a_backbone_may_pad_an_image_to_whole_cells() -> None:
    """Six of eight rows of cells show the image, whose own frame has no padding; loss and results agree."""
    size = torch.tensor([[18, 36]])
    batch = batch_of(1, images=torch.zeros(1, 3, 18, 36), sizes=size, original_sizes=2 * size)
    metres = torch.rand(1, 8, 12) * 5 + 1
    output = DepthOutput(metres, torch.tensor([[0.75, 1.0]]))
    inside = metres[:, None, :6]
    (result,) = depth_results(output, batch)
    expected = F.interpolate(inside, (36, 72), mode="bilinear")[0, 0]
    assert np.abs(values_of(result["depth"]) - expected.numpy()).max() < 6e-4

    targets = DepthTargets(
        depth=F.interpolate(inside, (18, 36), mode="bilinear")[:, 0],
        sizes=size,
        known=torch.tensor([18 * 36]),
        relative=torch.tensor([False]),
    )
    divisors = {name: torch.tensor(1.0) for name in ("metric", "images", "relative")}
    losses = DepthCriterion(DepthLoss())(output, targets, divisors)
    assert losses["silog"] < 1e-5 and losses["gradient"] < 1e-5


@pytest.mark.parametrize("how", ["short", pytest.param("whole", marks=pytest.mark.slow)])
def test_the_whole_way(tmp_path: Path, how: str) -> None:
    """From a folder of maps to predictions; `whole`: with a stage 2, a report, a plan and exports besides."""
    write_depth(tmp_path / "data", 6, 2)
    image = {"min_size_train": [28, 42], "max_size_train": 56, "min_size_test": 42, "max_size_test": 56}
    settings = of_one_task("depth", 3, micro_batch=2, image=image)
    if how == "whole":
        settings["visft.tasks.depth"]["head"] = {"type": "dpt", "hidden_dim": 8}
        settings["visft.model.out_indices"] = [0, 1]
        settings["visft.run.visualizations"] = 1
        settings["visft.run.memory_check"] = True
    in_words, shape, least, most = whole_way(tmp_path, "depth", "images/val", settings, whole=how == "whole")
    assert " m" in in_words and shape == [64, 40] and 0 < least <= most <= 10
    names = losses(tmp_path / "stage1")[0].keys()
    assert {"loss/depth/silog", "loss/depth/gradient", "loss/depth/relative"} <= names
    last = tmp_path / ("stage2" if how == "whole" else "stage1")
    measured = json.loads((last / "evaluation-val/metrics.json").read_text())
    assert 0 <= measured["metrics"]["depth/AbsRel"] <= 10 and list(last.glob("**/visualizations/*depth*"))
    (first, _) = json.loads((tmp_path / "found/predictions.json").read_text())["depth"]
    assert first["depth"] == {"file": "depth/0val.png", "metres": 0.001}
    metres = read_numbers((tmp_path / "found/depth/0val.png").read_bytes()).astype(int)
    assert metres.shape == (64, 40)
    if how == "whole":
        assert "depth/AbsRel" in (tmp_path / "report.html").read_text(encoding="utf-8")
        # The second image has the shape that exports scale pictures to.
        folders = (tmp_path / "found/depth", tmp_path / "found-onnx/depth")
        ours, theirs = (read_numbers((folder / "1val.png").read_bytes()) for folder in folders)
        assert ours.shape == (48, 64) and np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("mode", ["sampled", "shared"])
def test_the_same_under_every_engine(tmp_path: Path, mode: str) -> None:
    """One process, and ZeRO-3 on two, beside boxes and captions, from one forward or by turns."""
    words = ["--depth", "--train=8", "--val=2", "--size=64x56"]
    assert draw_toy(["--out", str(tmp_path / "rooms"), *words]) == 0
    assert make_shards([str(tmp_path / "rooms")]) == 0
    options = {"steps": 50_000, "batch_size": 4, "micro_batch": 1, "image": {"fixed_size": 56}}
    extra: dict[str, Any] = {
        "visft.mode": mode,
        "visft.tasks.segmentation": None,
        "visft.tasks.detection.head.dropout": 0.0,
        "visft.tasks.captioning.head.dropout": 0.0,
        "visft.tasks.depth": options,
        "visft.run.eval_every": 0,
        "visft.data.val": "val",
    }
    settings = words_of({**SETTINGS, **extra})
    data = f"--data={tmp_path / 'rooms-shards'}"
    check_engines(tmp_path, ["--stage=1", "--model=debug", data, *settings], "loss/depth/silog")


@pytest.mark.slow
def test_rooms_are_learnt_by_heart(tmp_path: Path) -> None:
    """26 of them, by a linear head on three maps of a network whose weights are real."""
    words = ["--out", str(tmp_path / "rooms"), "--depth", "--train=26", "--val=0", "--size=224x224"]
    assert draw_toy(words) == 0 and make_shards([str(tmp_path / "rooms"), "--split=train"]) == 0
    settings = {
        "visft.tasks": "depth",
        "scheduler.params.total_num_steps": 400,
        "visft.features.views": 1,
        "visft.run.eval_every": 0,
        "visft.shared.image": {"fixed_size": 224, "flip": 0.0},
        "visft.model.out_indices": [2, 4, 6],
        "visft.param_groups": [{"name": "heads", "params": "heads.*", "lr": 3e-3}],
    }
    fit(data=tmp_path / "rooms-shards", out=tmp_path / "run", settings=settings)
    found = evaluate(tmp_path / "run", split="train", visualizations=2).metrics
    assert found["depth/AbsRel"] < 0.08 and found["depth/delta1"] > 0.95, found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['visft.tasks.depth={"image": {"tile": [64, 16]}}'], "whole images"),
        (['visft.tasks.depth={"image": {"paste": 1}}'], "no depth"),
        (['visft.tasks.depth={"head": {"nearest": 10.0}}'], "below farthest"),
        (['visft.tasks.depth={"head": {"type": "plain"}}'], "linear or dpt"),
        (["visft.tasks.depth={}", "visft.mode=shared", "visft.shared.image.tile=[64, 16]"], "whole ones"),
        (["visft.tasks.depth={}", "pipeline.stages=2"], "visft.tasks.depth"),
    ],
)
def test_settings_that_do_not_fit(settings: list[str], message: str) -> None:
    engine = "pipeline" if "pipeline" in settings[-1] else "zero1"
    with pytest.raises(ValueError, match=message):
        resolve(stage=1, engine=engine, model="debug", settings=settings)
