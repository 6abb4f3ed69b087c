"""Each head alone on made-up features: where the time of its training step goes, and what the step holds in memory.

Letters: B images, h w patch grid, D backbone width, N objects packed over the batch, hm wm cells of target masks.

A step is forward, criterion and backward in float32, as stage 1 has it: the head trains, the features need no gradient.
Reading data, the backbone and the optimizer are not in it (`tools/profile.py train` has them). The heads take turns in
every repeat, so that a machine whose speed drifts does so for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.costs.ledger import ACTIVATIONS, GRADIENTS, OTHER, TRAINED, TRANSIENT, Ledger
from visft_ds.data.samples import Batch, DetectionTargets
from visft_ds.model import sum_weighted
from visft_ds.monitor.console import Section
from visft_ds.ops.deform_attn import deform_attn
from visft_ds.profiling.memory import step_watched
from visft_ds.profiling.record import circumstances, measured_on
from visft_ds.profiling.sampling import measure_sampling, sampling_section
from visft_ds.profiling.timing import BACKWARD, CRITERION, HEAD, MATCHER, Spread, Stopwatch, in_turn, matchers
from visft_ds.resilience.host_memory import memory_bounded
from visft_ds.tasks import Criterion
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.captioning.head import CaptioningCriterion, CaptioningHead
from visft_ds.tasks.detection.head import DetectionCriterion, DetectionHead
from visft_ds.tasks.segmentation import pixel_decoder
from visft_ds.tasks.segmentation.data import COCO_CATEGORY_IDS, SegmentationTargets
from visft_ds.tasks.segmentation.loss import SegmentationCriterion, SegmentationHead
from visft_ds.tasks.segmentation.masks import grid_size

FORMAT, VERSION = "visft_ds heads", 1
WHOLE, SAMPLING = "whole", "deformable attention"
#: What lies inside what; the outer ones and a few microseconds of Python add up to the whole.
ORDER = (HEAD, SAMPLING, CRITERION, MATCHER, BACKWARD, WHOLE)
_INNER = (SAMPLING, MATCHER)
_PATCH, _MASK_STRIDE = 14, 4  # pixels: of a patch, and of a cell of the target masks
_WORDS = range(8, 19)  #: lengths of captions in words; COCO's have 10.5 on average
#: Ids of the published captioning heads, four special ones included.
_VOCABULARY = 9490
_MIB = 2**20

#: (images, grid) of each task: what it trains on, at most, with few enough images for two cores.
DEFAULTS: Mapping[str, tuple[int, tuple[int, int]]] = {
    "detection": (1, (48, 48)),  # 672 pixels
    "segmentation": (1, (37, 37)),  # 518 pixels, half of the 1024 of training
    "captioning": (8, (18, 18)),  # 256 pixels
}
_FULL_GRID = (73, 73)
_SMALL_BATCH, _SMALL_GRID, _SMALL_WIDTH, _WIDTH = 2, (8, 8), 64, 1792
_SMALL_SETS = {"num_queries": 12, "decoder_layers": 2}
_SMALL_HEADS: Mapping[str, dict[str, Any]] = {
    "detection": {"encoder_dim": 32, "decoder_dim": 32, "encoder_layers": 2, "num_heads": 4, "ffn_dim": 64},
    "segmentation": {
        "hidden_dim": 32,
        "encoder_layers": 2,
        "num_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
    "captioning": {"attention_dim": 32, "embed_dim": 32, "decoder_dim": 32, "grid": 4},
}
_SMALL_VOCABULARY, _SMALL_POINTS = 100, 256


@dataclass(frozen=True)
class HeadOptions:
    """What is measured. None: the default of the task, or of `small`. Raises ValueError for what is not possible."""

    tasks: Sequence[str] = tuple(DEFAULTS)
    width: int | None = None  #: D of the features
    grid: tuple[int, int] | None = None  #: (h, w) for every task
    batch: int | None = None  #: images for every task
    objects: int = 7  #: in every image; COCO has 7.3 on average
    repeats: int = 5
    device: str = "cpu"
    small: bool = False  #: heads of debug size instead of the reference's
    full: bool = False  #: segmentation on the grid of its training pictures
    dropout: float | None = None  #: of every head; None: each head's own

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in DEFAULTS]
        if unknown or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks {' '.join(self.tasks)}: give one or more of {', '.join(DEFAULTS)}, each once")
        grid = None if self.grid is None else min(self.grid)
        numbers = {"width": self.width, "batch": self.batch, "repeats": self.repeats, "grid": grid}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")
        if self.objects < 0:
            raise ValueError(f"--objects {self.objects} must be at least 0")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} is not allowed: give a probability from 0 to below 1")
        if self.full and (self.small or self.grid):
            raise ValueError("--full chooses a grid: give it without --small and --grid")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; leave it out, or see python tools/doctor.py")

    def sizes(self, task: str) -> tuple[int, int, tuple[int, int]]:
        """(images, width, grid) of a task."""
        batch, grid = (_SMALL_BATCH, _SMALL_GRID) if self.small else DEFAULTS[task]
        if self.full and task == "segmentation":
            grid = _FULL_GRID
        return self.batch or batch, self.width or (_SMALL_WIDTH if self.small else _WIDTH), self.grid or grid


@dataclass(frozen=True)
class _Case:
    """A head with everything that a step of it needs."""

    head: nn.Module
    criterion: Criterion
    features: Tensor  #: (B, D, h, w)
    valid: Tensor  #: (B, h, w) bool, all True
    targets: Any
    loss_denominators: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  #: what the head is given besides

    def tensors(self) -> list[Tensor]:
        """All that lives outside of the step, but the parameters."""
        found = [self.features, self.valid, *self.loss_denominators.values(), *vars(self.targets).values()]
        return [thing for thing in found if isinstance(thing, Tensor)]


def measure_heads(options: HeadOptions) -> dict[str, Any]:
    """Every task's step and, with segmentation, deformable attention by itself; a record of JSON values.

    Raises ValueError where a step does not fit into memory.
    """
    device = torch.device(options.device)
    load = os.getloadavg()
    with memory_bounded(device, 1), _fitting():
        cases = {task: _build(task, options, device) for task in options.tasks}
        times = _measure_times(cases, options.repeats, device)
        tasks = {}
        for task, case in cases.items():
            images, width, grid = options.sizes(task)
            parameters = list(case.head.parameters())
            tasks[task] = {
                "sizes": {"images": images, "width": width, "grid": list(grid), **_target_sizes(case.targets)},
                "parameters": {
                    "count": sum(p.numel() for p in parameters),
                    "bytes": sum(p.untyped_storage().nbytes() for p in parameters),
                },
                **_summary(times[task]),
                "memory_bytes": _measure_memory(case, device),
            }
        sampling = _measure_sampling(cases["segmentation"], options, device) if "segmentation" in cases else None
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(load, device),
        "options": asdict(options),
        "tasks": tasks,
        "deformable_attention": sampling,
    }


@contextmanager
def _fitting() -> Iterator[None]:
    """Turn an allocator's error into one that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"a step does not fit into memory ({error}): give a smaller --grid or --batch") from error


