"""The planner against measurements: the same configurations predicted, and made to train on made-up batches.

Every process measures its part of a real step of a real engine by following storages (`ledger`); the prediction is made
from the configuration and the number of objects and words alone. One process measures what needs one, two processes
what is divided between two.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from visft_ds.config import ResolvedConfig, deepspeed_dict, resolve
from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import Stream
from visft_ds.costs.hardware import DTYPES
from visft_ds.costs.ledger import OTHER, Ledger
from visft_ds.data.roles import Place
from visft_ds.data.samples import Batch
from visft_ds.models.eva_vit import Block
from visft_ds.monitor.console import Section
from visft_ds.parallel import distributed
from visft_ds.parallel.build import build_engine
from visft_ds.parallel.engine import Schedule, start_process_group
from visft_ds.planner import run_of
from visft_ds.planner.cluster import Rates, step_time
from visft_ds.planner.meta_step import traced_as
from visft_ds.planner.step import plan_stream
from visft_ds.prepare.model import prepare_model
from visft_ds.profiling.memory import live_tensors, note_gradients, note_residents, step_watched
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.segmentation.data import SegmentationTargets
from visft_ds.tasks.segmentation.masks import grid_size
from visft_ds.tasks.spec import Content
from visft_ds.tasks.vocabulary import Vocabulary

FORMAT, VERSION = "visft_ds plan validation", 1
#: Objects to an image; ids of the first caption (8 words, <start>, <end>; each further one has one more); words.
OBJECTS, FIRST_IDS, VOCABULARY = 5, 10, 300
_LENGTHS = 11  #: of captions; from there on the first ones again
_PATCH, _MASK_STRIDE = 14, 4  # pixels: of a patch, and of a cell of the target masks
TOLERANCE = 0.10  #: of memory
_MIB = 2**20
#: Larger than any gradient of these models but small beside their activations, so that it decides no comparison.
_BUCKET = "zero_optimization.reduce_bucket_size=400000"
_WIDE = 'visft.model.overrides={"width": 192, "depth": 6, "num_heads": 4}'
_LARGE = (
    _WIDE,
    "visft.tasks.detection.image.fixed_size=224",
    "visft.tasks.segmentation.image.fixed_size=224",
    "visft.tasks.captioning.image.size=224",
    *(f"visft.tasks.{task}.micro_batch=4" for task in ("detection", "segmentation", "captioning")),
    *(f"visft.tasks.{task}.batch_size=8" for task in ("detection", "segmentation", "captioning")),
)


@dataclass(frozen=True)
class Case:
    """A configuration of the debug model."""

    name: str
    processes: int
    stage: int
    engine: str = "zero1"
    settings: tuple[str, ...] = ()

    def config(self) -> ResolvedConfig:
        """With small buckets, every task by itself, and random weights and heads."""
        settings = ("visft.mode=sampled", "visft.data.prefetch_steps=0", _BUCKET, *self.settings)
        config = resolve(stage=self.stage, engine=self.engine, model="debug", settings=settings)
        heads = config.visft.heads.model_copy(update={"path": None})
        return replace(config, visft=config.visft.model_copy(update={"heads": heads}))


def _recomputed(what: str) -> tuple[str, ...]:
    return (*_LARGE, f"visft.model.recompute={what}")


_BF16 = ("visft.model.precision=bf16",)
_WHOLE_DIVIDED = ("zero_optimization.stage3_param_persistence_threshold=0",)
CASES = (
    Case("stage 1, ZeRO-0", 1, 1, "zero0"),
    Case("stage 2, ZeRO-0", 1, 2, "zero0"),
    Case("stage 1, wider, 224 px", 1, 1, "zero1", _LARGE),
    Case("stage 2, wider, 224 px", 1, 2, "zero1", _LARGE),
    Case("stage 2, wider, every block again", 1, 2, "zero1", _recomputed("block")),
    Case("stage 2, wider, every MLP again", 1, 2, "zero1", _recomputed("mlp")),
    Case("stage 2, wider, all but attention again", 1, 2, "zero1", _recomputed("all_but_attention")),
    Case("stage 2, wider, bf16", 1, 2, "zero1", (*_LARGE, *_BF16)),
    Case("stage 2, wider, bf16, every block again", 1, 2, "zero1", (*_recomputed("block"), *_BF16)),
    Case("stage 1, ZeRO-1", 2, 1, "zero1"),
    Case("stage 1, ZeRO-2", 2, 1, "zero2"),
    Case("stage 1, ZeRO-3", 2, 1, "zero3"),
    Case("stage 2, ZeRO-1", 2, 2, "zero1"),
    Case("stage 2, ZeRO-2, bf16", 2, 2, "zero2", _BF16),
    Case("stage 2, ZeRO-3", 2, 2, "zero3"),
    Case("stage 2, ZeRO-3, all divided", 2, 2, "zero3", _WHOLE_DIVIDED),
    Case("stage 2, ZeRO-3, offloaded", 2, 2, "zero3_offload"),
    # After a pipeline DeepSpeed makes no other engine in a process.
    Case("stage 2, pipeline of 2", 2, 2, "pipeline"),
    Case("stage 2, wider, pipeline of 2", 2, 2, "pipeline", _LARGE),
    Case("stage 1, pipeline of 2", 2, 1, "pipeline"),
)


def made_up_batch(stream: Stream, images: int) -> Batch:
    """Random pixels and labels of the largest size of a stream."""
    side = stream.largest_side()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator)
    targets: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for task in stream.tasks:
            if task == "detection":
                targets[task] = _detection_targets(images)
            elif task == "segmentation":
                targets[task] = _segmentation_targets(images, side // _PATCH)
            else:
                targets[task] = _caption_targets(images)
    sizes, ids = torch.tensor([[side, side]] * images), torch.arange(images)
    return Batch(pixels, sizes, sizes, ids, ids, ids, torch.ones(images, dtype=torch.bool), targets)


def _detection_targets(images: int) -> DetectionTargets:
    """Boxes of 5 to 50 % of each side, anywhere inside."""
    sides = 0.05 + 0.45 * torch.rand(images * OBJECTS, 2)
    centres = sides / 2 + (1 - sides) * torch.rand(images * OBJECTS, 2)
    labels = torch.tensor(COCO_CATEGORY_IDS)[torch.randint(len(COCO_CATEGORY_IDS), (images * OBJECTS,))]
    return DetectionTargets(torch.cat((centres, sides), dim=1), labels, torch.full((images,), OBJECTS))


def _segmentation_targets(images: int, grid: int) -> SegmentationTargets:
    """Ellipses of 5 to 50 % of each side, anywhere, on the grid that the transforms make for such an image."""
    boxes = _detection_targets(images).boxes  # (N, 4) cxcywh
    rows, columns = grid_size((grid * _PATCH, grid * _PATCH), _MASK_STRIDE)
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    x_part = ((x - boxes[:, :1]) / boxes[:, 2:3]).square()  # (N, wm)
    y_part = ((y - boxes[:, 1:2]) / boxes[:, 3:]).square()  # (N, hm)
    masks = (x_part[:, None] + y_part[..., None] < 0.25).to(torch.uint8) * 255
    labels, whole = torch.randint(len(COCO_CATEGORY_IDS), (images * OBJECTS,)), torch.ones(images, 2)
    counts, keys = torch.full((images,), OBJECTS), torch.arange(images) + 1
    return SegmentationTargets(masks, labels, whole, whole.clone(), counts, keys)


def _caption_targets(images: int) -> CaptionTargets:
    """Captions of random words, one image after the other, each one a word longer."""
    lengths = FIRST_IDS + torch.arange(images) % _LENGTHS
    tokens = torch.randint(1, VOCABULARY - 3, (images, int(lengths.max())))
    tokens[:, 0] = VOCABULARY - 2
    places = torch.arange(tokens.shape[1])
    tokens[places == lengths[:, None] - 1] = VOCABULARY - 1
    return CaptionTargets(tokens.masked_fill(places >= lengths[:, None], 0), lengths, ((),) * images)


def measure_cases(cases: Sequence[Case]) -> list[dict[str, Any]] | None:
    """Prediction and measurement of every task of every case. Collective; the main process gets the records.

    Cases for another number of processes are left out.
    """
    start_process_group()
    timed = distributed.world_size() == 1 and distributed.local_device().type == "cpu"
    records, rates = [], measured_rates() if timed else None
    for case in cases:
        if case.processes == distributed.world_size():
            for record in _measure(case, rates):
                ranks = distributed.gather_objects(record)
                if ranks is not None:
                    records.append(max(ranks, key=lambda rank: sum(rank["measured"].values())))
    return records if distributed.is_main() else None


def _measure(case: Case, rates: Rates | None) -> Iterator[dict[str, Any]]:
    """This process's part of every task's step."""
    kind = distributed.local_device().type
    before = _storages(kind)  # of earlier cases, which may go later than one thinks
    config = case.config()
    visft, world = config.visft, distributed.world_size()
    precision = visft.model.precision
    assert precision != "auto", "the debug model states one"
    words = Vocabulary(tuple(f"w{number}" for number in range(VOCABULARY - 4)))
    prepared = prepare_model(visft, config.optimizer.params, precision=precision, vocabulary=words)
    run = run_of(config, world, precision, words.size, None)
    batches = run.batches
    engine = build_engine(
        prepared,
        deepspeed_dict(config, world, precision),
        config.optimizer.params,
        Schedule.of(config.scheduler, config.total_steps),
        seed=visft.seed,
        partition=run.partition,
    )
    for number, (name, stream) in enumerate(visft.streams().items()):
        full_batch = made_up_batch(stream, batches.micro[name])
        content = Content(OBJECTS, FIRST_IDS + min(batches.micro[name], _LENGTHS) - 1)
        planned = replace(run, content=content)
        plan = plan_stream(planned, stream)
        parts = _parts_of(full_batch, batches.accumulation, batches.stages)
        loss_denominators: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in engine.module.count(full_batch).items():
            loss_denominators.setdefault(name, {})[key.partition("/")[2]] = torch.tensor(max(value, 1.0))
        del full_batch
        step = partial(engine.train_step, number, parts, loss_denominators)
        for _ in range(2):
            step()
        seconds = min(_cpu_seconds(step) for _ in range(3)) if kind == "cpu" else None
        ledger = Ledger(engine.device.type)
        note_residents(ledger, engine)
        ledger.forget_peaks()
        optimizer = engine.deepspeed.optimizer
        with step_watched(ledger, engine.module, optimizer):
            step()
            note_gradients(ledger, optimizer)
        stale = sum(size for key, size in _storages(kind).items() if before.get(key) == size)
        yield {
            "case": case.name,
            "task": name,
            "processes": world,
            "measured": {**ledger.at_peak, OTHER: ledger.at_peak[OTHER] - stale},
            "predicted": {**asdict(plan), "total": plan.total},
            "cpu_seconds": seconds,
            "predicted_seconds": step_time(planned, stream, rates).total if rates else None,
        }


def _storages(kind: str) -> dict[int, int]:
    """Bytes of everything that lives now on a kind of device, by storage."""
    gc.collect()
    here = (tensor.untyped_storage() for tensor in live_tensors() if tensor.device.type == kind)
    return {storage._cdata: storage.nbytes() for storage in here}


def _parts_of(whole: Batch, accumulation: int, stages: int) -> list[Batch]:
    """The micro-batches that this process reads."""
    place = Place.of_rank(distributed.rank(), distributed.world_size(), stages)
    if place.role is None:
        return []
    labels = stages > 1 and place.stage == stages - 1
    bare = replace(whole, images=whole.images[..., :0, :0].clone()) if labels else whole
    # Each with pixels of its own, as they are read.
    return [bare, *(replace(bare, images=bare.images.clone()) for _ in range(accumulation - 1))]


# -------------------------------------------------------------------------------------------------------- rates


def measured_rates() -> Rates:
    """Measured rates of this CPU per second of processor time, one thread, at sizes like those of the cases."""
    product, attention = dict[Precision, float](), dict[Precision, float]()
    for precision in ("fp32", "bf16"):
        dtype = DTYPES[precision]
        left, right = torch.rand(1024, 192, dtype=dtype), torch.rand(192, 768, dtype=dtype)
        product[precision] = 2 * 1024 * 192 * 768 / _best(partial(torch.mm, left, right))
        heads = torch.rand(4, 4, 256, 48, dtype=dtype, requires_grad=True)
        # Two products forward and five backward, of which the traced work counts as many.
        attention[precision] = 7 * 2 * 4 * 4 * 256 * 256 * 48 / _best(partial(_attend_and_back, heads))
    wide, maps, points = torch.rand(1024, 768), torch.rand(16, 16, 16, 16), torch.rand(16, 256, 4, 2)
    size = 4 * wide.numel()
    return Rates(
        product=product,
        attention=attention,
        bandwidth={
            "plain": 3 * size / _best(lambda: wide + wide),
            "curve": 2 * size / _best(lambda: F.gelu(wide)),
            "sampling": 4
            * (2 * points.numel() + 16 * 16 * 256 * 4)
            / _best(lambda: F.grid_sample(maps, points, align_corners=False)),
        },
        call=0.0,
        host=_host_seconds(),
    )


def _host_seconds() -> float:
    """Of an operator, from a block that is too small to compute anything, forward and backward."""

    def step(device: str) -> None:
        x = torch.ones(1, 4, 16, device=device, requires_grad=True)
        with torch.no_grad():
            for parameter in block.to_empty(device=device).parameters():
                parameter.fill_(0.1)
        torch.autograd.backward(block(block(x)).sum())

    block = Block(16, 2, 32, post_norm=False).requires_grad_(False)
    with traced_as(torch.device("cpu"), "fp32") as tracer:
        step("meta")
    count = sum(tracer.work.values())
    block.to_empty(device="cpu")
    return _best(partial(step, "cpu")) / count


def _attend_and_back(heads: torch.Tensor) -> None:
    F.scaled_dot_product_attention(heads, heads, heads).sum().backward()


def _best(function: Callable[[], object], repeats: int = 5, inner: int = 20) -> float:
    """Processor seconds of a call."""

    def many() -> None:
        for _ in range(inner):
            function()

    many()
    return min(_cpu_seconds(many) for _ in range(repeats)) / inner


def _cpu_seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


# ------------------------------------------------------------------------------------------------------- report


def validate(cases: Sequence[Case] = CASES) -> dict[str, Any] | None:
    """The record of all cases for this number of processes; None on other processes than the main one.

    Raises:
        ValueError: there is no case for so many processes.
    """
    if not any(case.processes == distributed.world_size() for case in cases):
        raise ValueError(
            f"--validate on {distributed.world_size()} processes: there are configurations for 1 and for 2 "
            "(deepspeed --num_gpus 2 --module visft_ds profile plan --validate)"
        )
    records = measure_cases(cases)
    if records is None:
        return None
    errors = [error_of(record) for record in records]
    return {
        "format": FORMAT,
        "version": VERSION,
        "records": records,
        "largest_error": max(abs(error) for error in errors),
        "time_ratios": time_ratios(records),
    }


def error_of(record: Mapping[str, Any]) -> float:
    """Predicted over measured peak, less 1."""
    return float(record["predicted"]["total"] / sum(record["measured"].values()) - 1)


def time_ratios(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Predicted over measured time, in units of the geometric mean of that over all records that have both."""
    ratios = [case["predicted_seconds"] / case["cpu_seconds"] for case in records if case["predicted_seconds"]]
    if not ratios:
        return []
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return [ratio / middle for ratio in ratios]


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, tables) of a record: every step, and the largest error."""
    cases, ratios = record["records"], iter(record["time_ratios"])
    title = f"plan: predicted against measured, {len(cases)} steps on {cases[0]['processes']} process(es)"
    rows = []
    for case in cases:
        timed = case["predicted_seconds"] is not None
        rows.append(
            (
                case["case"],
                case["task"],
                f"{sum(case['measured'].values()) / _MIB:.2f}",
                f"{case['predicted']['total'] / _MIB:.2f}",
                f"{100 * error_of(case):+.1f} %",
                "" if case["cpu_seconds"] is None else f"{1e3 * case['cpu_seconds']:.0f}",
                f"{next(ratios):.2f}" if timed else "",
            )
        )
    head = ("configuration", "task", "MiB measured", "predicted", "error", "CPU ms", "time ratio")
    summary = [("largest error of memory", f"{100 * record['largest_error']:.1f} %")]
    if record["time_ratios"]:
        off = max(max(ratio, 1 / ratio) for ratio in record["time_ratios"])
        summary.append(("largest time ratio", f"{off:.2f} (predicted over measured, over its mean)"))
    return title, [Section("peak memory of a step, and its time", rows, head), Section("summary", summary)]
