"""What the processes of a tiny run really send in a step, beside what `planner.messages` says.

One rank (see `test_comm.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.profiling.comm_case OUT.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.parallel.start_case import engine_of
from tests.tiny import TINY
from visft_ds.config import deepspeed_dict, derive_batches, resolve
from visft_ds.data.roles import Place
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import start_process_group
from visft_ds.parallel.placement import placement_for
from visft_ds.planner.messages import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND, messages_of
from visft_ds.planner.step import run_of
from visft_ds.prepare.model import prepare_model
from visft_ds.profiling.plan_validation import VOCABULARY, made_up_batch
from visft_ds.tasks.vocabulary import Vocabulary

#: Operators of torch.distributed -> our name, and which argument holds all that is sent.
CALLS = {
    "allreduce_": (ALL_REDUCE, 0),
    "_allgather_base_": (ALL_GATHER, 0),
    "allgather_": (ALL_GATHER, 0),
    "allgather_into_tensor_coalesced_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "reduce_scatter_": (REDUCE_SCATTER, 1),
    "reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1),
    "send": (SEND, 0),
}
#: Smaller ones are norms, counts and losses.
SMALL = 256
SAMPLED, FOUR = "visft.mode=sampled", "pipeline.stages=4"
#: Processes -> engine, stage, settings of each case.
CASES: dict[int, tuple[tuple[str, int, str], ...]] = {
    2: (
        *(("zero0", 2, ""), ("zero1", 2, ""), ("zero2", 2, ""), ("zero3", 2, "")),
        *(("zero1", 1, ""), ("zero1", 1, SAMPLED), ("zero3", 1, "")),
        *(("pipeline", 2, ""), ("pipeline", 1, "")),
    ),
    4: (
        *(("zero1", 2, ""), ("zero1", 1, ""), ("zero1", 1, SAMPLED)),
        *(("pipeline", 2, ""), ("pipeline", 1, ""), ("pipeline", 1, SAMPLED), ("pipeline", 2, FOUR)),
    ),
}


class Recorder(TorchDispatchMode):
    """Bytes of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name in CALLS:
            call, place = CALLS[name]
            group = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.ScriptObject))
            if dist.ProcessGroup.unbox(group).size() == 1:  # nothing is sent
                return func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)]
            self.found[call].append(sum(tensor.nbytes for tensor in tensors))
        return func(*args, **(kwargs or {}))


def compared(engine_name: str, stage: int, extra: str) -> dict[str, Any]:
    """Bytes by call of one step of this rank, predicted and recorded: of detection, or of all tasks in stage 1."""
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]
    settings += ["visft.model.precision=fp32", "zero_optimization.reduce_bucket_size=4000000"]
    if engine_name == "zero3":
        settings += ["zero_optimization.stage3_param_persistence_threshold=100"]
    settings += [extra] * bool(extra)
    config = resolve(stage=stage, model="debug", engine=engine_name, settings=settings)
    world, words = distributed.world_size(), Vocabulary(tuple(f"w{n}" for n in range(VOCABULARY - 4)))
    batches, given = derive_batches(config, world), deepspeed_dict(config, world, "fp32")
    run = run_of(config, world, "fp32", words.size, distributed.local_device())
    place = Place.of_rank(distributed.rank(), world, batches.stages)
    placement = placement_for(given, run.partition)
    prepared = prepare_model(config.visft, config.optimizer.params, vocabulary=words, placement=placement)
    engine = engine_of(config, prepared, given, run.partition)
    stream = next(iter(config.visft.streams().values()))
    batch = made_up_batch(stream, batches.micro[stream.name])
    counts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in engine.module.count(batch):
        counts[key.partition("/")[0]][key.partition("/")[2]] = torch.tensor(1.0)
    step = partial(engine.train_step, 0, [batch] * batches.accumulation * (place.role is not None), counts)
    for _ in range(3):  # ZeRO-3 learns in which order parameters are needed
        step()
    with Recorder() as recorder:
        step()
    predicted: dict[str, int] = defaultdict(int)
    for message in messages_of(run, stream, place.stage if batches.stages > 1 else None):
        predicted[message.collective] += message.bytes * message.calls * (message.bytes > SMALL)
    recorded = {call: sum(size for size in sizes if size > SMALL) for call, sizes in recorder.found.items()}
    return {
        "predicted": {k: v for k, v in predicted.items() if v},
        "recorded": {k: v for k, v in recorded.items() if v},
    }


def main(out: str) -> None:
    """One rank: all cases."""
    torch.set_num_threads(1)
    start_process_group()
    found = {", ".join(map(str, case)): compared(*case) for case in CASES[distributed.world_size()]}
    with open(f"{out}.{distributed.rank()}", "w", encoding="utf-8") as stream:
        json.dump(found, stream)
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