# ------------------------------------------------------------------------------------------------------- cases


def _build(task: str, options: HeadOptions, device: torch.device) -> _Case:
    """Head, criterion and made-up inputs; the same in every run, whatever else is measured."""
    images, width, grid = options.sizes(task)
    sizes = dict(_SMALL_HEADS[task]) if options.small else {}
    if options.dropout is not None:
        sizes["dropout"] = options.dropout
    sets: dict[str, Any] = _SMALL_SETS if options.small else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = torch.randn(images, width, *grid).to(device)
        head: nn.Module
        criterion: Criterion
        if task == "detection":
            head, criterion = DetectionHead(width, **sizes, **sets), DetectionCriterion(**sets)
            targets: Any = _detection_targets(images, options.objects)
        elif task == "segmentation":
            points: dict[str, Any] = {"num_points": _SMALL_POINTS} if options.small else {}
            head, criterion = SegmentationHead(width, **sizes, **sets), SegmentationCriterion(**sets, **points)
            targets = _segmentation_targets(images, options.objects, grid)
        else:
            vocabulary = _SMALL_VOCABULARY if options.small else _VOCABULARY
            head, criterion = CaptioningHead(width, vocabulary_size=vocabulary, **sizes), CaptioningCriterion()
            targets = _caption_targets(images, vocabulary)
    head.to(device).train()
    count = criterion.count(_batch(task, targets, images))
    loss_denominators = {name: torch.tensor(max(value, 1.0), device=device) for name, value in count.items()}
    targets = targets.to(device)
    inputs = targets.head_inputs() if task == "captioning" else {}
    valid = torch.ones(images, *grid, dtype=torch.bool, device=device)
    return _Case(head, criterion, features, valid, targets, loss_denominators, inputs)


