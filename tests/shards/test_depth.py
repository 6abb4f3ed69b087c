"""Depth maps in shards: byte for byte, alone or beside other labels; what cannot be meant is refused."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable
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
        if metres is None:
            with pytest.raises(ValueError, match="relative"):
                read_depth({"train": 2, "test": 2}, str(folder))
        else:
            assert np.abs(values - slope(0, 64, 40)).max() < 1 / 512 + 1e-6
            judged, _ = read_depth({"train": 2, "test": 2}, str(folder))
            assert np.array_equal(judged.label(0), values)
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


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_saved(Image.new("RGB", (40, 64))), "16-bit grey PNG"),
        (_saved(Image.new("L", (40, 64))), "16-bit grey PNG"),
        (_saved(Image.new("I;16", (9, 9))), "another size"),
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
