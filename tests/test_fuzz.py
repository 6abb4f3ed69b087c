"""Damaged files for every reader: a correct result, a ValueError or an OSError; no traceback, no hang,
bounded memory.

python -m tests.test_fuzz --inputs 75000 --seed 9
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import finished
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
SECONDS = 20  # of CPU, of one input: a busy machine takes any time
WAITING = 600  # seconds on the clock, which only what hangs takes
ROOM = 6 * 2**30  # bytes of address space beyond what the process has at its start


@dataclass(frozen=True)
class Reader:
    """Reader of files: `make` writes valid ones into a folder, `read` reads all; one is damaged before each
    read.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def readers(runs: Path, shards: Path) -> list[Reader]:
    """Readers of everything that comes from outside, which read copies of these finished runs and shards."""
    import numpy as np
    import tifffile
    import torch
    from PIL import Image

    from tests.labels import use_labels, write_labels
    from tests.map_folder import bands, write_own, write_pair
    from tests.yolo_folder import write_yolo
    from visft_ds.checkpoint.format import open_checkpoint
    from visft_ds.config.record import recorded_config
    from visft_ds.data.shards import Manifest, ShardReader
    from visft_ds.evals.judge.classes import read_classes
    from visft_ds.evals.judge.dense_sets import read_depth, read_train_and_test
    from visft_ds.evals.judge.kinds import Request
    from visft_ds.evals.judge.ocr import read_words
    from visft_ds.evals.judge.protocol import QUICK
    from visft_ds.evals.judge.retrieval import read_captions
    from visft_ds.files import image_frame, open_image, read_bands
    from visft_ds.interop.layouts import MODEL, built, load_backbone, model_in, model_of
    from visft_ds.interop.published import read_adapter
    from visft_ds.interop.weights import open_weights, save_tensors
    from visft_ds.models.timm_backbone import build_timm
    from visft_ds.monitor.metrics import read_metrics
    from visft_ds.predict.model import load
    from visft_ds.shards.bands import tiff_of
    from visft_ds.shards.build import build
    from visft_ds.shards.layouts import recognise
    from visft_ds.shards.options import Options

    def copied(*files: Path) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            for file in files:
                shutil.copy(file, folder)

        return make

    def tree(source: Path) -> Callable[[Path], object]:
        return lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True)

    def read_split(folder: Path) -> None:
        reader = ShardReader(Manifest.load(folder, "val"))
        for index in range(len(reader)):
            reader.read(index)

    def read_tree(folder: Path) -> None:
        _, splits, _ = recognise(folder)
        for number, split in enumerate(splits):
            build(Options(**{**vars(split), "name": "toy"}, out=folder / f"out{number}"))

    def write_pickles(folder: Path) -> None:
        tensors = {"state_dict": {"module.a": torch.ones(2, 3), "module.b": torch.ones(3).half()}, "step": 3}
        torch.save(tensors, folder / "zip.pt")
        torch.save(tensors, folder / "legacy.pth", _use_new_zipfile_serialization=False)

    def read_pickles(folder: Path) -> None:
        for path in folder.iterdir():
            for one in open_weights(path).values():
                one.read()

    def write_backbones(folder: Path) -> None:
        shutil.copy(runs / "stage2/export/backbone.safetensors", folder / "eva.safetensors")
        tower = build_timm("test_vit", layers=(0, 1))
        tensors = {name: value.contiguous() for name, value in tower.state_dict().items()}
        save_tensors(folder / "timm.safetensors", tensors, {MODEL: json.dumps(model_of(tower))})

    def read_backbones(folder: Path) -> None:
        for path in folder.iterdir():
            load_backbone(path)

    def read_adapters(folder: Path) -> None:
        adapter = read_adapter(folder)
        adapter.describe(), adapter.fingerprint()
        adapter.install(built(base, "meta"))
        for name in adapter.weights():
            adapter.delta(name)

    def read_run(folder: Path) -> None:
        recorded_config(folder)
        list(read_metrics(folder / "metrics.jsonl"))

    def pictures(folder: Path) -> None:
        picture = Image.effect_noise((40, 30), 60).convert("RGB")
        for kind in ("jpg", "png", "webp", "bmp", "gif", "tif"):
            picture.save(folder / f"a.{kind}", exif=Image.Exif().tobytes())

    def pictures_of_bands(folder: Path) -> None:
        values = np.random.default_rng(0).integers(0, 4096, (30, 40, 5)).astype(np.uint16)
        tifffile.imwrite(folder / "a.tif", values, photometric="minisblack", planarconfig="contig")
        (folder / "b.tif").write_bytes(tiff_of(values))

    def read_pictures_of_bands(folder: Path) -> None:
        for path in folder.iterdir():
            read_bands(path), image_frame(path)

    def write_judged(folder: Path) -> None:
        numbers, metres = bands(0), np.array([900, 2000, 4000], dtype=np.uint16)
        for part in ("train", "val"):
            write_pair(folder / f"JPEGImages/{part}.jpg", folder / f"SegmentationClass/{part}.png", numbers)
            write_pair(folder / f"images/{part}/0.png", folder / f"depth/{part}/0.png", numbers, metres)
            listed = folder / f"ImageSets/Segmentation/{part}.txt"
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_text(part)
        (folder / "gt.txt").write_text('images/train/0.png, "word"')
        images = [{"filename": "train.jpg", "split": "test", "sentences": [{"raw": "bands"}]}]
        (folder / "dataset_own.json").write_text(json.dumps({"images": images}))

    def read_judged(folder: Path) -> None:
        for read in (read_train_and_test, read_depth):
            for part in read(Request(QUICK, "x", str(folder))):
                part.label(0), part.images.read(0)
        read_words(folder), read_captions(str(folder)), read_classes(str(folder), "images")

    base = model_in(open_weights(runs / "stage2/export/backbone.safetensors"))
    return [
        Reader("split", copied(*shards.glob("val*")), read_split),
        Reader("labels", write_labels, use_labels),
        Reader("COCO tree", tree(shards.parent / "toy"), read_tree),
        Reader("YOLO folder", write_yolo, read_tree),
        Reader("label maps", write_own, read_tree),
        Reader("judged data", write_judged, read_judged),
        Reader("pictures", pictures, lambda folder: [open_image(path) for path in folder.iterdir()]),
        Reader("pictures of bands", pictures_of_bands, read_pictures_of_bands),
        Reader("pickles", write_pickles, read_pickles),
        Reader("backbones", write_backbones, read_backbones),
        Reader("adapters", copied(*(runs / "stage2/export/adapter").glob("adapter_*")), read_adapters),
        Reader("export", tree(runs / "stage1/export"), load),
        Reader("run", copied(runs / "stage2/run.json", runs / "stage2/metrics.jsonl"), read_run),
        Reader("checkpoint", tree(runs / "stage2/checkpoints/step_00000004"), open_checkpoint),
    ]


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 2**70, 1e308, float("nan"), float("inf"), 0.5),
    *("", "../../x", "/etc/passwd", "\ud800", "a" * 100_000, "x\0y", [], {}, [[[[]]]], {"a": {}}, [0] * 1000),
    *(
        [1, 1, 9, 1, 1e8, -1e8],
        [[1, 1, 9, 1, 1e300, 9]],
        {"size": [9, 9], "counts": "P"},
        "0" * 1000,
        "o" * 30,
    ),
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with one mistake: bits, length, a block, or a value of the JSON that it is or has as its
    header.
    """
    kind = rng.choice(("bits", "cut", "block", "twice", "json", "json", "json"))
    if kind == "json":
        with contextlib.suppress(ValueError, struct.error, UnicodeError, RecursionError):
            if data[:1] in (b"{", b"["):
                lines = data.splitlines(keepends=True) if data.count(b"\n{") else [data]
                place = rng.randrange(len(lines))
                lines[place] = _changed(lines[place], rng) + b"\n" * lines[place].endswith(b"\n")
                return b"".join(lines)
            (length,) = struct.unpack("<Q", data[:8])  # a safetensors file
            if data[8:9] == b"{" and length < len(data):
                header = _changed_header(data[8 : 8 + length], rng)
                return struct.pack("<Q", len(header)) + header + data[8 + length :]
        kind = "bits"
    changed, place = bytearray(data or b"\0"), rng.randrange(max(1, len(data)))
    if kind == "bits":
        for _ in range(rng.choice((1, 1, 3, 20))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "block":
        size = rng.choice((1, 8, 64, 4096))
        changed[place : place + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    else:
        changed[place:place] = changed[place : place + rng.choice((1, 100, 10_000))]
    return bytes(changed)


def _changed_header(text: bytes, rng: random.Random) -> bytes:
    """Header of a safetensors file with one value changed: mostly in the JSON that is one of its entries, if
    any is.
    """
    header = json.loads(text)
    entries = header.get("__metadata__", {})
    nested = [name for name, entry in entries.items() if entry.startswith("{")]
    if not nested or rng.random() < 0.2:
        return _changed(text, rng)
    name = rng.choice(nested)
    entries[name] = _changed(entries[name].encode(), rng).decode()
    return json.dumps(header).encode()


def _changed(text: bytes, rng: random.Random) -> bytes:
    """JSON with one value replaced, removed, renamed or nested deeply."""
    content = json.loads(text)
    holders: list[Any] = [content]
    for holder in holders:  # grows on the way
        holders += [
            one
            for one in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(one, dict | list)
        ]
    holder = rng.choice([one for one in holders if one] or [content])
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    what = rng.choice(("value", "value", "value", "drop", "rename", "deep"))
    if what == "drop":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[rng.choice(("x", "__class__", str(key) + " "))] = holder.pop(key)
    else:
        holder[key] = "DEEP" if what == "deep" else rng.choice(VALUES)
    return json.dumps(content).replace('"DEEP"', "[" * 3000 + "]" * 3000).encode()


def run(inputs: int, seed: int, made: Sequence[Path], only: str | None = None) -> list[str]:
    """Surprises, each with reader, number of the input and what happened."""
    chosen = [reader for reader in readers(*made) if only in (None, reader.name)]
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _too_long)
    surprises: list[str] = []
    for reader in chosen:
        with tempfile.TemporaryDirectory() as place:
            valid = Path(place, "valid")
            valid.mkdir()
            reader.make(valid)
            reader.read(
                Path(shutil.copytree(valid, Path(place, "whole")))
            )  # raises if the reader refuses valid files
            files = sorted(path.relative_to(valid) for path in valid.rglob("*") if path.is_file())
            refused, began = 0, time.monotonic()
            for number in range(-(-inputs // len(chosen))):
                rng = random.Random(f"{seed} {reader.name} {number}")
                folder, file = Path(place, "damaged"), rng.choice(files)
                shutil.copytree(valid, folder)
                (folder / file).write_bytes(damaged((valid / file).read_bytes(), rng))
                try:
                    signal.alarm(WAITING)
                    signal.setitimer(signal.ITIMER_PROF, SECONDS)
                    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        reader.read(folder)
                except (ValueError, OSError):
                    refused += 1
                except (Exception, TooLong):  # noqa: BLE001
                    surprises.append(f"{reader.name} {number} {file}: {traceback.format_exc(limit=-4)}")
                finally:
                    signal.alarm(0)
                    signal.setitimer(signal.ITIMER_PROF, 0)
                shutil.rmtree(folder)
            print(
                f"{reader.name:12} {number + 1} inputs, {refused} refused, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return surprises


class TooLong(BaseException):
    """An input took more than `SECONDS` or `WAITING`."""


def _too_long(number: int, frame: object) -> None:
    raise TooLong


def test_damaged_files_are_read_correctly_or_refused() -> None:
    made = (str(finished.runs()), str(finished.shards()))
    run_ranks(["tests/test_fuzz.py", "--inputs", "40", "--made", *made], world=1)


def test_a_picture_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    from visft_ds.files import open_image

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    with pytest.raises(ValueError, match="pixels"):
        open_image(tmp_path / "a.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.test_fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one reader")
    parser.add_argument(
        "--made", nargs=2, type=Path, metavar=("RUNS", "SHARDS"), help="what `tests.finished` made"
    )
    given = parser.parse_args(arguments)
    made = given.made or (finished.runs(), finished.shards())
    surprises = run(given.inputs, given.seed, made, given.only)
    print("\n".join(surprises[:50]), f"{len(surprises)} surprises", sep="\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