def _detection_targets(images: int, objects: int) -> DetectionTargets:
    """Boxes of 5 to 50 % of each side, anywhere inside."""
    sides = 0.05 + 0.45 * torch.rand(images * objects, 2)
    centres = sides / 2 + (1 - sides) * torch.rand(images * objects, 2)
    labels = torch.tensor(COCO_CATEGORY_IDS)[torch.randint(len(COCO_CATEGORY_IDS), (images * objects,))]
    return DetectionTargets(torch.cat((centres, sides), dim=1), labels, _counts(images, objects))


def _segmentation_targets(images: int, objects: int, grid: tuple[int, int]) -> SegmentationTargets:
    """Ellipses of 5 to 50 % of each side, anywhere, on the grid that the transforms make for such an image."""
    boxes = _detection_targets(images, objects).boxes  # (N, 4) cxcywh
    cells = grid_size((grid[0] * _PATCH, grid[1] * _PATCH), _MASK_STRIDE)
    y, x = ((torch.arange(count) + 0.5) / count for count in cells)
    x_part = ((x - boxes[:, :1]) / boxes[:, 2:3]).square()  # (N, wm)
    y_part = ((y - boxes[:, 1:2]) / boxes[:, 3:]).square()  # (N, hm)
    masks = (x_part[:, None] + y_part[..., None] < 0.25).to(torch.uint8) * 255
    labels = torch.randint(len(COCO_CATEGORY_IDS), (images * objects,))
    whole = torch.ones(images, 2)
    return SegmentationTargets(masks, labels, whole, whole.clone(), _counts(images, objects), torch.arange(images) + 1)


def _caption_targets(images: int, vocabulary: int) -> CaptionTargets:
    """Captions of 8 to 18 random words, one image after the other, each one a word longer."""
    lengths = torch.tensor([_WORDS[image % len(_WORDS)] + 2 for image in range(images)])
    tokens = torch.randint(1, vocabulary - 3, (images, int(lengths.max())))
    tokens[:, 0] = vocabulary - 2
    places = torch.arange(tokens.shape[1])
    tokens[places == lengths[:, None] - 1] = vocabulary - 1
    return CaptionTargets(tokens.masked_fill(places >= lengths[:, None], 0), lengths, ((),) * images)


def _counts(images: int, objects: int) -> Tensor:
    return torch.full((images,), objects, dtype=torch.int64)


def _batch(task: str, targets: Any, images: int) -> Batch:
    """What `count` looks at; there are no pictures."""
    sizes, ids = torch.zeros(images, 2, dtype=torch.int64), torch.arange(images)
    real = torch.ones(images, dtype=torch.bool)
    return Batch(torch.zeros(images, 3, 0, 0, dtype=torch.uint8), sizes, sizes, ids, ids, ids, real, {task: targets})


