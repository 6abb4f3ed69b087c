"""README.md of an exported folder: what the files are, and code that runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visft_ds.tasks import config_class

_PYTHON = """\
import json
import sys

import numpy as np
import onnxruntime
{read}
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
facts = json.loads(session.get_modelmeta().custom_metadata_map["visft"])
names = [output.name for output in session.get_outputs()]
values = session.run(None, {{"images": images[None]}})
output = {{name: value[0] for name, value in zip(names, values)}}
{use}"""
_READ_COLOURS = """\
from PIL import Image, ImageDraw, ImageOps

picture = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
images = np.asarray(picture)  # (height, width, 3) uint8"""
_READ_BANDS = """\
import tifffile
from PIL import Image, ImageDraw

images = np.atleast_3d(tifffile.imread(sys.argv[1]))
if images.shape[2] != {count}:
    images = np.moveaxis(images, 0, -1)  # (bands, height, width), as many programs write them
images = images[..., {places}].astype("{kind}")  # (height, width, {number}): bands {numbers} of {count}
shown = (images[..., {shown}].astype("float32") - {low:g}) / ({high:g} - {low:g})
picture = Image.fromarray((shown.clip(0, 1) * 255).astype("uint8"))"""
_OBJECTS = """
certain = output["scores"] >= 0.5  # where there are fewer objects than rows, scores are 0
boxes = output["boxes"][certain]{masks}
draw = ImageDraw.Draw(picture)
for box, score, label in zip(boxes, output["scores"][certain], output["labels"][certain]):
    name = facts["categories"][label]["name"]
    print(f"{name} {score:.2f} at {box.round().astype(int).tolist()}")
    draw.rectangle(box.tolist(), outline="red", width=3)
    draw.text((box[0] + 4, box[1] + 2), f"{name} {score:.2f}", fill="red")
picture.save("found.jpg")"""
_MASKS = """
masks = output["masks"][certain]  # (objects, height, width) bool"""
_BOX_MASKS = """


def weights(low, high, pixels, cells):  # of the cells of a box in the pixels of the picture, along an axis
    centres = np.arange(pixels) + 0.5
    places = (centres - low) / max(high - low, 1e-6) * cells - 0.5
    distances = abs(places.clip(0, cells - 1)[:, None] - np.arange(cells))
    return (1 - distances).clip(0) * ((low <= centres) & (centres <= high))[:, None]


masks = []  # (height, width) bool of each object
for (left, top, right, bottom), logits in zip(boxes, output["box_masks"][certain]):
    rows = weights(top, bottom, picture.height, len(logits))
    columns = weights(left, right, picture.width, len(logits))
    masks.append(rows @ logits @ columns.T > 0)"""
_TINT = """
pixels = np.array(picture)
for mask in masks:
    pixels[mask] = pixels[mask] // 2 + np.uint8([127, 0, 0])
picture = Image.fromarray(pixels)"""
_CLASSES = """
for label in np.unique(output["labels"]):  # labels: (height, width), places in the list of categories
    share = (output["labels"] == label).mean()
    print(f"{facts['categories'][label]['name']} {share:.1%}")
Image.fromarray(output["labels"]).save("classes.png")"""
_DEPTH = """
metres = output["depth"]  # (height, width)
print(f"{metres.min():.2f} to {metres.max():.2f} m")
Image.fromarray((1000 * metres).clip(0, 65535).astype(np.uint16)).save("depth.png")  # millimetres"""
_RELATIVE_DEPTH = """
values = output["inverse_depth"]  # (height, width), without a unit: the nearer the larger
Image.fromarray((65535 / values.max() * values).clip(1).astype(np.uint16)).save("depth.png")"""
_SEGMENTS = """
segments = output["segments"]  # (height, width): 1 is the first of scores and labels, 0 is none
for number, (score, label) in enumerate(zip(output["scores"], output["labels"]), 1):
    if label >= 0:
        print(f"{facts['categories'][label]['name']} {score:.2f}, {(segments == number).mean():.1%}")
colours = np.random.default_rng(0).integers(0, 256, (len(output["scores"]) + 1, 3), np.uint8)
Image.blend(picture, Image.fromarray(colours[segments]), 0.6).save("segments.png")"""
_CAPTION = """
step = onnxruntime.InferenceSession("captioning_step.onnx", providers=["CPUExecutionProvider"])
states = dict(zip(names, values))
words = facts["words"]
last = np.array([words.index("<start>")])
caption = []
while words[last[0]] != "<end>" and len(caption) <= facts["max_length"]:
    last, _, states["hidden"], states["state"] = step.run(None, {"words": last, **states})
    caption.append(words[last[0]])
print(" ".join(caption[:-1]))"""
_FEATURES = """
for name, value in output.items():
    print(name, value.shape)"""
_TORCH = """\
import json
import sys

import numpy as np
import torch
{read}

facts = {{"facts.json": ""}}
program = torch.export.load("{file}", extra_files=facts)
facts = json.loads(facts["facts.json"])
with torch.no_grad():
    for name, value in program.module()(images=torch.from_numpy(images)[None]).items():
        print(name, tuple(value.shape))"""
