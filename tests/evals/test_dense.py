"""Dense benchmarks: labels of every layout, and numbers against an independent computation on random features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from faster_coco_eval import mask as coco_mask
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import map_coordinates

from tests.clip_case import make_clip, save_clip
from tests.evals.test_judge import _record, _run
from visft_ds.evals.judge import dense
from visft_ds.evals.judge.dense import pooled, segment_by_neighbours, segment_linearly
from visft_ds.evals.judge.dense_sets import CELLS, VOID, DenseSet, read_train_and_test
from visft_ds.evals.judge.protocol import ImageSet
from visft_ds.shards.build import Options, build

SIDE = 2 * CELLS  # of the pictures here: a cell is 2 x 2 pixels


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("labels", "parts", "void"), [("annotations", ("training", "validation"), 0), ("labels", ("train", "val"), 255)]
)
def test_label_maps(tmp_path: Path, labels: str, parts: tuple[str, str], void: int) -> None:
    """Class numbers are those of the file, and what the layout, ADE20K's or any, calls void is none."""
    numbers = np.repeat(np.array([[1, 2]], dtype=np.uint8), SIDE // 2, axis=1).repeat(SIDE, axis=0)
    numbers[:20] = void
    for folder in parts:
        _picture(tmp_path / "images" / folder / "one.jpg")
        (tmp_path / labels / folder).mkdir(parents=True)
        Image.fromarray(numbers).save(tmp_path / labels / folder / "one.png")
    train, test = read_train_and_test(str(tmp_path), None, None)
    for part in (train, test):
        assert (part.cells[0, :10] == VOID).all() and part.images.stretched and not part.names
        assert (part.cells[0, 10:, : CELLS // 2] == 1).all() and (part.cells[0, 10:, CELLS // 2 :] == 2).all()


def _box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _coco(root: Path) -> None:
    """A large object by its polygon, a small one on top by its run-length code, one by its box alone, a crowd."""
    code = np.zeros((SIDE, SIDE), np.uint8, order="F")
    code[8:16, 8:16] = 1
    packed = coco_mask.encode(code)
    annotations: list[dict[str, Any]] = [
        {
            "category_id": 9,
            "bbox": [8, 8, 8, 8],
            "segmentation": {"size": [SIDE, SIDE], "counts": packed["counts"].decode()},
        },
        {"category_id": 5, "bbox": [0, 0, 40, 40], "segmentation": _box(0, 0, 40, 40)},
        {"category_id": 5, "bbox": [60, 60, 20, 20], "segmentation": []},
        {"category_id": 9, "bbox": [100, 0, 4, 4], "iscrowd": 1, "segmentation": _box(100, 0, 4, 4)},
    ]
    for number, one in enumerate(annotations):
        one |= {"id": number + 1, "image_id": 1, "area": 1.0, "iscrowd": one.get("iscrowd", 0)}
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        _picture(root / f"{part}2017/1.jpg")
        image = {"id": 1, "file_name": "1.jpg", "height": SIDE, "width": SIDE, "license": 1}
        categories = [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}]
        content = {"images": [image], "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{part}2017.json").write_text(json.dumps(content))


def _check_coco(part: DenseSet) -> None:
    cells = part.cells[0]
    assert part.names == ("cat", "dog") and part.classes == 3
    assert (cells[4:8, 4:8] == 2).all() and (cells[:4, :20] == 1).all() and (cells[30:40, 30:40] == 1).all()
    assert (cells[:2, 50:52] == VOID).all() and (cells[45:] == 0).all()
    assert part.labels.tolist() == [0, 0, 1] and part.owners.tolist() == [0, 0, 0]  # by size; crowds are none
    assert part.masks[2].sum() == 16 * 16 and (part.masks[2, 4:8, 4:8] == 16).all()


def test_outlines_of_a_coco_tree_and_of_shards(tmp_path: Path) -> None:
    tree, shards = tmp_path / "tree", tmp_path / "shards"
    tree.mkdir()
    _coco(tree)
    for part in read_train_and_test(str(tree), None, None):
        _check_coco(part)
    for split in ("train", "val"):
        build(Options(tree / f"{split}2017", tree / f"annotations/instances_{split}2017.json", None, shards, split))
    for part in read_train_and_test(str(shards), None, None):
        _check_coco(part)
        assert part.images.read(0).size == (SIDE, SIDE)


def _random_set(rng: np.random.Generator, images: int) -> DenseSet:
    cells = rng.integers(0, 3, (images, 8, 8)).repeat(7, axis=1).repeat(7, axis=2).astype(np.int16)
    cells[:, :3, :5] = VOID
    masks = rng.integers(0, 17, (2 * images, CELLS, CELLS)).astype(np.uint8)
    masks[:, :, 30:] = 0
    owners = np.arange(2 * images, dtype=np.int64) // 2
    names = [str(number) for number in range(images)]
    pictures = ImageSet(names, lambda place: Image.new("RGB", (8, 8)), "x", stretched=True)
    return DenseSet(pictures, cells, masks, rng.integers(0, 2, 2 * images), owners, ("cat", "dog"))


def _features(rng: np.random.Generator, cells: npt.NDArray[Any], grid: int) -> torch.Tensor:
    """Noise, and something about the class of each place."""
    step = CELLS // grid
    hints = np.stack([cells[:, step // 2 :: step, step // 2 :: step] == number for number in range(3)], axis=1)
    noise = rng.normal(size=(len(cells), 6, grid, grid))
    noise[:, :3] += 2.0 * hints
    return torch.from_numpy(noise).float()


def test_numbers_are_those_of_an_independent_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpolation by scipy, neighbours and overlaps by plain loops, logistic regression by another solver."""
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(dense, "PLACES", 10**9)
    monkeypatch.setattr(dense, "PATCHES", 10**9)
    rng = np.random.default_rng(1)
    train, test = _random_set(rng, 4), _random_set(rng, 3)
    learnt, judged = _features(rng, train.cells, 7), _features(rng, test.cells, 7)

    at = (np.arange(CELLS) + 0.5) * 7 / CELLS - 0.5
    where = np.meshgrid(at, at, indexing="ij")

    def at_cells(maps: torch.Tensor) -> npt.NDArray[np.float64]:
        found = [[map_coordinates(one.double().numpy(), where, order=1, mode="nearest") for one in m] for m in maps]
        return np.array(found).transpose(0, 2, 3, 1)

    x, y = at_cells(learnt).reshape(-1, 6), train.cells.ravel()
    x, y = x[y != VOID], y[y != VOID]
    middle, spread = x.mean(axis=0), np.sqrt(((x - x.mean(axis=0)) ** 2).mean())
    model = LogisticRegression(C=1 / (dense.DECAY * len(y)), solver="newton-cg", tol=1e-9, max_iter=1000)
    model.fit((x - middle) / spread, y)
    expected = model.predict((at_cells(judged).reshape(-1, 6) - middle) / spread).reshape(test.cells.shape)
    said = segment_linearly(learnt, train.cells, judged)
    assert (said == expected).mean() > 0.995  # two solvers stop at other places: cells on the border

    def iou(said: npt.NDArray[Any]) -> float:
        ratios = []
        for number in range(3):
            both = either = 0
            for truth, answer in zip(test.cells.ravel(), said.ravel(), strict=True):
                both += truth == number == answer
                either += truth != VOID and number in (truth, answer)
            ratios.append(both / either)
        return float(np.mean(ratios))

    scores = {
        score.name: score
        for score in dense.dense("dense/x", train, test).scores(
            {"train": {"patches": learnt}, "test": {"patches": judged}}
        )
    }
    assert scores.keys() == {"linear mIoU", "knn mIoU", "objects knn", "objects linear"}
    assert scores["linear mIoU"].value == pytest.approx(iou(said)) and 0.3 < iou(said) < 0.9

    patch = train.cells.reshape(4, 7, 8, 7, 8).transpose(0, 1, 3, 2, 4).reshape(4 * 49, 64).tolist()
    majority = np.array([max((0, 1, 2, VOID), key=cell.count) for cell in patch])
    bank = learnt.numpy().transpose(0, 2, 3, 1).reshape(-1, 6)[majority != VOID]
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    answers = []
    for place in judged.numpy().transpose(0, 2, 3, 1).reshape(-1, 6):
        near = bank @ (place / np.linalg.norm(place))
        votes = np.zeros(3)
        for neighbour in np.argsort(-near)[:20]:
            votes[majority[majority != VOID][neighbour]] += np.exp(near[neighbour] / 0.07)
        answers.append(votes.argmax())
    blown = np.array(answers).reshape(3, 7, 7).repeat(8, axis=1).repeat(8, axis=2)
    assert np.array_equal(segment_by_neighbours(learnt, train.cells, judged, 3), blown)
    assert scores["knn mIoU"].value == pytest.approx(iou(blown))

    means = pooled(judged, test)
    for number, owner in enumerate(test.owners):
        share = test.masks[number].reshape(7, 8, 7, 8).mean(axis=(1, 3))
        mean = (judged[owner].numpy() * share).sum(axis=(1, 2)) / share.sum()
        np.testing.assert_allclose(means[number].numpy(), mean, rtol=1e-5)
    assert len(scores["objects knn"].values) == 6 and scores["objects knn"].groups is not None


def test_the_command_judges_towers_of_every_kind(tmp_path: Path) -> None:
    """With a text side objects are named by text, too."""
    (tmp_path / "tree").mkdir()
    _coco(tmp_path / "tree")
    base = save_clip(make_clip(), tmp_path / "clip.safetensors")
    net = timm.create_model("test_efficientnet", num_classes=0)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "net.safetensors")
    command = [f"clip={base}", f"cnn=timm:test_efficientnet:{tmp_path}/net.safetensors"]
    command += ["--on", f"segmentation={tmp_path}/tree", "--out", tmp_path / "out"]
    status, said, errors = _run(*command)
    assert (status, errors) == (0, "")
    assert "feature shift" not in said  # maps of other shapes
    rows = {row["name"]: row for row in _record(tmp_path / "out")["rows"]}
    numbers = ("linear mIoU", "knn mIoU", "objects knn", "objects linear", "objects text")
    assert list(rows) == [f"segmentation/tree {name}" for name in numbers]
    assert (tmp_path / "out/pictures/segmentation-tree-linear-mIoU.png").is_file()
    assert rows["segmentation/tree objects text"]["values"].keys() == {"clip"}
    assert rows["segmentation/tree linear mIoU"]["items"] == 1 and rows["segmentation/tree objects knn"]["items"] == 3