def _target_sizes(targets: Any) -> dict[str, Any]:
    if isinstance(targets, CaptionTargets):
        return {"caption_ids": list(targets.tokens.shape)}
    sizes: dict[str, Any] = {"objects": int(targets.counts.sum())}
    return sizes | {"masks": list(targets.masks.shape)} if isinstance(targets, SegmentationTargets) else sizes


# -------------------------------------------------------------------------------------------------------- steps


def _step(case: _Case, watch: Stopwatch) -> None:
    """One step; the gradients are dropped afterwards."""
    watch.start(WHOLE)
    watch.start(HEAD)
    output = case.head(case.features, case.valid, **case.inputs)
    watch.stop(HEAD)
    watch.start(CRITERION)
    losses = case.criterion(output, case.targets, case.loss_denominators)
    watch.stop(CRITERION)
    loss = sum_weighted(losses, case.criterion.weights)
    watch.start(BACKWARD)
    loss.backward()
    watch.stop(BACKWARD)
    watch.stop(WHOLE)
    case.head.zero_grad(set_to_none=True)


@contextmanager
def _hooked(case: _Case, watch: Stopwatch) -> Iterator[None]:
    """Also measure what is inside the criterion and the head's forward; nothing of it stays behind."""
    inner = [(owner, name, function, MATCHER) for owner, name, function in matchers(case.criterion)]
    if isinstance(case.head, SegmentationHead):
        inner.append((pixel_decoder, "deform_attn", deform_attn, SAMPLING))
    with ExitStack() as stack:
        for owner, name, function, part in inner:
            setattr(owner, name, _timed(function, watch, part))
            stack.callback(setattr, owner, name, function)
        yield


