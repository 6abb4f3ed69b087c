"""Models of timm with the tiny heads of `engine_case`, under every engine.

One rank (see `test_timm_engines.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.timm_case OUT.pt
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.parallel import engine_case as case
from visft_ds.config.schema import OptimizerParams, ParamGroup
from visft_ds.model import MultiTaskModel
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import build_timm
from visft_ds.prepare.materialize import is_small
from visft_ds.prepare.model import TrainedGroup, apply_groups


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


def build(
    run: Run, stage: int, *, storage: torch.dtype = torch.float32
) -> tuple[MultiTaskModel, tuple[TrainedGroup, ...]]:
    """`engine_case.build` of a run."""
    assert stage == 2
    backbone = build_timm(run.model, image_size=run.image_size, seed=3)
    torch.manual_seed(5)
    heads_train = "heads.*" in run.groups
    module = MultiTaskModel(backbone, case.build_tasks(backbone.width), train_backbone=True, heads_active=heads_train)
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


def train_plain(run: Run) -> dict[str, Any]:
    """`engine_case.train_plain` of one of the models, in bf16 with the engines' micro-batches."""
    parts = 1 if run.precision == "fp32" else case.GLOBAL_BATCH
    return case.train_plain(2, run.precision, ORDER, SIDES, parts, partial(build, run))


def main(out: str) -> None:
    """One rank: a few steps of every run under every engine."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel import engine as engine_module

    torch.set_num_threads(1)
    engine_module.start_process_group()
    results: dict[str, Any] = {}
    for name, run in RUNS.items():
        for engine_name in ENGINES:
            engine = case.start_engine(2, engine_name, run.precision, build=partial(build, run))
            feed = partial(case.fed, order=ORDER, sides=SIDES)
            results[f"{engine_name} {name}"] = case.run_steps(engine, 0, len(ORDER), None, feed)
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1])
