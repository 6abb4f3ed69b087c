"""Layouts of data sets: what a folder is, and its splits as inputs of a build.

A layout is recognised by the names of its files alone. A folder of two layouts is refused: nobody knows which
annotations are meant.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from visft_ds.data.depth import read_unit
from visft_ds.data.shards import splits_in
from visft_ds.files import checked_name, read_bytes, reading
from visft_ds.shards.common import (
    BYTE_ORDER_MARK,
    CLASSES,
    IMAGE_SUFFIXES,
    SPLITS,
    Exif,
    FolderSplit,
    Json,
    is_split_name,
    json_of,
    listed_image,
    name_here,
    split_of,
)
from visft_ds.shards.depth import FOLDER, DepthMaps
from visft_ds.shards.depth_sets import extract_labelled, list_files, paired_maps, read_pairs
from visft_ds.shards.maps import by_name, map_layouts, read_maps, unpaired
from visft_ds.shards.panoptic import read_panoptic
from visft_ds.shards.tools import LABELME, VOC, read_tool, tool_layouts
from visft_ds.shards.yolo import read_yolo

_PANOPTIC_FILE = re.compile(r"(?:cityscapes_)?panoptic_(.+)\.json")
_YEAR = re.compile(r"^(train|val|test)\d{4}$")
_COCO_FILE = re.compile(r"(?:(instances|maps|captions)_)?(.+)\.json")
_KEYPOINTS_FILE = re.compile(r"person_keypoints_(.+)\.json")
#: COCO files that no split has given its name: of Label Studio, of many converters, and of VIA.
_NAMELESS_COCO = re.compile(r"(result|annotations|.+_coco)\.json")
#: Names of files beside the images of a split, or in its folder.
_ROBOFLOW = ("_annotations.coco.json",)
_CAPTIONS = ("metadata.jsonl", "captions.jsonl")
_LOOKED_FOR = """looked for
  COCO      instances_SPLIT.json, person_keypoints_SPLIT.json, captions_SPLIT.json or SPLIT.json, here
            or in annotations/, images in SPLIT/ or images/; result.json, annotations.json or NAME_coco.json
            with its images in images/ or beside it
  Roboflow  SPLIT/_annotations.coco.json beside the images
  YOLO      data.yaml (names, train, val), images/ and labels/; give the path of one of another name;
            or classes.txt, images/ and labels/*.txt, as Label Studio writes them
  captions  metadata.jsonl or captions.jsonl (file_name, text) beside the images, here or in SPLIT/
  maps      classes.txt, images/SPLIT, labels/SPLIT; ADE20k's, Cityscapes' and CamVid's own folders
  depth     images/SPLIT, depth/SPLIT (16-bit PNG; depth/unit.txt: metres of a number, else 0.001);
            depth/SPLIT may also lie beside any of the others; NYU's and KITTI's folders, with Eigen's lists
            of files or without; nyu_depth_v2_labeled.mat with splits.mat
  panoptic  panoptic_SPLIT.json and the PNG files in panoptic_SPLIT/, here or in annotations/, or
            gtFine/cityscapes_panoptic_SPLIT.json; alone or beside any of the others
  tools     Pascal VOC's XML or labelme's JSON beside each image, or in annotations/ with images/
or name the files: visft shards build --images DIR --instances FILE --out OUT --split train"""
_CVAT = "export the task as `COCO 1.0`, with `Save images` on"
_DEPTH_NUMBERS = (
    "write 16-bit grey PNG of millimetres, or with the word relative in depth/unit.txt of any numbers, the "
    "nearer the larger"
)
#: File of an export that is not read -> what it is, and the export of the same tool that is read.
_OTHER_EXPORTS = {
    "annotations.xml": ("CVAT's XML", _CVAT),
    "obj.data": ("CVAT's YOLO 1.1", _CVAT),
    "labelmap.txt": ("CVAT's segmentation masks", _CVAT),
    "project-*.json": (
        "Label Studio's own JSON",
        "export the project as `COCO with Images` or `YOLO with Images`",
    ),
    "via_*.json": (
        "a project or an export of VIA",
        "choose Annotation, Export Annotations (COCO format) in VIA, and put the file beside the images",
    ),
    "depth/*/*.np[yz]": ("a depth map of NumPy", _DEPTH_NUMBERS),
    "depth/*/*.tif*": ("a depth map as TIFF", _DEPTH_NUMBERS),
    "depth/*/*.pfm": ("a depth map as PFM", _DEPTH_NUMBERS),
    "depth/*/*.exr": ("a depth map as OpenEXR", _DEPTH_NUMBERS),
}
_SHOWN = 8  # names in a message
_DEPTH = "depth maps"  # the layout of a folder that has no other labels
_PANOPTIC = "panoptic maps"  # the same
_PAIRS = "images with depth maps"  # NYU's and KITTI's