_TEXT = """\
---
library_name: {library}
pipeline_tag: {pipeline}
tags: [vision, visft]
license: other
license_name: {license}
---

# {title}

Written by `visft export` (visft_ds {version}): the whole model, from bytes of a picture to {answer}.

| file | input the network sees | |
|---|---|---|
{files}

{input}

| output | |
|---|---|
| `boxes` | (B, N, 4) left, top, right, bottom in pixels of the picture |
| `scores` | (B, N) from 0 to 1, the best first; 0 where there are fewer than N objects |
| `labels` | (B, N) place in `categories`, -1 without an object; of class maps (B, height, width) |
| `masks` | (B, N, height, width) bool |
| `box_masks` | (B, N, 28, 28) logits in the cells of each box, for a mask inside of it: above 0 is inside |
| `logits` | of semantic segmentation (B, C, h, w); of a caption's step (B, words) |
| `segments` | (B, height, width) of each pixel, its segment's place from 1 in `scores` and `labels`, or 0 |
| `depth` | (B, height, width) metres along the camera's axis |
| `inverse_depth` | in its place after relative maps: no unit, any scale and offset, the nearer the larger |
| `caption_ids` | (B,) the next word of each caption, a place in `words` |

The metadata of each file, under `visft`, has these facts as JSON: categories or words, sizes, licence.

```python
{code}
```

{verified}
{categories}
"""


_COLOURS = """\
`images` is uint8 (B, height, width, 3), RGB, upright, of any size; the pictures of a batch have one size.
Inside, they are scaled to the size above (bilinear with antialias, rounded to bytes), then normalised with
mean {mean} and standard deviation {std} of values from 0 to 1. Feed bytes: do not scale or normalise them
yourself."""
_TILES = """

It has learnt from tiles: cut larger pictures into squares of {side} pixels of which neighbours have at least
{overlap} in common, and join what these show, as `visft predict FOLDER PICTURE` does."""
_BANDS = """\
`images` is {kind} (B, height, width, {number}), bands {numbers} of pictures of {count} bands, of any size;
the pictures of a batch have one size. Inside, values from {low:g} to {high:g} become 0 to 1, those beyond
are cut off; they are scaled to the size above (bilinear with antialias), then normalised with mean {mean}
and standard deviation {std}. Feed the values of the files: do not scale or normalise them yourself."""


def readme(title: str, form: str, facts: Mapping[str, Mapping[str, Any]], lines: Sequence[str]) -> str:
    """The text.

    Args:
        facts: of each file by its name without ending.
        lines: what the comparison with our own predictions said.
    """
    suffix = ".onnx" if form == "onnx" else ".pt2"
    name, first = next(iter(facts.items()))
    task = first["task"]
    read = _READ_COLOURS
    taken = _COLOURS.format(**first)
    if "bands" in first:
        bands = first["bands"]
        numbers = bands["numbers"]
        low, high = bands["range"]
        words = {
            **bands,
            **first,
            "low": low,
            "high": high,
            "number": len(numbers),
            "numbers": ", ".join(map(str, numbers)),
            "places": [band - 1 for band in numbers],
            "shown": [0, 1, 2] if len(numbers) >= 3 else [0, 0, 0],
        }
        read = _READ_BANDS.format(**words)
        taken = _BANDS.format(**words)
    if "tiles" in first:
        side, overlap = first["tiles"]
        taken += _TILES.format(side=side, overlap=overlap)
    code = _TORCH.format(file=name + suffix, read=read)
    if form == "onnx":
        code = _PYTHON.format(file=name + suffix, read=read, use=_use(first))
    rows = []
    for file, of_file in facts.items():
        height, width = of_file["image_size"]
        rows.append(f"| `{file}{suffix}` | {height} x {width} pixels | {of_file['task'] or 'features'} |")
    names = [category["name"] for category in first.get("categories", ())]
    return _TEXT.format(
        library="onnx" if form == "onnx" else "pytorch",
        pipeline="image-feature-extraction" if task is None else config_class(task).hub_task,
        license=first["license"],
        title=title,
        version=first["visft_ds"],
        answer="features" if task is None else "what it shows",
        files="\n".join(rows),
        input=taken,
        code=code,
        verified="\n".join(f"* {line}" for line in lines),
        categories=f"\nCategories: {', '.join(names)}." if names else "",
    )


def _use(facts: Mapping[str, Any]) -> str:
    """Code that shows what a file has found in a picture."""
    task = facts["task"]
    if task == "depth":
        return _RELATIVE_DEPTH if facts["relative"] else _DEPTH
    masks = ""
    if task == "segmentation":
        masks = _MASKS + _TINT
    elif facts.get("box_masks"):
        masks = _BOX_MASKS + _TINT
    others = {None: _FEATURES, "captioning": _CAPTION, "semantic": _CLASSES, "panoptic": _SEGMENTS}
    return others.get(task, _OBJECTS.replace("{masks}", masks))
