"""What a step costs with and without padding, and compiled or not: side by side, in processor time; -s shows it.

Forward and backward of adapters in a tower of 6 blocks of width 384 with small heads, one thread; the same images for
all kinds of step, in turn. Bounds are loose: what a machine saves depends on what else it does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.options import alone
from tests.parallel import engine_case as case
from visft_ds.data.plan import generator
from visft_ds.data.samples import Batch, RawSample
from visft_ds.model import MultiTaskModel
from visft_ds.models.compiled import compilations, compile_blocks
from visft_ds.models.eva_vit import build_backbone
from visft_ds.models.lora import inject_lora
from visft_ds.tasks.transform import collate_joint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"),
]
WIDTH, TURNS, IMAGES = 384, 6, 4
#: (height, width) of COCO's commonest pictures.
PICTURES = ((480, 640), (427, 640), (640, 480), (640, 427))
#: The published sizes, times 7 / 16.
DETECTION: Mapping[str, Any] = {
    "short_sides": (210, 224, 238, 252, 266, 280, 294),
    "max_long": 294,
    "crop_short_sides": (175, 219, 262),
    "crop_range": (168, 262),
}


def model(*, packed: bool = False) -> MultiTaskModel:
    backbone = build_backbone("debug", width=WIDTH, depth=6, num_heads=6, image_size=224, post_norm=True)
    module = MultiTaskModel(backbone, case.build_tasks(WIDTH), train_backbone=True, heads_active=False)
    inject_lora(backbone, rank=8, alpha=8.0)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    module.packed = packed
    return module.train()


def picture(key: int) -> RawSample:
    """Noise with an object in it."""
    height, width = size = PICTURES[key % len(PICTURES)]
    pixels = np.random.default_rng(key).integers(0, 256, (*size, 3), dtype=np.uint8)
    outline = [20, 20, width - 20, 20, width - 20, height - 20, 20, height - 20]
    box = [20, 20, width - 40, height - 40]
    objects = [{"id": 1, "bbox": box, "category_id": 1, "iscrowd": 0, "segmentation": [outline]}]
    return RawSample(key, key, size, pixels, objects, ())


def seconds(module: MultiTaskModel, batch: Batch) -> float:
    """Of one forward and backward, in processor time."""
    counts = case.loss_denominators(module, batch, 1)
    began = time.process_time()
    module(batch, counts)["loss"].backward()
    return time.process_time() - began


def compared(kinds: Mapping[str, Sequence[tuple[MultiTaskModel, Batch]]], turns: int) -> dict[str, float]:
    """Prints what each kind of step takes, and its ratio to the first; gives the ratios of whole runs."""
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns):
        for kind, steps in kinds.items():
            taken[kind].append(seconds(*steps[turn]))
    first = sum(taken[next(iter(kinds))])
    for kind, times in taken.items():
        tokens = sum(sum((h // 14) * (w // 14) for h, w in step[1].frames.tolist()) for step in kinds[kind][:turns])
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"{kind:34} {middle:6.2f} s ({low:.2f} .. {high:.2f})  {first / sum(times):.2f} times  {tokens} patches")
    return {kind: first / sum(times) for kind, times in taken.items()}


def test_content_alone() -> None:
    """One image in a micro-batch, as EVA-ViT-E trains: images extended to the square, and what of them shows image."""
    module, turns = model(), 24
    whole, part = (
        [
            collate_joint([alone("segmentation", True, size=448, content_only=only)(picture(k), generator(k))])
            for k in range(turns + 1)
        ]
        for only in (False, True)
    )
    for batch in (whole[-1], part[-1]):
        seconds(module, batch)
    print()
    kinds = {"segmentation, square of 448": whole, "segmentation, content alone": part}
    ratios = compared({kind: [(module, batch) for batch in batches] for kind, batches in kinds.items()}, turns)
    assert ratios["segmentation, content alone"] > 1.2


def test_packed_batches() -> None:
    """Four images in a micro-batch."""
    padded, packed = model(), model(packed=True)
    jitter = {only: alone("segmentation", True, size=448, content_only=only) for only in (False, True)}
    detect = alone("detection", True, **DETECTION)
    keys = [range(first, first + IMAGES) for first in range(0, IMAGES * TURNS, IMAGES)]

    def of_detection(module: MultiTaskModel) -> list[tuple[MultiTaskModel, Batch]]:
        return [(module, collate_joint([detect(picture(k), generator(k)) for k in group])) for group in keys]

    def of_segmentation(module: MultiTaskModel, *, only: bool) -> list[tuple[MultiTaskModel, Batch]]:
        made = [[jitter[only](picture(k), generator(k)) for k in group] for group in keys]
        return [(module, collate_joint(samples)) for samples in made]

    print()
    found = compared({"detection, padded": of_detection(padded), "detection, packed": of_detection(packed)}, TURNS)
    assert found["detection, packed"] > 1.05
    kinds = {
        "segmentation, square of 448": of_segmentation(padded, only=False),
        "content alone, padded": of_segmentation(padded, only=True),
        "content alone, packed": of_segmentation(packed, only=True),
    }
    assert compared(kinds, TURNS)["content alone, packed"] > 1.2


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_blocks(recompute: str) -> None:
    """Images of many sizes; the first step of the compiled kind pays for compiling."""
    torch._dynamo.reset()
    eager, compiled = model(), model()
    compile_blocks(compiled.backbone, "blocks")
    for module in (eager, compiled):
        module.backbone.recompute = recompute
    transform = alone("segmentation", True, size=448, content_only=True)
    batches = [collate_joint([transform(picture(k), generator(k))]) for k in range(2 * TURNS + 1)]
    seconds(eager, batches[-1])
    first, before = seconds(compiled, batches[-1]), compilations()[0]
    print(f"\nrecompute {recompute}: {before} graphs by the first step, which took {first:.0f} s of processor time")
    kinds = {"eager": [(eager, b) for b in batches], "compiled": [(compiled, b) for b in batches]}
    ratio = compared(kinds, 2 * TURNS)["compiled"]
    assert compilations()[0] == before and ratio > 0.7