def recognise(
    source: Path, only: str | None = None, exif: Exif = None, void: int | None = None
) -> tuple[str, list[FolderSplit], list[Path]]:
    """(layout, its splits, annotations that are not read) of a folder, or of the data.yaml of one.

    `only` is the name of the only split to look for. `exif` is for annotations that state no sizes: those of
    the pictures as stored ("ignore"), or upright. `void` is the number that means no class in label maps.

    Raises:
        ValueError: nothing that is known, or two things; no split of the name; the files of the layout are
            wrong.
    """
    if source.suffix == ".mat" and source.is_file():
        source = extract_labelled(source)
    if source.is_dir():
        # A file of a common name makes no second layout of a folder that is known without it.
        layouts = dict(_layouts(source))
        if not layouts:
            layouts = dict(_layouts_of_tools(source)) or dict(_maps_alone(source))
            _refuse_folder_of_data_sets(source, is_known=bool(layouts))
    elif source.is_file() and source.suffix in (".yaml", ".yml"):
        layouts = {"YOLO": [source]}
    else:
        remedy = (
            "name the folder of the data set, or a file of COCO by --instances, with --images, --out, --split"
        )
        raise ValueError(f"{source} is neither a folder nor a data.yaml: {remedy}")
    if not layouts:
        for pattern, (export, remedy) in _OTHER_EXPORTS.items():
            for path in source.glob(pattern):
                raise ValueError(f"{path} is {export}, which is not read: {remedy}")
        finished = splits_in(source)
        if finished:
            remedy = f"train on them: visft train --data {shlex.quote(str(source))}"
            raise ValueError(f"{source} holds shards already ({', '.join(finished)}); {remedy}")
        content = []
        for path in source.iterdir():
            content.append(f"{path.name}/" if path.is_dir() else path.name)
        content.sort()
        raise ValueError(
            f"{source} is not a data set of a known layout; {_LOOKED_FOR}\nfound {_few(content)}"
        )
    shown = []
    for layout, files in layouts.items():
        names = [str(path.relative_to(source)) for path in files]
        shown.append(f"{layout}: {_few(names)}")
    if len(layouts) > 1:
        remedy = (
            "name the data.yaml of one, or the files by --images, --instances, --captions, --out and --split"
        )
        raise ValueError(f"{source} fits {len(layouts)} layouts, {'; '.join(shown)}; {remedy}")
    match layout:
        case "COCO":
            splits = _coco(source, only)
        case "YOLO":
            splits = read_yolo(files[0], only, exif)
        case "Roboflow" | "captions":
            splits = _beside_images(source, layout, files, only, exif)
        case _ if layout in (VOC, LABELME):
            splits = read_tool(layout, source, only, exif)
        case _ if layout == _DEPTH:
            splits = _read_depth(source, only, exif)
        case _ if layout == _PANOPTIC:
            splits = _read_panoptic(source, only)
        case _ if layout == _PAIRS:
            splits = read_pairs(source, only, exif)
        case _:
            splits = read_maps(layout, source, only, void)
    if not splits:
        raise ValueError(f"{source} has no split {only!r}; it is {shown[0]}")
    splits = [_with_second_pictures(split, source) for split in splits]
    known = [*files, *_panoptic_files(source).values()]
    unread = [path for path in source.glob("annotations/*.json") if path not in known]
    return layout, splits, sorted(unread)


