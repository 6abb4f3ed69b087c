"""Steps of the tiny model on fake CUDA: reads names of cases, one a line, and answers each by a line of JSON.

LD_PRELOAD=fake_cuda.so DS_ACCELERATOR=cuda RANK=0 ... python -m tests.parallel.fake_cuda_case
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.parallel import fake_cuda
from tests.parallel.fake_cuda import DEVICE, WORLD, Watch, on_gpu, watched

if __name__ == "__main__":
    fake_cuda.start()

from tests.parallel import engine_case as case
from tests.parallel import packed_case, timm_case
from visft_ds.data.samples import Batch, Upload
from visft_ds.model import MultiTaskModel, counts_of, loss_denominators_of
from visft_ds.prepare.model import TrainedGroup
from visft_ds.tasks import TASKS, matching

PRECISIONS = ("fp32", "bf16", "fp16")
POLICIES = ("block", "mlp")
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
#: The labels of a step by who learns in it.
STEP = {
    **{tasks[0]: step for step, tasks in enumerate(case.ORDER) if len(tasks) == 1},
    "joint": case.ORDER.index(case.TASKS),
}


def model(stage: int, precision: str) -> tuple[MultiTaskModel, tuple[TrainedGroup, ...]]:
    """The tiny model on the GPU, what trains of it in the groups of `engine_case`."""
    with _disable_current_modes():
        module, groups = case.build(stage, storage=case.STORAGE[precision])
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    on_gpu(module)
    fake = dict(module.named_parameters())
    return module, tuple(replace(g, parameters=tuple(fake[names[id(p)]] for p in g.parameters)) for g in groups)


def autocast(precision: str) -> Any:
    """Autocast as the engines turn it on."""
    return nullcontext() if precision == "fp32" else torch.autocast("cuda", case.STORAGE[precision])


def batch_of(tasks: str, *, packed: bool = False) -> Batch:
    """Two images and their labels on the host; their sizes differ where they are packed."""
    if not packed:
        return case.part(STEP[tasks], 0, 2)
    with packed_case.mixed_sizes():
        return case.part(STEP[tasks], 0, 2)


def check_gradients(module: MultiTaskModel) -> None:
    """Everything that trains has a gradient as the optimiser needs it."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.device == DEVICE, name
    assert any(parameter.grad is not None for parameter in module.parameters())


def step(
    watch: Watch,
    tasks: str,
    stage: int = 2,
    precision: str = "bf16",
    recompute: str = "none",
    packed: bool = False,
    timm: str | None = None,
) -> None:
    """Forward, losses and backward."""
    if timm is not None:
        timm_case.use(timm_case.RUNS[timm])
    module, _ = model(stage, precision)
    batch = batch_of(tasks, packed=packed)
    module.packed = packed
    module.backbone.recompute = recompute
    module.train()
    watch.on = True
    denominators = loss_denominators_of(counts_of(module, [batch]), 1, DEVICE)
    with autocast(precision):
        losses = module(batch.to(DEVICE), denominators)
    losses["loss"].backward()
    check_gradients(module)


def predict(watch: Watch, task: str) -> None:
    """Predictions, and detections and masks made of them on the host."""
    module, _ = model(2, "bf16")
    batch = batch_of(task)
    module.eval()
    watch.on = True
    with torch.no_grad(), autocast("bf16"):
        outputs = module(batch.to(DEVICE))
    if not TASKS[task].uses_vocabulary:
        TASKS[task].results(outputs[task], batch.to(DEVICE), None)


def pipeline(watch: Watch, task: str, packed: bool = False) -> None:
    """The layers of a pipeline, one after another, and the backward pass through them."""
    from visft_ds.parallel.pipeline_layers import HeadsLayer, pipeline_layers, travelling_label

    module, _ = model(2, "bf16")
    batch = batch_of(task, packed=packed)
    module.packed = packed
    module.backbone.recompute = "block"
    module.train()
    denominators = loss_denominators_of(counts_of(module, [batch]), 1, DEVICE)
    travelling: Any = tuple(t.to(DEVICE) for t in (batch.images, batch.sizes, travelling_label(module, batch)))
    *layers, (_, heads) = pipeline_layers(module)
    assert isinstance(heads, HeadsLayer)
    heads.batch, heads.loss_denominators = batch, denominators
    watch.on = True
    with autocast("bf16"):
        for _, layer in layers:
            travelling = layer(travelling)
        losses = heads(travelling)
    losses["loss"].backward()
    check_gradients(module)


