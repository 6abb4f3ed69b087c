"""Models of timm with the tiny heads of `engine_case`, under every engine.

One rank (see `test_timm_engines.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.timm_case OUT.pt
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from tests.parallel import engine_case as case
from visft_ds.config.schema import OptimizerParams, ParamGroup
from visft_ds.data.samples import Batch
from visft_ds.model import MultiTaskModel
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import build_timm
from visft_ds.prepare.materialize import is_small
from visft_ds.prepare.model import TrainedGroup, apply_groups
from visft_ds.tasks.spec import LossDenominators


@dataclass(frozen=True)
class Run:
    """What trains of which model."""

    model: str
    image_size: int | None  #: that stored positions belong to
    targets: tuple[str, ...]  #: of LoRA
    groups: tuple[str, ...]
    precision: str = "fp32"


#: Linear layers, depthwise convolutions (grouped ones) and dense ones.
_CONVNEXT = ("test_convnext", None, ("stages.*.mlp.fc?", "stages.*.downsample.1"))
_VIT = ("test_vit", 64, ("q", "v"))
RUNS = {
    "convnext-lora": Run(*_CONVNEXT, ("backbone.*.lora_*",)),
    "convnext-joint": Run(*_CONVNEXT, ("backbone.*.lora_*", "heads.*")),
    "convnext-all": Run("test_convnext", None, (), ("backbone.*",)),
    "convnext-bf16": Run(*_CONVNEXT, ("backbone.*.lora_*",), "bf16"),
    "vit-lora": Run(*_VIT, ("backbone.*.lora_*",)),
    "vit-all": Run("test_vit", 64, (), ("backbone.*",)),
    "vit-bf16": Run(*_VIT, ("backbone.*.lora_*",), "bf16"),
}
#: DeepSpeed never takes parameters below a threshold apart again, which is all of a tiny model: the last engine has no
#: threshold, so that a parameter which is read before its module gathers it is empty.
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "zero3_gathered")
#: Who learns in each step, and the sides of the images: feature maps of 2 x 3 and 3 x 4 cells, or 4 x 6 and 6 x 8.
ORDER = (case.TASKS, ("segmentation",), ("captioning",), ("detection",), case.TASKS, ("segmentation",))
SIDES = ((64, 96), (96, 128))
_engine_config = case.engine_config


def use(run: Run) -> None:
    """From now on every tiny model of this process is this one, under any engine."""

    def build(stage: int, *, storage: torch.dtype = torch.float32) -> tuple[MultiTaskModel, tuple[TrainedGroup, ...]]:
        assert stage == 2
        backbone = build_timm(run.model, image_size=run.image_size, seed=3)
        torch.manual_seed(5)
        heads_train = "heads.*" in run.groups
        module = MultiTaskModel(
            backbone, case.build_tasks(backbone.width), train_backbone=True, heads_active=heads_train
        )
        if run.targets:
            inject_lora(backbone, rank=4, alpha=8.0, targets=run.targets, seed=1)
        for name, parameter in backbone.named_parameters():
            if name.endswith("lora_B"):  # B = 0 would hide errors in the gradient of A
                torch.nn.init.normal_(parameter, std=0.05)
        groups = [ParamGroup(name=str(place), params=params) for place, params in enumerate(run.groups)]
        trained = apply_groups(module, groups, OptimizerParams(lr=1e-3, weight_decay=1e-4))
        for name, parameter in backbone.named_parameters():
            if not parameter.requires_grad and not is_small(name, parameter.shape):
                parameter.data = parameter.data.to(storage)
        return module, trained

    def engine_config(name: str, precision: str, accumulation: int = 2) -> dict[str, Any]:
        config = _engine_config(name.removesuffix("_gathered"), precision, accumulation)
        if name.endswith("_gathered"):
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    case.build, case.engine_config = build, engine_config


def train_plain(run: Run) -> dict[str, Any]:
    """`engine_case.train_plain` of one of the models, in bf16 with the engines' micro-batches."""
    use(run)
    return case.train_plain(2, run.precision, ORDER, SIDES, parts=1 if run.precision == "fp32" else case.GLOBAL_BATCH)


def fed(engine: Any, step: int) -> tuple[list[Batch], LossDenominators]:
    """This rank's share of a step, and what its losses are divided by."""
    from visft_ds.parallel import distributed

    rank, world = distributed.rank(), distributed.world_size()
    starts = [index * world + rank for index in range(engine.accumulation)]
    batches = [case.part(step, first, first + 1, ORDER, SIDES) for first in starts]
    whole = case.global_batch(step, ORDER, SIDES)
    return batches, case.loss_denominators(engine.module, whole, world * engine.accumulation)


def main(out: str) -> None:
    """One rank: a few steps of every run under every engine."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel import engine as engine_module

    torch.set_num_threads(1)
    engine_module.start_process_group()
    results: dict[str, Any] = {}
    for name, run in RUNS.items():
        use(run)
        for engine_name in ENGINES:
            engine = case.start_engine(2, engine_name, run.precision)
            results[f"{engine_name} {name}"] = case.run_steps(engine, 0, len(ORDER), None, feed=fed)
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1])
