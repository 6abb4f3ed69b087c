"""How a model comes into memory: what each rank held meanwhile, and whether its values are those of one process.

One rank (see `test_start.py`):
    RANK=0 WORLD_SIZE=4 ... python -m tests.parallel.start_case OUT.json ENGINE SETTINGS.json
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.tiny import TINY
from visft_ds.config import ResolvedConfig, deepspeed_dict, resolve
from visft_ds.prepare.materialize import HOST, Placement
from visft_ds.prepare.model import PreparedModel, prepare_model
from visft_ds.tasks.vocabulary import Vocabulary

if TYPE_CHECKING:  # importing it costs seconds
    from visft_ds.parallel.engine import Engine

WORDS = Vocabulary(("a", "red", "circle", "square"))
#: Seconds between two looks at the memory; copying the largest tensor takes longer.
INTERVAL = 0.001


def configured(engine: str, extra: Mapping[str, Any], stage: int = 2) -> ResolvedConfig:
    """The tiny model under an engine, with other settings on top."""
    settings = [f"{key}={json.dumps(value)}" for key, value in {**TINY, **extra}.items()]
    return resolve(stage=stage, model="debug", engine=engine, settings=settings)


def prepare(config: ResolvedConfig, placement: Placement) -> PreparedModel:
    """The model of a configuration that says its precision."""
    precision = config.visft.model.precision
    assert precision != "auto"
    return prepare_model(
        config.visft, config.optimizer.params, precision=precision, vocabulary=WORDS, placement=placement
    )


def prepared_for_engine(config: ResolvedConfig) -> tuple[PreparedModel, Callable[[], Engine]]:
    """This rank's part of the model, and what makes the engine of it that a run of this configuration has."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.engine import Schedule, build_engine
    from visft_ds.parallel.placement import placement_for
    from visft_ds.planner.memory import run_of

    precision, world = config.visft.model.precision, distributed.world_size()
    assert precision != "auto"
    partition = run_of(config, world, precision, WORDS.size, None).partition
    for_deepspeed = deepspeed_dict(config, world, precision)
    prepared = prepare(config, placement_for(for_deepspeed, partition))
    schedule = Schedule(config.scheduler, config.total_steps)
    return prepared, partial(
        build_engine, prepared, for_deepspeed, config.optimizer.params, schedule, seed=0, partition=partition
    )


def differing(config: ResolvedConfig) -> list[str]:
    """Names of what is not bit for bit what one process has, or not trained as there. Collective."""
    from visft_ds.parallel.state import gathered

    plain, (ours, _) = prepare(config, HOST), prepared_for_engine(config)
    found = []
    for name, expected in plain.module.named_parameters():
        parameter = ours.module.get_parameter(name)
        if parameter.is_meta:
            continue
        value = gathered(parameter)
        same = value.dtype == expected.dtype and torch.equal(value, expected)
        if not same or parameter.requires_grad != expected.requires_grad:
            found.append(name)
    if [group.names for group in plain.groups] != [group.names for group in ours.groups]:
        found.append("groups")
    return found


def started(engine: str) -> dict[str, Any]:
    """Both stages in two precisions: {"stage:precision": what differs on each rank}. Collective."""
    from visft_ds.parallel import distributed

    results: dict[str, Any] = {}
    for stage, precision in product((1, 2), ("fp32", "bf16")):
        config = configured(engine, {"visft.model.precision": precision}, stage)
        results[f"{stage}:{precision}"] = distributed.gather_objects(differing(config))
    return results


def anonymous() -> int:
    """Bytes of this process that belong to no file; pages of a mapped weight file do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell anonymous memory (Linux 4.5 and later do)")


@contextmanager
def peak(into: dict[str, int], name: str) -> Iterator[None]:
    """Note by how many bytes the process had grown at most meanwhile, and at the end."""
    before, done, highest = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(INTERVAL)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        after = anonymous()  # what is quick may end before the thread looks
        into[f"{name} peak"], into[f"{name} after"] = max(highest[0], after) - before, after - before


def held(prepared: PreparedModel) -> tuple[int, int, int]:
    """Bytes of values in this process, of the whole model, and of its largest tensor."""
    here, whole, largest = 0, 0, 0
    for parameter in prepared.module.parameters():
        size = int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
        local = getattr(parameter, "ds_tensor", parameter)
        here += 0 if local.is_meta else local.numel() * local.element_size()
        whole, largest = whole + size, max(largest, size)
    return here, whole, largest


def main(out: str, engine: str, settings: str) -> None:
    """One rank starts twice: small, so that everything is imported and set up, then in the given size, measured."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.engine import start_process_group

    torch.set_num_threads(1)
    start_process_group()
    prepared_for_engine(configured(engine, {"visft.model.precision": "fp32"}))[1]()
    sizes: dict[str, int] = {}
    with peak(sizes, "model"):
        prepared, build = prepared_for_engine(configured(engine, json.loads(settings)))
    sizes["held"], sizes["whole"], sizes["largest"] = held(prepared)
    build()
    everyone = distributed.gather_objects(sizes)
    if distributed.is_main():
        Path(out).write_text(json.dumps(everyone))
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