def engine(watch: Watch, name: str, tasks: str = "detection", stage: int = 2, precision: str = "bf16") -> None:
    """Two steps of an engine on rank 0 of eight; the second one is watched."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.engine import ZeroEngine

    case.forget_autocast()
    module, groups = model(stage, precision)
    module.backbone.recompute = "block"
    given = [{"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name} for g in groups]
    config = case.engine_config(name, precision, accumulation=1)
    made = ZeroEngine(module, given, config, build_optimizer=torch.optim.AdamW, schedule=case.factor, seed=0)
    assert made.device.type == "cuda" and made.stage == int(name[4]), (made.device, made.stage)
    upload, on_host = Upload(made.device), batch_of(tasks)
    for number in range(2):
        watch.on = number == 1
        batch = upload(on_host)
        agreed = distributed.agree_on_step(f"step {number}", counts_of(module, [batch]), False, made.device)
        report = made.train_step(number, [batch], loss_denominators_of(agreed.counts, WORLD, made.device))
        assert not report.refused and not report.skipped, report
    watch.on = False
    made.deepspeed.destroy()


def upload(watch: Watch) -> None:
    """A batch that another stream copies, and the stream that computes with it; the host's part of it stays there."""
    recorded = []
    record, torch.Tensor.record_stream = torch.Tensor.record_stream, lambda tensor, _: recorded.append(tensor)
    on_host = batch_of("joint")
    watch.on = True
    there = Upload(DEVICE)(on_host).to(DEVICE)
    torch.Tensor.record_stream = record
    here = (there.original_sizes, there.indices, there.image_ids, there.random_keys, there.real, there.frames)
    assert all(tensor is not None and tensor.device.type == "cpu" for tensor in here)
    parts = (there, *there.targets.values())
    tensors = [value for part in parts for value in vars(part).values() if isinstance(value, Tensor)]
    assert {id(tensor) for tensor in recorded} == {id(tensor) for tensor in tensors if tensor.device == DEVICE}
    assert len(recorded) == len({id(tensor) for tensor in recorded}) > 5


def join() -> None:
    """Be rank 0 of a group whose others do and send nothing."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.runtime.zero import partitioned_param_coordinator, utils
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    for module in (partitioned_param_coordinator, utils):  # they compare numbers of ranks that send none
        for name in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if hasattr(module, name):
                setattr(module, name, lambda *_, **__: None)
    torch.nn.Module.to = lambda self, *_, **__: self


def with_true_counts(copied: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """`matching.to_host` of fake costs: counts and labels are those of the host, if known, the costs are 0."""
    values = zip(tensors, copied(*tensors), strict=True)
    return [tensor.held.numpy() if hasattr(tensor, "held") else found for tensor, found in values]


TRIO = ("detection", "segmentation", "captioning")
CASES: dict[str, Callable[[Watch], None]] = {
    **{
        f"stage{stage}-{task}-{precision}": partial(step, tasks=task, stage=stage, precision=precision)
        for stage in (1, 2)
        for task in TRIO
        for precision in PRECISIONS
    },
    **{f"recompute-{policy}": partial(step, tasks="detection", recompute=policy) for policy in POLICIES},
    **{f"packed-{task}": partial(step, tasks=task, packed=True) for task in TRIO},
    **{f"joint-stage{stage}": partial(step, tasks="joint", stage=stage) for stage in (1, 2)},
    "upload": upload,
    **{f"predict-{task}": partial(predict, task=task) for task in TRIO},
    **{f"timm-{run}": partial(step, tasks="joint", timm=run) for run in ("vit-lora", "convnext-lora", "convnext-all")},
    **{f"pipeline-{task}": partial(pipeline, task=task) for task in TRIO},
    "pipeline-packed": partial(pipeline, task="detection", packed=True),
    **{
        f"{name}-{precision}": partial(engine, name=name, precision=precision)
        for name in ENGINES
        for precision in PRECISIONS
    },
    **{f"{name}-stage1": partial(engine, name=name, stage=1, tasks="segmentation") for name in ENGINES},
    **{f"zero1-{task}": partial(engine, name="zero1", tasks=task) for task in TRIO},
    "zero1-joint": partial(engine, name="zero1", tasks="joint"),
}


def main() -> None:
    warnings.simplefilter("ignore")  # DeepSpeed's, and those of what is not there
    torch.set_num_threads(1)
    join()
    matching.to_host = partial(with_true_counts, matching.to_host)
    build, config = case.build, case.engine_config
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed's messages are no answers
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        case.build, case.engine_config = build, config  # which models of timm replace
        torch.manual_seed(0)
        with watched() as watch:
            CASES[line.strip()](watch)
        found = [asdict(replace(one, times=times)) for one, times in Counter(watch.found).items()]
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
