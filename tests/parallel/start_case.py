"""How a model comes into memory: what each rank held meanwhile, and whether its values are those of one process.

One rank (see `test_start.py`):
    RANK=0 WORLD_SIZE=4 ... python -m tests.parallel.start_case OUT.json ENGINE SETTINGS.json
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.tiny import TINY
from visft_ds.config import ResolvedConfig, deepspeed_dict, resolve
from visft_ds.config.fields import Precision
from visft_ds.prepare.materialize import HOST, Placement
from visft_ds.prepare.model import PreparedModel, prepare_model
from visft_ds.tasks.vocabulary import Vocabulary

if TYPE_CHECKING:  # importing them costs seconds
    from visft_ds.parallel.engine import Engine
    from visft_ds.parallel.partition import Partition

WORDS = Vocabulary(("a", "red", "circle", "square"))
#: Seconds between two looks at the memory; copying the largest tensor takes longer.
INTERVAL = 0.001


def configured(engine: str, extra: Mapping[str, Any], stage: int = 2) -> ResolvedConfig:
    """The tiny model under an engine, with other settings on top."""
    settings = [f"{key}={json.dumps(value)}" for key, value in {**TINY, **extra}.items()]
    return resolve(stage=stage, model="debug", engine=engine, settings=settings)


def prepare(config: ResolvedConfig, placement: Placement) -> PreparedModel:
    """The model of a configuration."""
    return prepare_model(
        config.visft, config.optimizer.params, precision=precision_of(config), vocabulary=WORDS, placement=placement
    )


def engine_of(
    config: ResolvedConfig, prepared: PreparedModel, for_deepspeed: dict[str, Any], partition: Partition | None = None
) -> Engine:
    """The engine that a run of this configuration has."""
    from visft_ds.parallel.engine import Schedule, build_engine

    schedule, seed = Schedule(config.scheduler, config.total_steps), config.visft.seed
    return build_engine(prepared, for_deepspeed, config.optimizer.params, schedule, seed=seed, partition=partition)


def precision_of(config: ResolvedConfig) -> Precision:
    """That of a configuration which says it."""
    assert config.visft.model.precision != "auto"
    return config.visft.model.precision


def differing(config: ResolvedConfig, placement: Placement) -> list[str]:
    """Names of what is not bit for bit what one process has, or not trained as there. Collective."""
    from visft_ds.parallel.state import gathered

    plain, ours = prepare(config, HOST), prepare(config, placement)
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
    """Both stages in two precisions: {"stage:precision": what differs here}, and what this rank holds. Collective."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.placement import placement_for
    from visft_ds.planner.memory import run_of

    results: dict[str, Any] = {}
    for stage in (1, 2):
        for precision in ("fp32", "bf16"):
            config = configured(engine, {"visft.model.precision": precision}, stage)
            world, precision = distributed.world_size(), precision_of(config)
            partition = run_of(config, world, precision, WORDS.size, None).partition
            placement = placement_for(deepspeed_dict(config, world, precision), partition)
            results[f"{stage}:{precision}"] = distributed.gather_objects(differing(config, placement))
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
        into[f"{name} peak"], into[f"{name} after"] = highest[0] - before, anonymous() - before


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
    from visft_ds.parallel.placement import placement_for
    from visft_ds.planner.memory import run_of

    torch.set_num_threads(1)
    start_process_group()
    world = distributed.world_size()

    def parts(extra: Mapping[str, Any]) -> tuple[ResolvedConfig, dict[str, Any], Partition | None]:
        config = configured(engine, extra)
        run = run_of(config, world, precision_of(config), WORDS.size, None)
        return config, deepspeed_dict(config, world, run.precision), run.partition

    config, for_deepspeed, partition = parts({"visft.model.precision": "fp32"})
    engine_of(config, prepare(config, placement_for(for_deepspeed, partition)), for_deepspeed, partition)
    config, for_deepspeed, partition = parts(json.loads(settings))
    sizes: dict[str, int] = {}
    began = time.monotonic()
    with peak(sizes, "model"):
        prepared = prepare(config, placement_for(for_deepspeed, partition))
    sizes["seconds"] = round(time.monotonic() - began)
    sizes["held"], sizes["whole"], sizes["largest"] = held(prepared)
    with peak(sizes, "engine"):
        engine_of(config, prepared, for_deepspeed, partition)
    everyone = distributed.gather_objects(sizes)
    if distributed.is_main():
        Path(out).write_text(json.dumps(everyone))
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
