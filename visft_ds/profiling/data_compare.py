"""This project's loader against plain webdataset on the same shards: rounds in turn, CPU time of all processes.

CPU time is that of this process and of all its worker processes; a pass counts from before its workers start until they
have ended. Every ratio is formed inside one round, whose passes follow each other; the order of the
passes moves on by one with every round, lest one of them always have the same neighbours.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["WDS_SECURE"] = "1"  # before the import: no shell commands as shard names, no pickles as samples

import numpy as np
import numpy.typing as npt
import orjson
import torch
import webdataset
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.decode import decode_image
from visft_ds.data.loader import StepLoader
from visft_ds.data.open_webdataset import check_secure
from visft_ds.data.plan import generator
from visft_ds.data.samples import RawSample
from visft_ds.data.shards import ShardReader
from visft_ds.monitor.console import Section
from visft_ds.profiling.data import SIDE, MeasuredSet, facts_rows, joint_pipeline, open_set, our_loader
from visft_ds.profiling.harness import CpuClock, circumstances, in_turn, load_row, quartiles, ratio, spread
from visft_ds.shards.reencode import Reencoding
from visft_ds.tasks.vocabulary import Vocabulary

check_secure()  # the program may have imported the library before
FORMAT, VERSION = "visft_ds data comparison", 2
_WORKERS = (0, 1, 2)
#: CLIP's mean and standard deviation of the channels.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WEBDATASET = str(webdataset.__version__)
#: What people write: shards in shuffled order, and a buffer of that many samples.
_SHARD_BUFFER = 100
NAIVE_BUFFER = 1000

WdsSample = dict[str, Any]  # "__key__", "jpg", "json"
SAMPLE = "three-task sample at 224 pixels"


class Rivals(NamedTuple):
    """Two passes whose CPU times are compared."""

    theirs: str
    ours: str


PAIRS = (
    Rivals("naive webdataset, 0 workers", "ours, 0 threads"),
    Rivals("naive webdataset, 2 workers", "ours, 2 threads"),
    Rivals("tuned webdataset, 0 workers", "ours, 0 threads"),
    Rivals("tuned webdataset, 1 workers", "ours, 1 threads"),
    Rivals("tuned webdataset, 2 workers", "ours, 2 threads"),
    Rivals("tuned webdataset, 2 workers", "ours, 2 processes"),
)


@dataclass(frozen=True)
class CompareOptions:
    """Options of the comparison. Raises ValueError for values out of range."""

    folder: Path | None  #: of shards or a COCO tree; None: generated images
    split: str = "train"
    images: int = 512  #: of a pass, at least
    batch: int = 32
    rounds: int = 5
    reencode: str | None = None  #: re-encoding of images, as visft shards takes it

    def __post_init__(self) -> None:
        for name in ("images", "batch", "rounds"):
            if getattr(self, name) < 1:
                flag = "repeats" if name == "rounds" else name
                raise ValueError(f"--{flag} {getattr(self, name)} must be at least 1")
        if self.batch > self.images:
            raise ValueError(f"--batch {self.batch} is more than the --images {self.images} of a pass")


def compare(options: CompareOptions) -> dict[str, Any]:
    """Measure all passes on one set; returns a record of JSON values.

    Raises ValueError where the shards are fewer than the worker processes.
    """
    load = os.getloadavg()
    stored = None if options.reencode is None else Reencoding.parse(options.reencode)
    with open_set(options.folder, options.split, options.images, stored) as data, ShardReader(data.manifest) as reader:
        if data.shards < max(_WORKERS):
            raise ValueError(
                f"{data.name} has {data.shards} shard: webdataset needs one for each of {max(_WORKERS)} worker "
                "processes. Make smaller shards (--max-count), or give the COCO tree itself"
            )
        todo = passes(data, reader, options.batch)
        with quiet():
            found = in_turn(todo, lambda name: measure_pass(todo[name]), options.rounds)
        facts = data.facts()
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(load),
        "webdataset": WEBDATASET,
        "options": {**asdict(options), "folder": None if options.folder is None else str(options.folder)},
        "set": facts,
        "passes": {
            name: {
                "cpu_seconds_per_sample": spread(cost.cpu for cost in costs),
                "wall_samples_per_second": spread(cost.wall for cost in costs),
                "samples": costs[0].samples,
            }
            for name, costs in found.items()
        },
        "ratios": [
            {**pair._asdict(), "ratio": ratio(*((cost.cpu for cost in found[name]) for name in pair))} for pair in PAIRS
        ],
    }


# -------------------------------------------------------------------------------------------------------- passes


def passes(data: MeasuredSet, reader: ShardReader, batch: int) -> dict[str, Callable[[], int]]:
    """The passes that are compared, by name; each returns its number of samples."""
    pipeline, urls, whole = joint_pipeline(data.vocabulary), data.urls, len(data)
    ours = partial(our_loader, data, reader, pipeline, batch)
    as_written = partial(naive, urls, data.vocabulary, batch)
    as_ours = partial(tuned, urls, pipeline, batch, buffer=whole)

    def of_pairs(start: Callable[[], Iterator[Any]]) -> int:
        return sum(len(images) for images, _ in start())

    def of_batches(start: Callable[[], Iterator[Any]]) -> int:
        return sum(len(found.indices) for found in start())

    def of_loader(loader: StepLoader) -> int:
        return sum(len(part.indices) for _, parts in loader.steps(0, whole // batch) for part in parts)

    found: dict[str, Callable[[], int]] = {}
    for workers in (0, 2):
        found[f"naive webdataset, {workers} workers"] = partial(of_pairs, partial(as_written, workers=workers))
    for workers in _WORKERS:
        found[f"tuned webdataset, {workers} workers"] = partial(of_batches, partial(as_ours, workers=workers))
        found[f"ours, {workers} threads"] = partial(of_loader, ours(num_workers=workers))
    for number in _WORKERS[1:]:
        processes = ours(workers="processes", num_workers=number)
        found[f"ours, {number} processes"] = partial(of_loader, processes)
    return found


# ----------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Cost:
    """Cost of a pass."""

    samples: int
    cpu: float  #: seconds of this process and its workers, a sample
    wall: float  #: samples a second


def measure_pass(run: Callable[[], int]) -> Cost:
    """Run a pass and measure its cost; `run` returns its number of samples."""
    clock, wall = CpuClock.start(), time.perf_counter()
    samples = run()
    wall = time.perf_counter() - wall
    return Cost(samples, clock.seconds() / samples, samples / wall)


# --------------------------------------------------------------------------------------------- plain webdataset
#
# `naive` is what people write first; `tuned` has this project's decoder, transforms and collate, and differs in how
# samples are read, shuffled and handed to the consumer alone.


def naive(urls: Sequence[str], vocabulary: Vocabulary, batch: int, *, workers: int) -> Iterator[Any]:
    """Pillow, all masks at full size, torchvision v2 on PIL images, float32: one pass over the shards.

    Yields:
        (images (B, 3, 224, 224) float32, normalised; a list of B targets).
    """
    dataset = (
        _shards(urls, NAIVE_BUFFER)
        .decode("pil")
        .map(partial(_naive_sample, transform=_naive_transform(), vocabulary=vocabulary))
        .batched(batch, collation_fn=_naive_collate)
    )
    return _loaded(dataset, workers)


def tuned(
    urls: Sequence[str],
    pipeline: SamplePipeline,
    batch: int,
    *,
    workers: int,
    buffer: int,
    key_of: Callable[[int], int] = int,
) -> Iterator[Any]:
    """This project's decoder, transforms and collate in a webdataset pipeline: one pass over the shards.

    Args:
        buffer: samples of the shuffle buffer; as many as the set has for a global order.
        key_of: image id -> key of the sample's random numbers.
    """
    dataset = (
        _shards(urls, buffer)
        .map(partial(_tuned_sample, pipeline=pipeline, key_of=key_of))
        .batched(batch, collation_fn=pipeline.collate)
    )
    return _loaded(dataset, workers)


def _shards(urls: Sequence[str], buffer: int) -> Any:
    """Samples of the shards, shuffled by shard and through a buffer of that many samples."""
    dataset = webdataset.WebDataset(list(urls), shardshuffle=_SHARD_BUFFER, seed=0)
    # A full buffer before the first sample leaves it: with the default of 100, early ones would come from few shards.
    return dataset.shuffle(buffer, initial=buffer, seed=0)


def _loaded(dataset: Any, workers: int) -> Iterator[Any]:
    """Batches, made in worker processes unless there are none."""
    if not workers:
        return iter(dataset)
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of webdataset: it leaves closing its files to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def _tuned_sample(sample: WdsSample, *, pipeline: SamplePipeline, key_of: Callable[[int], int]) -> Any:
    label = orjson.loads(sample["json"])
    raw_sample = RawSample(
        index=0,  # a stream does not know
        image_id=label["image_id"],
        size=(label["height"], label["width"]),
        image=decode_image(sample["jpg"]),
        annotations=label["annotations"],
        captions=label["captions"],
    )
    key = key_of(label["image_id"])
    return replace(pipeline.transform(raw_sample, generator(key)), random_key=key)


def _naive_transform() -> Any:
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.Resize((SIDE, SIDE), antialias=True),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
            v2.SanitizeBoundingBoxes(),
        ]
    )


def _naive_sample(sample: WdsSample, *, transform: Any, vocabulary: Vocabulary) -> tuple[Tensor, dict[str, Any]]:
    image: Image.Image = sample["jpg"]
    label: Mapping[str, Any] = sample["json"]
    size = (label["height"], label["width"])  # of the annotations; --reencode may have made the image smaller
    objects = [annotation for annotation in label["annotations"] if not annotation["iscrowd"]]
    boxes = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float32).reshape(-1, 4)
    masks = [torch.from_numpy(full_mask(annotation["segmentation"], size)) for annotation in objects]
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYWH, canvas_size=size),
        "labels": torch.tensor([annotation["category_id"] for annotation in objects], dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.uint8)),
    }
    pixels, target = transform(image, target)
    captions = label["captions"]
    chosen = captions[int(torch.randint(len(captions), ()))] if captions else ""
    target["tokens"] = torch.tensor(vocabulary.encode(chosen))
    return pixels, target


def full_mask(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """(H, W) uint8 0 or 1 of the stored image: polygons or run lengths -> run-length code -> pixels."""
    if isinstance(segmentation, list):
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, *size)
    else:
        code = segmentation
    mask: npt.NDArray[np.uint8] = coco_mask.decode(code)
    return mask


def _naive_collate(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    return torch.stack([pixels for pixels, _ in samples]), [target for _, target in samples]


# -------------------------------------------------------------------------------------------------------- tables


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, tables) of a record: what was read, all passes, the ratios."""
    options = record["options"]
    facts = [
        *facts_rows(record["set"]),
        ("passes", f"{options['rounds']} rounds in turn after 1 to warm up, batches of {options['batch']}"),
        load_row(record, f"before, {record['cores']} cores"),
        ("CPU time", "of this process and its workers, their start included; wall-clock rates depend on the load"),
    ]
    rows = [
        (
            case,
            f"{1e6 * numbers['cpu_seconds_per_sample']['median']:10.1f}",
            quartiles(numbers["cpu_seconds_per_sample"], 1, 1e6),
            f"{1 / numbers['cpu_seconds_per_sample']['median']:10.0f}",
            f"{numbers['wall_samples_per_second']['median']:10.0f}",
        )
        for case, numbers in record["passes"].items()
    ]
    columns = ("", "CPU us a sample", "quartiles", "samples per CPU-second", "samples a second")
    sections = [Section("on", facts), Section(SAMPLE, rows, columns)]
    ratios = [
        (f"{pair['theirs']} / {pair['ours']}", f"{pair['ratio']['median']:.2f}", quartiles(pair["ratio"], 2))
        for pair in record["ratios"]
    ]
    title = f"ratios, pairwise, n {options['rounds']}"
    sections.append(Section(title, ratios, ("CPU time a sample", "ratio", "quartiles")))
    return f"the loader against plain webdataset {record['webdataset']} on {record['set']['name']}", sections
