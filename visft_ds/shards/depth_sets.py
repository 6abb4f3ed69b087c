"""Published data sets of depth, as they are downloaded: images and depth maps in pairs.

| data set | image | depth map | unit |
|---|---|---|---|
| NYU Depth v2, of BTS | `rgb_00045.jpg` | `sync_depth_00045.png` beside it | mm |
| NYU Depth v2, of DenseDepth | `00001_colors.png` | `00001_depth.png` beside it | mm |
| KITTI | `DRIVE/image_02/data/5.png` | `DRIVE/proj_depth/groundtruth/image_02/5.png` | 1/256 m |
| NYU Depth v2, labelled | both in `nyu_depth_v2_labeled.mat`, beside `splits.mat` | | m |

Lists of files such as Eigen's (`eigen_train_files_with_gt.txt`: an image and its depth map, or None, in a
line) decide which pairs are train, val and test; without them the names of folders do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from visft_ds.data.depth import MILLIMETRES
from visft_ds.files import reading, write_text
from visft_ds.flags import check_extra
from visft_ds.shards.common import (
    SPLITS,
    Exif,
    Findings,
    FolderSplit,
    Json,
    listed_image,
    read_lines,
)
from visft_ds.shards.depth import DepthMaps

_LIST = re.compile(r"(?:.*_)?(train|val|test)_files_with_gt\.txt")
_KITTI_UNIT = 1 / 256
_SYNC = "sync_depth_"  # begins the names of BTS's maps
_KITTI = "proj_depth"  # folder in the path of each of KITTI's maps
_OF_DRIVE = re.compile(r"(.*?)([^/]+)/proj_depth/groundtruth/(image_0\d)/(\d+\.png)")
_EXTRACTED = "extracted.txt"

Pairs = list[tuple[str, str]]  #: paths of an image and its depth map in the folder


def list_files(folder: Path) -> list[Path]:
    """The lists of files in a folder, by their names."""
    return [path for path in sorted(folder.glob("*_files_with_gt.txt")) if _LIST.fullmatch(path.name)]


def paired_maps(folder: Path) -> list[Path]:
    """Depth maps that lie as those of the table, without a list of them."""
    maps = [*folder.rglob(f"{_SYNC}*.png"), *folder.rglob("*_depth.png")]
    return sorted([*maps, *folder.glob(f"**/{_KITTI}/groundtruth/image_0?/*.png")])


def read_pairs(folder: Path, only: str | None, exif: Exif) -> list[FolderSplit]:
    """The splits of a folder with such pairs. Raises ValueError for lists and maps that find no images."""
    splits = list[FolderSplit]()
    lists = list_files(folder)
    by_split = _listed(folder, lists) if lists else _found(folder)
    for split, pairs in by_split.items():
        if only not in (None, split):
            continue
        findings = Findings()
        maps = dict[str, Path]()
        images = list[Json]()
        for number, (image, depth) in enumerate(pairs, 1):
            missing = [name for name in (image, depth) if not (folder / name).is_file()]
            if missing:
                findings.add("image or depth map that is missing", missing[0])
                continue
            maps[str(Path(image).with_suffix(""))] = folder / depth
            images.append(listed_image(folder, image, number, exif))
        findings.refuse_above_a_tenth(len(pairs), folder, f"pairs of {split}")
        unit = _KITTI_UNIT if any(_KITTI in depth for _, depth in pairs) else MILLIMETRES
        listing: Json = {"images": images, "annotations": [], "categories": []}
        splits.append(FolderSplit(split, folder, depth=DepthMaps(maps, unit, listing), findings=findings))
    return splits


def _listed(folder: Path, lists: Sequence[Path]) -> dict[str, Pairs]:
    """Pairs by split, of the lists; their paths begin in the folder, or in one or two folders below it."""
    folders = [folder, *sorted(folder.glob("*/")), *sorted(folder.glob("*/*/"))]
    by_split = dict[str, Pairs]()
    for path in lists:
        match = _LIST.fullmatch(path.name)
        assert match is not None
        if match[1] in by_split:
            raise ValueError(f"{folder} has two lists of {match[1]}: leave {path.name} out of it")
        pairs = Pairs()
        with reading(path, "lines of an image and its depth map"):
            for line in read_lines(path):
                words = line.split()
                if len(words) < 2 or words[1] == "None":  # KITTI has drives without maps
                    continue
                image, depth = (_below(folder, folders, word.lstrip("/")) for word in words[:2])
                pairs.append((image, depth))
            if not pairs:
                raise ValueError("it names no image with a depth map")
        by_split[match[1]] = pairs
    return by_split


def _below(folder: Path, folders: Sequence[Path], name: str) -> str:
    """Path in a folder of what a list calls `name`; the name itself if it is nowhere."""
    if ".." in Path(name).parts:
        raise ValueError(f"{name} leads out of the folder")
    for parent in folders:
        if (parent / name).is_file():
            return str((parent / name).relative_to(folder))
    return name


def _found(folder: Path) -> dict[str, Pairs]:
    """Pairs by split, by the names of files and folders."""
    images = {}
    for path in folder.glob("**/image_0?/data/*"):
        drive = path.parents[2].name
        images[f"{drive}/{path.parents[1].name}/{path.stem}"] = str(path.relative_to(folder))
    by_split = dict[str, Pairs]()
    for path in paired_maps(folder):
        name = path.relative_to(folder).as_posix()
        of_kitti = _OF_DRIVE.fullmatch(name)
        if of_kitti is not None:
            image = images.get(f"{of_kitti[2]}/{of_kitti[3]}/{path.stem}", f"image of {name}")
        else:
            image = str(Path(name).with_name(_partner(path.name)))
        by_split.setdefault(_split_in(Path(name).parts), []).append((image, name))
    return by_split


def _partner(name: str) -> str:
    """Name of the image of a depth map of NYU."""
    if name.startswith(_SYNC):
        return name.replace(_SYNC, "rgb_").replace(".png", ".jpg")
    return name.replace("_depth.png", "_colors.png")


def _split_in(folders: Sequence[str]) -> str:
    """Split of a file in these folders: `train`, unless one has the name of a split, such as nyu2_test."""
    words = [name.lower().rpartition("_")[2] for name in folders]
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def extract_labelled(path: Path) -> Path:
    """Write the images and depth maps of `nyu_depth_v2_labeled.mat` once into a folder of its name beside it,
    as `images/SPLIT` and `depth/SPLIT`; returns the folder.

    Raises ValueError without h5py, or without `splits.mat` beside it.
    """
    folder = path.with_suffix("")
    if (folder / _EXTRACTED).is_file():
        return folder
    check_extra(str(path), "nyu", ("h5py",))
    import h5py  # of the extra [nyu]

    splits = _splits_of(path.with_name("splits.mat"))
    with reading(path, "the labelled part of NYU Depth v2, of HDF5"), h5py.File(path) as file:
        for split, numbers in splits.items():
            for kind in ("images", "depth"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            for number in numbers:
                pixels = np.asarray(file["images"][number - 1]).transpose(2, 1, 0)
                millimetres = np.asarray(file["depths"][number - 1]).T / MILLIMETRES
                name = f"{split}/{number:05d}.png"
                Image.fromarray(pixels).save(folder / "images" / name)
                depth = Image.fromarray(millimetres.round().clip(0, 65_535).astype(np.uint16))
                depth.save(folder / "depth" / name)
    write_text(folder / _EXTRACTED, f"{path.name}, depth in millimetres\n")
    return folder


def _splits_of(path: Path) -> Mapping[str, list[int]]:
    """Split -> numbers of its images, from 1."""
    from scipy.io import loadmat  # takes a quarter of a second

    if not path.is_file():
        raise ValueError(
            f"{path} is missing, which says which images are for training: it is published beside the data "
            "(http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat)"
        )
    with reading(path, "the splits of NYU Depth v2"):
        content = loadmat(path)
        names = {"train": "trainNdxs", "val": "testNdxs"}
        return {split: content[name].ravel().astype(int).tolist() for split, name in names.items()}
