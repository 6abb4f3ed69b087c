"""A step of each task under ZeRO-1 on fake CUDA, with the tiny model: what a GPU waits for, as lines of JSON.

LD_PRELOAD=fake_cuda.so DS_ACCELERATOR=cuda RANK=0 ... python -m tests.parallel.fake_cuda_case
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.parallel import fake_cuda
from tests.parallel.fake_cuda import WORLD, Watch, on_gpu, watched

if __name__ == "__main__":
    fake_cuda.start()

from tests.parallel import engine_case as case
from visft_ds.model import counts_of, loss_denominators_of
from visft_ds.tasks import matching

#: The labels of a step by who learns in it.
STEP = {tasks[0]: step for step, tasks in enumerate(case.ORDER) if len(tasks) == 1}


def step(watch: Watch, task: str) -> None:
    """Two steps of the engine on rank 0 of eight; the second one is watched."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.engine import Engine

    case.forget_autocast()
    with _disable_current_modes():
        module, groups = case.build(2, storage=torch.bfloat16)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    on_gpu(module)
    fake = dict(module.named_parameters())
    given = [
        {
            "params": [fake[names[id(p)]] for p in group.parameters],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in groups
    ]
    module.backbone.recompute = "block"
    config = case.engine_config("zero1", "bf16", accumulation=1)
    engine = Engine(module, given, config, build_optimizer=torch.optim.AdamW, schedule=case.factor, seed=0)
    on_host = case.part(STEP[task], 0, 2)
    for number in range(2):
        watch.on = number == 1
        batch = on_host.to(engine.device)
        agreed = distributed.agree_on_step(f"step {number}", counts_of(module, [batch]), False, engine.device)
        report = engine.train_step(number, [batch], loss_denominators_of(agreed.counts, WORLD, engine.device))
        assert not report.refused and not report.skipped, report
    watch.on = False
    engine.deepspeed.destroy()


def join() -> None:
    """Be rank 0 of a group whose others do and send nothing."""
    import deepspeed
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    torch.nn.Module.to = lambda self, *_, **__: self


def with_true_counts(copied: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """`matching.to_host` of fake costs: counts and labels are those of the host, if known, the costs are 0."""
    values = zip(tensors, copied(*tensors), strict=True)
    return [tensor.held.numpy() if hasattr(tensor, "held") else found for tensor, found in values]


def main() -> None:
    warnings.simplefilter("ignore")  # DeepSpeed's, and those of what is not there
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed's messages are no answers
    join()
    matching.to_host = partial(with_true_counts, matching.to_host)
    for task in STEP:
        torch.manual_seed(0)
        with watched() as watch:
            step(watch, task)
        found = [asdict(replace(one, times=times)) for one, times in Counter(watch.found).items()]
        print(json.dumps({task: found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
