"""Steps of every task on a GPU that is not there, and what it would have to wait for, or could not do.

RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.device_case OUT.json [each]
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.options import criterion_of, head_of
from tests.parallel import engine_case as case
from tests.parallel.fake_gpu import GPU, WORLD, Watch, pretending
from visft_ds.config.schema import ParamGroup
from visft_ds.model import TaskModule
from visft_ds.tasks import TASKS
from visft_ds.tasks.depth.config import DepthHeadConfig, DepthLoss
from visft_ds.tasks.detection.config import DetectionHeadConfig, DetectionLoss
from visft_ds.tasks.detection.roi import SIDE
from visft_ds.tasks.masks.config import MaskLoss, PlainHeadConfig
from visft_ds.tasks.transform import collate_joint

#: (engine, precision, stage): each makes a step of all tasks, and the first one, or every one, of each.
RUNS = (("zero1", "bf16", 2), ("zero3", "bf16", 2), ("zero1", "fp16", 1))
PUBLISHED = ("detection", "segmentation", "captioning", "semantic")
#: With other heads, on images of four bands.
OTHERS = ("detection", "segmentation", "depth")
SIDES = (((56, 112), (112, 56), (28, 112), (84, 70)),)  # (height, width) of the images of a step
BANDS = {
    "count": 4,
    "numbers": [4, 3, 2, 1],
    "kind": "float32",
    "range": [0, 1],
    "mean": [0.5] * 4,
    "std": [0.2] * 4,
}


def batch_of(tasks: Sequence[str], heads: Sequence[str]) -> Any:
    """The two images of this rank, of different sizes, with labels of some tasks, as a loader gives them."""
    samples = []
    rng = np.random.default_rng(0)
    for sample in case.samples(0, (case.TASKS,), SIDES)[:2]:
        targets = {**sample.targets, "semantic": sample.targets["segmentation"]}
        if heads == OTHERS:
            sample = replace(sample, image=torch.from_numpy(rng.random((4, *sample.size), np.float32)))
            boxes = targets["detection"]["boxes"]
            low = boxes[:, :2] - boxes[:, 2:] / 2
            targets["detection"] = {
                **targets["detection"],
                "regions": np.concatenate([low, low + boxes[:, 2:]], axis=1),
                "masks": rng.integers(0, 256, (len(boxes), SIDE, SIDE), np.uint8),
            }
            depth = rng.uniform(1, 9, sample.size).astype(np.float32)
            # The first image's in metres, the second one's is relative.
            targets["depth"] = {"depth": depth, "relative": np.array(bool(samples))}
        samples.append(replace(sample, targets={task: targets[task] for task in tasks}))
    return collate_joint(samples).pin_memory()


def published_heads(width: int) -> dict[str, TaskModule]:
    """Those of `engine_case`, and the linear head."""
    semantic = TaskModule(head_of("semantic", width, dropout=0.0), criterion_of("semantic"))
    return {**case.build_tasks(width), "semantic": semantic}


def other_heads(width: int) -> dict[str, TaskModule]:
    """Boxes of cells with masks, the plain mask head, depth."""
    plain = PlainHeadConfig(num_queries=6, blocks=1, hidden_dim=32, num_heads=2)
    options: dict[str, tuple[Any, Any]] = {
        "detection": (DetectionHeadConfig(type="dense", masks=True, width=32), DetectionLoss()),
        "segmentation": (plain, MaskLoss(train_num_points=48)),
        "depth": (DepthHeadConfig(bins=8), DepthLoss()),
    }
    tasks = {}
    for name, (head, loss) in options.items():
        module = TASKS[name].build_head([(width, 16)], head, None)
        tasks[name] = TaskModule(module, TASKS[name].losses(head, loss))
    return tasks


def build(heads: Sequence[str], stage: int, **options: Any) -> Any:
    """`engine_case.build` with other heads."""
    made = published_heads(32) if heads == PUBLISHED else other_heads(32)
    bands = None if heads == PUBLISHED else BANDS
    groups = [ParamGroup(name=task, params=f"heads.{task}.*", lr=1e-3) for task in heads]
    with (
        patch.object(case, "build_tasks", lambda width: made),
        patch.object(case, "build_backbone", partial(case.build_backbone, bands=bands)),
        patch.dict(case.GROUPS, {1: groups}),
    ):
        return case.build(stage, **options)


def steps(
    watch: Watch, each: bool, heads: Sequence[str], engine_name: str, precision: str, stage: int
) -> Iterator[tuple[str, float]]:
    """Make a step of all tasks, then watch one of all, and of each: its name and its loss."""
    from visft_ds import distributed
    from visft_ds.tasks.criterion import counts_of, loss_denominators_of

    engine = case.start_engine(stage, engine_name, precision, micro=2, build=partial(build, heads))
    engine.module.backbone.recompute = "block"
    order = [heads, heads]
    if each:
        order += [(task,) for task in heads]
    for number, tasks in enumerate(order):
        batch = batch_of(tasks, heads)
        watch.on = number > 0
        counts, _ = distributed.agree_on_step("", counts_of(engine.module.criteria, [batch]), False, GPU)
        report = engine.train_step(number, [batch], loss_denominators_of(counts, WORLD, GPU))
        watch.on = False
        assert not report.refused, report
        if number:
            yield "+".join(tasks), report.losses["loss"]
    engine.deepspeed.destroy()


def main() -> None:
    """Rank 0 of a group whose others compute the same."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from visft_ds.parallel.engine import start_process_group

    warnings.simplefilter("ignore")  # DeepSpeed's
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    start_process_group()
    results = []
    with pretending() as watch:
        for heads, run in itertools.product((PUBLISHED, OTHERS), RUNS):
            each = "each" in sys.argv
            if heads == OTHERS and run != RUNS[0] and not each:
                continue
            for tasks, loss in steps(watch, each or run == RUNS[0], heads, *run):
                findings = [[*finding, times] for finding, times in watch.findings.items()]
                results.append([[*run, tasks], loss, findings])
                watch.findings.clear()
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
