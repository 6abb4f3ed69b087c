"""Depth maps in shards: byte for byte, alone or beside other labels; what cannot be meant is refused."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.depth_folder import slope, write_depth
from tests.map_folder import write_own
from visft_ds.data.dataset import labels_of_split, read_raw
from visft_ds.data.depth import encoded, values_of
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.judge.dense_sets import read_depth
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.prepare.settle import settle
from visft_ds.shards.cli import main


def test_maps_are_stored_byte_for_byte_and_permuted_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, shards = write_depth(tmp_path / "data"), tmp_path / "data-shards"
    assert main([str(folder)]) == 0 and "data: depth maps, train, val" in capsys.readouterr().out
    assert main(["verify", str(shards)]) == 0
    manifest = Manifest.load(shards, "train")
    assert manifest.labels == {"depth"} and manifest.counts["depth"] == 8 and manifest.counts["empty"] == 0
    labels = list(labels_of_split(ShardReader(manifest)))
    files = [(folder / "depth/train" / label["file_name"]).read_bytes() for label in labels]
    assert [base64.b64decode(label["depth"]["png"]) for label in labels] == files
    visft = settle(["--data", str(shards)]).config.visft  # the command that it prints
    assert list(visft.tasks.enabled()) == ["depth"] and visft.run.keep_best == "depth/delta1"
    assert visft.shared is not None and visft.shared.image.keep_shape
    unjudged = settle(["--data", str(shards), "--set", "visft.run.eval_every=0"]).config.visft
    assert unjudged.run.keep_best is None
    assert main(["permute", str(shards), "--out", str(tmp_path / "control"), "--seed", "1"]) == 0
    assert main([str(tmp_path / "control")]) == 0
    control = ShardReader(Manifest.load(tmp_path / "control-shards", "train"))
    by_id = {label["image_id"]: label for label in labels}
    for index in range(8):
        raw = read_raw(control, index)
        label = by_id[raw.image_id]  # both number their images in the order of their names
        assert raw.depth == label["depth"] and raw.size == (label["height"], label["width"])


def test_units_and_relative_maps(tmp_path: Path) -> None:
    for unit, metres in (("0.00390625", 1 / 256), ("relative", None)):
        folder = write_depth(tmp_path / unit, 2, 2, unit=unit)
        assert main([str(folder)]) == 0
        manifest = Manifest.load(Path(f"{folder}-shards"), "train")
        (first, _) = sorted(labels_of_split(ShardReader(manifest)), key=lambda label: label["file_name"])
        assert first["depth"]["metres"] == metres and manifest.options["depth"] == (metres or unit)
        values = values_of(first["depth"])
        head = settle(["--data", str(manifest.root)]).config.visft.tasks.depth.head
        assert (head.farthest, head.relative) == (10.0, metres is None)  # the defaults hold such depths
        if metres is None:
            assert manifest.farthest is None
            with pytest.raises(ValueError, match="relative"):
                read_depth(Request(QUICK, "x", str(folder)))
        else:
            assert np.abs(values - slope(0, 64, 40)).max() < 1 / 512 + 1e-6
            judged, _ = read_depth(Request(QUICK, "x", str(folder)))
            assert np.array_equal(judged.label(0), values)
    folder = write_depth(tmp_path / "outdoors", 2, 2, unit="0.00390625")
    (folder / "depth/unit.txt").write_text("0.0625")
    assert main([str(folder)]) == 0
    manifest = Manifest.load(Path(f"{folder}-shards"), "train")
    largest = 16 * max(slope(0, 64, 40).max(), slope(1).max())
    assert manifest.farthest == pytest.approx(largest, rel=0.01)
    config = settle(["--data", str(manifest.root)]).config
    assert config.visft.tasks.depth.head.farthest == np.ceil(manifest.farthest)
    reasons = {key: why for key, _, why in config.decisions}
    reason = reasons["visft.tasks.depth.head.farthest"]
    assert reason == f"the data, whose depths reach {manifest.farthest:.1f} m"
    own = settle(["--data", str(manifest.root), "--set", "visft.tasks.depth.head.farthest=80"]).config
    assert own.visft.tasks.depth.head.farthest == 80
    far = np.array([[0, 70.0, 1.5]], dtype=np.float32)  # more than 16 bits of millimetres
    assert encoded(far)["metres"] == 1 / 256 and np.array_equal(values_of(encoded(far)), far)


def test_depth_beside_label_maps(tmp_path: Path) -> None:
    """One image of nine has no depth map: it still teaches the classes."""
    write_own(tmp_path / "data", 8, 2)
    write_depth(tmp_path / "depth", 7, 2)
    shutil.copytree(tmp_path / "depth/depth", tmp_path / "data/depth")
    assert main([str(tmp_path / "data")]) == 0
    manifest = Manifest.load(tmp_path / "data-shards", "train")
    assert manifest.labels == {"maps", "depth"} and manifest.counts["depth"] == 7
    assert manifest.findings["image without depth map (kept)"][0] == 1
    assert set(settle(["--data", str(manifest.root)]).config.visft.tasks.enabled()) == {"semantic", "depth"}


def _saved(image: Image.Image) -> Callable[[Path], object]:
    return lambda folder: [image.save(path) for path in folder.glob("depth/train/*.png")]


def _written(content: bytes) -> Callable[[Path], object]:
    return lambda folder: [path.write_bytes(content) for path in folder.glob("depth/train/*.png")]


def _renamed(suffix: str) -> Callable[[Path], object]:
    return lambda folder: [path.rename(path.with_suffix(suffix)) for path in folder.glob("depth/*/*.png")]


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_saved(Image.new("RGB", (40, 64))), "16-bit grey PNG"),
        (_saved(Image.new("L", (40, 64))), "16-bit grey PNG"),
        (_saved(Image.new("I;16", (9, 9), 1)), "another size"),
        (_saved(Image.new("I;16", (40, 64))), "without a depth"),
        (_written(b"II*\0 float"), "of another kind"),
        (_renamed(".npy"), "16-bit grey PNG of millimetres, or with the word relative"),
        (lambda folder: (folder / "depth/train/1train.png").unlink(), "without depth map"),
        (lambda folder: shutil.rmtree(folder / "images"), "no folder of its images"),
        (lambda folder: (folder / "depth/unit.txt").write_text("-1"), "above 0"),
    ],
)
def test_what_is_refused(
    spoil: Callable[[Path], object], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(write_depth(tmp_path, 4, 1))
    assert main([str(tmp_path), "--out", str(tmp_path / "shards"), "--split", "train"]) == 2
    assert word in capsys.readouterr().err


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def _metres_of(shards: Path, split: str) -> dict[str, np.ndarray]:
    """Name of an image -> its depth."""
    labels = labels_of_split(ShardReader(Manifest.load(shards, split)))
    return {label["file_name"]: values_of(label["depth"]) for label in labels}


@pytest.mark.parametrize("listed", [True, False])
def test_kitti_as_it_is_downloaded(tmp_path: Path, listed: bool) -> None:
    """Drives of raw pictures, maps of some of them in folders of their own, and Eigen's lists or none."""
    shade = np.full((40, 64, 3), 90, np.uint8)
    numbers = np.full((40, 64), 512, np.uint16)  # two metres
    lines = []
    for day, split in ((1, "train"), (2, "val")):
        drive = f"2011_09_26_drive_000{day}_sync"
        for index in range(3):
            image = f"2011_09_26/{drive}/image_02/data/{index:010d}.png"
            depth = f"{drive}/proj_depth/groundtruth/image_02/{index:010d}.png"
            _save(tmp_path / "data/raw" / image, shade)
            if index:
                _save(tmp_path / "data/data_depth_annotated" / split / depth, numbers)
            lines.append(f"{image} {depth if index else None} 721.5377")
    if listed:
        for split in ("train", "test"):
            path = tmp_path / f"data/eigen_{split}_files_with_gt.txt"
            path.write_text("\n".join(lines[:3] if split == "train" else lines[3:]))
    assert main([str(tmp_path / "data")]) == 0
    for split in ("train", "test" if listed else "val"):
        found = _metres_of(tmp_path / "data-shards", split)
        assert len(found) == 2 and all((values == 2).all() for values in found.values()), split