def _timed(function: Callable[..., Any], watch: Stopwatch, part: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        watch.start(part)
        result = function(*arguments, **named)
        watch.stop(part)
        return result

    return call


def _measure_times(cases: Mapping[str, _Case], repeats: int, device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Seconds by part of every repeat of every task; the first round is not among them."""
    watch = Stopwatch(device)

    def run(task: str) -> dict[str, float]:
        with _hooked(cases[task], watch):
            _step(cases[task], watch)
        return watch.seconds()

    return in_turn(cases, run, repeats)


def _summary(times: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Spread of the seconds of every part, and of its share of the step it was in."""
    parts = [part for part in ORDER if part in times[0]]
    return {
        "seconds": {part: asdict(Spread.of([step[part] for step in times])) for part in parts},
        "shares": {part: asdict(Spread.of([step[part] / step[WHOLE] for step in times])) for part in parts},
    }


def _measure_memory(case: _Case, device: torch.device) -> dict[str, Any]:
    """Bytes of tensors' storages at the peak of a step by kind, and saved for the backward pass at most."""
    ledger = Ledger(device.type)
    ledger.add_all(case.head.parameters(), TRAINED)
    ledger.add_all(case.tensors(), OTHER)
    ledger.forget_peaks()
    with step_watched(ledger, case.head):
        _step(case, Stopwatch(device))
    found: dict[str, Any] = {
        "saved": ledger.highest[ACTIVATIONS],
        "peak": sum(ledger.at_peak.values()),
        "at_peak": {kind: ledger.at_peak[kind] for kind in (TRAINED, GRADIENTS, ACTIVATIONS, TRANSIENT, OTHER)},
        "allocator_peak": None,
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _step(case, Stopwatch(device))
        found["allocator_peak"] = torch.cuda.max_memory_allocated(device)
    return found


def _measure_sampling(case: _Case, options: HeadOptions, device: torch.device) -> dict[str, Any]:
    layer = next(module for module in case.head.modules() if isinstance(module, pixel_decoder.DeformableAttention))
    images, _, grid = options.sizes("segmentation")
    channels = layer.value_proj.out_features // layer.num_heads
    sizes = {"heads": layer.num_heads, "channels": channels, "points": layer.num_points}
    # a layer takes milliseconds: more repeats than of whole steps cost nothing
    return measure_sampling(images, grid, repeats=4 * options.repeats, device=device, **sizes)


# ------------------------------------------------------------------------------------------------------- tables


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    options = record["options"]
    return f"heads: {'debug' if options['small'] else 'reference'} sizes, {options['device']}, float32"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables: each task, deformable attention, all tasks side by side."""
    options = record["options"]
    facts = [
        *measured_on(record),
        ("a step", "forward, criterion, backward of the head alone; no data, no backbone, no optimizer"),
        ("repeats", f"{options['repeats']} after 1 to warm up, the heads in turn"),
        ("dropout", "each head's own" if options["dropout"] is None else f"{options['dropout']:g} in every head"),
    ]
    sections = [Section("measured on", facts)]
    for task, numbers in record["tasks"].items():
        parts = ("part", "ms", "quartiles", "all", "share of step")
        sections.append(Section(f"{task}: {_sizes_text(numbers['sizes'])}", _time_rows(numbers), parts))
        sections.append(Section(f"{task}: memory", _memory_rows(numbers), ("", "MiB", "")))
    if record["deformable_attention"] is not None:
        sections.append(sampling_section(record["deformable_attention"]))
    columns = ("task", "step ms", "criterion", "matcher", "parameters MiB", "saved MiB", "peak MiB")
    rows = [_side_by_side(task, numbers) for task, numbers in record["tasks"].items()]
    return [*sections, Section("side by side", rows, columns)]


def _sizes_text(sizes: Mapping[str, Any]) -> str:
    images, (height, width) = sizes["images"], sizes["grid"]
    parts = [f"{images} image{'s' if images > 1 else ''} of {height}x{width} cells, width {sizes['width']}"]
    if "objects" in sizes:
        parts.append(f"{sizes['objects']} objects")
    if "masks" in sizes:
        parts.append("masks {1}x{2}".format(*sizes["masks"]))
    if "caption_ids" in sizes:
        parts.append(f"captions of up to {sizes['caption_ids'][1]} ids")
    return ", ".join(parts)


def _time_rows(numbers: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for part, seconds in numbers["seconds"].items():
        name = f"  of it {part}" if part in _INNER else part
        median, low, high, least, most = (1000 * seconds[key] for key in ("median", "low", "high", "least", "most"))
        ranges = (f"{low:.1f} .. {high:.1f}", f"{least:.1f} .. {most:.1f}")
        rows.append((name, f"{median:9.2f}", *ranges, _percent(numbers["shares"][part]["median"])))
    return rows


def _memory_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    memory = numbers["memory_bytes"]
    rows = [
        ("parameters", numbers["parameters"]["bytes"], f"{numbers['parameters']['count']:,} numbers"),
        ("saved for backward", memory["saved"], "storages that autograd keeps, at most; without parameters and inputs"),
        ("peak of a step", memory["peak"], "all tensors at one moment: " + _by_kind(memory["at_peak"])),
    ]
    if memory["allocator_peak"] is not None:
        text = "torch.cuda.max_memory_allocated, the other heads too"
        rows.append(("allocator's peak", memory["allocator_peak"], text))
    return [(name, f"{size / _MIB:9.2f}", text) for name, size, text in rows]


def _by_kind(sizes: Mapping[str, int]) -> str:
    names = {TRAINED: "parameters", OTHER: "inputs"}
    return ", ".join(f"{names.get(kind, kind)} {size / _MIB:.1f}" for kind, size in sizes.items())


def _side_by_side(task: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    shares, memory = numbers["shares"], numbers["memory_bytes"]
    sizes = (numbers["parameters"]["bytes"], memory["saved"], memory["peak"])
    return (
        task,
        f"{1000 * numbers['seconds'][WHOLE]['median']:.1f}",
        _percent(shares[CRITERION]["median"]),
        _percent(shares[MATCHER]["median"]) if MATCHER in shares else "none",
        *(f"{size / _MIB:.1f}" for size in sizes),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
