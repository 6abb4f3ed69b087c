"""Steps of every task on a GPU that is not there, and what it would have to wait for, or could not do.

RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.device_case OUT.json [each]
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.options import criterion_of, head_of
from tests.parallel import engine_case as case
from tests.parallel.fake_gpu import GPU, WORLD, Watch, pretending
from visft_ds.config.schema import ParamGroup
from visft_ds.model import TaskModule
from visft_ds.tasks.transform import collate_joint

#: (engine, precision, stage): each makes a step of all tasks, and the first one, or every one, of each.
RUNS = (("zero1", "bf16", 2), ("zero3", "bf16", 2), ("zero1", "fp16", 1))
TASKS = ("detection", "segmentation", "captioning", "semantic")
SIDES = (((56, 112), (112, 56), (28, 112), (84, 70)),)  # (height, width) of the images of a step


def batch_of(tasks: Sequence[str]) -> Any:
    """The two images of this rank, of different sizes, with labels of some tasks, as a loader gives them."""
    samples = []
    for sample in case.samples(0, (case.TASKS,), SIDES)[:2]:
        targets = {**sample.targets, "semantic": sample.targets["segmentation"]}
        samples.append(replace(sample, targets={task: targets[task] for task in tasks}))
    return collate_joint(samples).pin_memory()


def build(stage: int, **options: Any) -> Any:
    """`engine_case.build` with a fourth head."""
    build_tasks = case.build_tasks

    def all_tasks(width: int) -> Any:
        semantic = TaskModule(head_of("semantic", width, dropout=0.0), criterion_of("semantic"))
        return {**build_tasks(width), "semantic": semantic}

    with patch.object(case, "build_tasks", all_tasks):
        return case.build(stage, **options)


def steps(
    watch: Watch, each: bool, engine_name: str, precision: str, stage: int
) -> Iterator[tuple[str, float]]:
    """Make a step of all tasks, then watch one of all, and of each: its name and its loss."""
    from visft_ds import distributed
    from visft_ds.tasks.criterion import counts_of, loss_denominators_of

    engine = case.start_engine(stage, engine_name, precision, micro=2, build=build)
    engine.module.backbone.recompute = "block"
    order = [TASKS, TASKS]
    if each:
        order += [(task,) for task in TASKS]
    for number, tasks in enumerate(order):
        batch = batch_of(tasks)
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
    case.GROUPS[1].append(ParamGroup(name="semantic", params="heads.semantic.*", lr=1e-3))
    results = []
    with pretending() as watch:
        for run in RUNS:
            each = run == RUNS[0] or "each" in sys.argv
            for tasks, loss in steps(watch, each, *run):
                findings = [[*finding, times] for finding, times in watch.findings.items()]
                results.append([[*run, tasks], loss, findings])
                watch.findings.clear()
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