def test_nyu_as_bts_and_densedepth_have_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shade = np.full((40, 64, 3), 90, np.uint8)
    for index in range(11):
        scene = tmp_path / "bts/sync/kitchen_0028b"
        _save(scene / f"rgb_{index:05d}.jpg", shade)
        _save(scene / f"sync_depth_{index:05d}.png", np.full((40, 64), 3000, np.uint16))
    (tmp_path / "bts/nyudepthv2_train_files_with_gt.txt").write_text(
        "\n".join(
            f"/kitchen_0028b/rgb_{n:05d}.jpg /kitchen_0028b/sync_depth_{n:05d}.png 518.8" for n in range(11)
        )
    )
    (tmp_path / "bts/sync/kitchen_0028b/rgb_00004.jpg").unlink()
    assert main([str(tmp_path / "bts")]) == 0 and "1 x image or depth map" in capsys.readouterr().out
    found = _metres_of(tmp_path / "bts-shards", "train")
    assert len(found) == 10 and all((values == 3).all() for values in found.values())
    for index in range(4):
        folder = tmp_path / "dense" / ("nyu2_test" if index % 2 else "nyu2_train/kitchen")
        _save(folder / f"{index:05d}_colors.png", shade)
        _save(folder / f"{index:05d}_depth.png", np.full((40, 64), 1500, np.uint16))
    assert main([str(tmp_path / "dense")]) == 0
    for split in ("train", "test"):
        assert [values.max() for values in _metres_of(tmp_path / "dense-shards", split).values()] == [
            1.5,
            1.5,
        ]


def test_nyu_of_its_labelled_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    path.write_bytes(b"no HDF5")
    h5py = pytest.importorskip("h5py") if find_spec("h5py") else None
    if h5py is None:
        assert main([str(path)]) == 2 and "needs h5py" in capsys.readouterr().err
        return
    savemat = pytest.importorskip("scipy.io").savemat
    assert main([str(path)]) == 2 and "splits.mat is missing" in capsys.readouterr().err
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[1], [3]], "testNdxs": [[2]]})
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (3, 3, 64, 48), dtype=np.uint8)
    depths = draw.uniform(1, 9, (3, 64, 48)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["images"] = images
        file["depths"] = depths
    assert main([str(path), "--out", str(tmp_path / "shards")]) == 0
    assert len(_metres_of(tmp_path / "shards", "train")) == 2
    (values,) = _metres_of(tmp_path / "shards", "val").values()
    assert np.abs(values - depths[1].T).max() < 6e-4
    raw = read_raw(ShardReader(Manifest.load(tmp_path / "shards", "val")), 0)
    assert np.array_equal(raw.image, images[1].transpose(2, 1, 0))