def _refuse_folder_of_data_sets(folder: Path, is_known: bool) -> None:
    """Raise ValueError for a folder above data sets. `is_known`: it has files of tools, which count up to
    three folders below, so that they may be those of a data set in it.
    """
    folders = sorted(folder.glob("*/"))
    inside = [path for path in folders if any(_layouts(path))]
    if inside or not is_known:
        inside += [path for path in folders if any(_layouts_of_tools(path)) or any(_maps_alone(path))]
        inside = sorted(set(inside))
    if inside:
        commands = " or ".join(f"visft shards {shlex.quote(str(path))}" for path in inside[:3])
        raise ValueError(f"{folder} is not a data set; folders in it are: {commands}")


def _few(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(layout, files by which it was recognised) of each data set that a folder holds."""
    coco = [file.path for file in _coco_files(folder)]
    if coco:
        yield "COCO", coco
    folders = [folder, *sorted(path for path in folder.glob("*/") if path.name.lower() in SPLITS)]
    for layout, names in (("Roboflow", _ROBOFLOW), ("captions", _CAPTIONS)):
        paths = [each / name for name in names for each in folders]
        files = [path for path in paths if path.is_file()]
        if files:
            yield layout, files
    if (folder / "data.yaml").is_file():
        yield "YOLO", [folder / "data.yaml"]
    yield from map_layouts(folder)


def _layouts_of_tools(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """The same of data sets as annotation tools export them."""
    coco = [file.path for file in _coco_files_of_tools(folder)]
    if coco:
        yield "COCO", coco
    if (folder / CLASSES).is_file() and (folder / "images").is_dir() and any(folder.glob("labels/**/*.txt")):
        yield "YOLO", [folder / CLASSES]
    yield from tool_layouts(folder)


def _depth_folders(folder: Path) -> dict[str, Path]:
    """Split -> its depth maps."""
    folders = dict[str, Path]()
    for path in sorted(folder.glob(f"{FOLDER}/*/")):
        if any(path.rglob("*.png")):
            folders[_split_of(path.name)] = path
    return folders


def _panoptic_files(folder: Path) -> dict[str, Path]:
    """Split -> the JSON file of its panoptic maps. Raises ValueError for two of one split."""
    files = dict[str, Path]()
    for parent in (folder, folder / "annotations", folder / "gtFine"):
        for path in sorted(parent.glob("*panoptic_*.json")):
            match = _PANOPTIC_FILE.fullmatch(path.name)
            if match is None:
                continue
            split = _split_of(match[1])
            if split in files:
                raise ValueError(f"{folder} has two panoptic files of {split!r}: {files[split]}, {path}")
            files[split] = path
    return files


def _maps_alone(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """The layout of a folder that has depth or panoptic maps and no other labels."""
    folders = list(_depth_folders(folder).values())
    panoptic = list(_panoptic_files(folder).values())
    if folders:
        yield _DEPTH, folders
    elif panoptic:
        yield _PANOPTIC, panoptic
    else:
        pairs = list_files(folder) or paired_maps(folder)
        if pairs:
            yield _PAIRS, pairs


def _read_depth(folder: Path, only: str | None, exif: Exif) -> list[FolderSplit]:
    """The splits of a folder with depth maps alone. Raises ValueError as `read_maps`."""
    splits = list[FolderSplit]()
    for split, maps in _depth_folders(folder).items():
        if only not in (None, split):
            continue
        images = _images_of(folder, maps.name, split)
        if images is None:
            raise ValueError(f"{maps}: there is no folder of its images, such as images/{maps.name}")
        image_of = by_name(images, IMAGE_SUFFIXES)
        map_of = by_name(maps, (".png",))
        findings = unpaired(image_of, map_of, maps, "depth map")
        listed = list[Json]()
        for number, name in enumerate(sorted(image_of.keys() & map_of.keys()), 1):
            listed.append(listed_image(images, str(image_of[name].relative_to(images)), number, exif))
        listing: Json = {"images": listed, "annotations": [], "categories": []}
        depth = DepthMaps(map_of, read_unit(maps.parent), listing)
        splits.append(FolderSplit(split, images, depth=depth, findings=findings))
    return splits


def _read_panoptic(folder: Path, only: str | None) -> list[FolderSplit]:
    """The splits of a folder with panoptic maps alone."""
    splits = list[FolderSplit]()
    for split, path in _panoptic_files(folder).items():
        if only not in (None, split):
            continue
        name = path.stem.partition("panoptic_")[2]
        images = folder / "leftImg8bit" / name
        if not images.is_dir():
            images = _images_of(folder, name, split) or images
        if not images.is_dir():
            raise ValueError(f"{path}: there is no folder of its images, such as images/{name}")
        splits.append(FolderSplit(split, images, panoptic=read_panoptic(path, images)))
    return splits


def _with_second_pictures(split: FolderSplit, source: Path) -> FolderSplit:
    """A split of any layout with the depth and panoptic maps that lie beside its labels."""
    folder = source if source.is_dir() else source.parent
    maps = _depth_folders(folder).get(split.name)
    if maps is not None and split.depth is None:
        split = replace(split, depth=DepthMaps(by_name(maps, (".png",)), read_unit(maps.parent)))
    path = _panoptic_files(folder).get(split.name)
    if path is not None and split.panoptic is None:
        split = replace(split, panoptic=read_panoptic(path))
    return split


def _split_of(name: str) -> str:
    """Name among the shards of a split that is called `name` in a folder; "" if no split may have it."""
    split = split_of(_YEAR.sub(r"\1", name))
    return split if is_split_name(split) else ""


@dataclass(frozen=True)
class _CocoFile:
    """An annotation file of COCO."""

    path: Path
    role: str  #: instances, maps or captions
    split: str
    images: Path | None  #: folder of its images


def _coco_files(folder: Path) -> Iterator[_CocoFile]:
    """The annotation files of COCO in a folder, by their names and those of the folders of images."""
    for path in sorted((*folder.glob("*.json"), *folder.glob("annotations/*.json"))):
        match = _COCO_FILE.fullmatch(path.name)
        if match is None:
            continue
        role, name = match.groups()
        split = _split_of(name)
        images = _images_of(folder, name, split)
        if role:
            yield _CocoFile(path, role, split, images)
        elif name.lower() in SPLITS and images:
            yield _CocoFile(path, "instances", split, images)


def _images_of(folder: Path, name: str, split: str) -> Path | None:
    """The folder of the images of a split that is called `name`, or as other data sets call it."""
    names = [name]
    for path in sorted((*folder.glob("*/"), *folder.glob("images/*/"))):
        if split and _split_of(path.name) == split:
            names.append(path.name)
    for each in names:
        for candidate in (f"{each}/images", f"images/{each}", each):
            if (folder / candidate).is_dir():
                return folder / candidate
    return folder / "images" if (folder / "images").is_dir() else None


def _coco_files_of_tools(folder: Path) -> Iterator[_CocoFile]:
    """COCO files of names that only count where nothing else is recognised."""
    for path in sorted((*folder.glob("*.json"), *folder.glob("annotations/*.json"))):
        match = _KEYPOINTS_FILE.fullmatch(path.name)
        if match is not None:
            split = _split_of(match[1])
            yield _CocoFile(path, "instances", split, _images_of(folder, match[1], split))
        elif _NAMELESS_COCO.fullmatch(path.name):
            yield _CocoFile(path, "instances", "train", _images_of_names(folder, path))


def _images_of_names(folder: Path, path: Path) -> Path:
    """The folder in which the first images of a COCO file are; `images` if they are nowhere."""
    with reading(path, "a COCO file of instances"):
        content = json_of(read_bytes(path))
        names = [str(image["file_name"]) for image in content["images"][:_SHOWN]]
    for candidate in (folder / "images", folder / "JPEGImages", folder):
        if any((candidate / (name_here(candidate, name) or name)).is_file() for name in names):
            return candidate
    return folder / "images"


def _coco(folder: Path, only: str | None) -> list[FolderSplit]:
    """The splits of a folder of COCO."""
    splits = dict[str, dict[str, Path]]()
    files = list(_coco_files(folder)) or list(_coco_files_of_tools(folder))
    for file in files:
        if only not in (None, file.split):
            continue
        if not file.split:
            raise ValueError(
                f"{file.path}: only letters, digits, - and _ are allowed in the name of its split"
            )
        if file.images is None:
            remedy = "export it with its images, or make only another split by --split NAME"
            raise ValueError(f"{file.path}: there is no folder of its images, such as images/: {remedy}")
        files_of = splits.setdefault(file.split, {"images": file.images})
        if file.role in files_of or files_of["images"] != file.images:
            others = _few(list(map(str, files_of.values())))
            raise ValueError(f"{folder} has more than one {file.split!r}: {file.path.name}, {others}")
        files_of[file.role] = file.path
    inputs = list[FolderSplit]()
    for name, files_of in splits.items():
        instances, captions, maps = (files_of.get(role) for role in ("instances", "captions", "maps"))
        inputs.append(FolderSplit(name, files_of["images"], instances, captions, maps))
    return inputs


def _beside_images(
    folder: Path, layout: str, files: Sequence[Path], only: str | None, exif: Exif
) -> list[FolderSplit]:
    """The splits of files that lie beside their images: Roboflow's, or captions."""
    splits = dict[str, FolderSplit]()
    for path in files:
        name = "train" if path.parent == folder else _split_of(path.parent.name)
        if name in splits:
            raise ValueError(f"{folder} has two files of the split {name!r}, one is {path}")
        if only not in (None, name):
            continue
        if layout == "Roboflow":
            splits[name] = FolderSplit(name, path.parent, instances=path)
        else:
            splits[name] = FolderSplit(name, path.parent, captions=read_captions(path, exif))
    return list(splits.values())


def read_captions(path: Path, exif: Exif = None) -> Json:
    """JSON lines of `file_name` and `text`, as image folders of the Hugging Face Hub have them
    (metadata.jsonl), as a COCO file. `caption` or `captions` do as well, each a text or a list of texts;
    images lie beside the file.
    """
    numbers = dict[str, int]()
    captions = list[Json]()
    with reading(path, 'lines such as {"file_name": "a.jpg", "text": "A dog."}'):
        for number, line in enumerate(read_bytes(path).removeprefix(BYTE_ORDER_MARK).splitlines(), 1):
            if line.strip():
                with reading(f"line {number}", "a caption"):
                    name, texts = _parse_caption(line)
                    name = name_here(path.parent, name) or name
                image_id = numbers.setdefault(name, len(numbers) + 1)
                captions += [{"id": number, "image_id": image_id, "caption": text} for text in texts]
        if not numbers:
            raise ValueError("it has no line")
    images = [listed_image(path.parent, name, number, exif) for name, number in numbers.items()]
    return {"images": images, "annotations": captions}


def _parse_caption(line: bytes) -> tuple[str, list[str]]:
    """(file name, captions) of a line."""
    entry = orjson.loads(line)
    values = [entry[key] for key in ("text", "caption", "captions") if key in entry]
    texts = []
    for value in values:
        texts += value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, str) for text in texts):
        raise ValueError("it has no text")
    return checked_name(entry["file_name"], "it"), texts
