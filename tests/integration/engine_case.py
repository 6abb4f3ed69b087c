"""A tiny two-task model, its batches, and two ways to train it: the ZeRO engine and plain PyTorch.

Run as a module it is one rank of the engine (see `test_engines.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.integration.engine_case OUT.pt ENGINE
Of its two tasks one is idle in every step: a head without a gradient is where DeepSpeed goes wrong silently.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from visft_ds.config.layers import CONFIG_ROOT
from visft_ds.config.schema import OptimizerParams, ParamGroup
from visft_ds.data.samples import Batch, DetectionTargets
from visft_ds.models.eva_vit import build_backbone
from visft_ds.models.lora import inject_lora
from visft_ds.multitask import MultiTaskModel, Normaliser, TaskModule
from visft_ds.stages import TrainedGroup, apply_groups
from visft_ds.tasks.detection import DetectionCriterion, DetectionHead

STEPS, SAVED_AT, GLOBAL_BATCH, CLIP = 6, 3, 4, 0.02
#: Which head learns in each step; in most steps the other one has no gradient.
ORDER = ("first", "first", "second", "first", "second", "second")
HEAD = {
    "num_queries": 6,
    "encoder_dim": 16,
    "decoder_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_heads": 2,
}
GROUPS = {
    1: [
        ParamGroup(name="matrices", params="heads.*weight", lr=2e-3, weight_decay=0.1),
        ParamGroup(name="biases", params="heads.*bias", lr=1e-3, weight_decay=0.0),
    ],
    2: [ParamGroup(name="a", params="*.lora_A", lr=1e-2), ParamGroup(name="b", params="*.lora_B", lr=2e-2)],
}


class TaskCriterion(DetectionCriterion):
    """The detection criterion under another task name."""

    def __init__(self, task: str) -> None:
        super().__init__(num_queries=HEAD["num_queries"], decoder_layers=HEAD["decoder_layers"])
        self.task = task

    def count(self, batch: Batch) -> dict[str, float]:
        """As for detection."""
        return super().count(Batch(**{**vars(batch), "targets": {"detection": batch.targets[self.task]}}))


def build(stage: int, *, storage: torch.dtype = torch.float32) -> tuple[MultiTaskModel, tuple[TrainedGroup, ...]]:
    """The same model in every process; frozen matrices in `storage`, what trains in fp32."""
    backbone = build_backbone("debug", seed=3, width=32, depth=2, num_heads=2, image_size=56)
    torch.manual_seed(5)
    names = ("first", "second")
    tasks = {n: TaskModule(DetectionHead(32, ffn_dim=32, dropout=0.0, **HEAD), TaskCriterion(n)) for n in names}
    module = MultiTaskModel(backbone, tasks, train_backbone=stage == 2, heads_active=stage == 1)
    if stage == 2:
        inject_lora(backbone, rank=4, alpha=8.0, targets=("q", "v"), seed=1)
        for name, parameter in backbone.named_parameters():
            if name.endswith("lora_B"):  # B = 0 would hide errors in the gradient of A
                torch.nn.init.normal_(parameter, std=0.05)
    groups = apply_groups(module, GROUPS[stage], OptimizerParams(lr=1e-3, weight_decay=1e-4))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and parameter.ndim >= 2 and name.startswith("backbone.blocks"):
            parameter.data = parameter.data.to(storage)
    return module, groups


def global_batch(step: int) -> Batch:
    """Images and boxes of a step: a pure function of the step. One image has no object."""
    generator = torch.Generator().manual_seed(100 + step)
    counts = torch.tensor([2, 0, 1, 3])
    n = int(counts.sum())
    centers = 0.3 + 0.4 * torch.rand(n, 2, generator=generator)
    boxes = torch.cat([centers, 0.1 + 0.2 * torch.rand(n, 2, generator=generator)], dim=1)
    labels = torch.randint(1, 90, (n,), generator=generator)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return as_batch(images, DetectionTargets(boxes, labels, counts), ORDER[step])


def as_batch(images: torch.Tensor, targets: DetectionTargets, task: str) -> Batch:
    """A batch of square images of one task."""
    size = torch.full((len(images), 2), images.shape[-1])
    ids = torch.arange(len(images))
    return Batch(images, size, size, ids, ids, ids, torch.ones(len(images), dtype=torch.bool), {task: targets})


def part(whole: Batch, start: int, stop: int) -> Batch:
    """Some images of a batch, with their boxes."""
    ((task, targets),) = whole.targets.items()
    edges = [0, *targets.counts.cumsum(0).tolist()]
    low, high = edges[start], edges[stop]
    chosen = DetectionTargets(targets.boxes[low:high], targets.labels[low:high], targets.counts[start:stop])
    return as_batch(whole.images[start:stop], chosen, task)


def normaliser(module: MultiTaskModel, whole: Batch, parts: int) -> Normaliser:
    """What the trainer derives from the counts of all ranks."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in module.count(whole).items():
        task, _, count = name.partition("/")
        result.setdefault(task, {})[count] = torch.tensor(max(value, 1.0) / parts)
    return result


def factor(step: int) -> float:
    """A schedule that changes in every step."""
    return (step + 1) / (STEPS + 1)


def train_plain(stage: int, precision: str = "fp32") -> dict[str, Any]:
    """One process, one batch, torch alone: what every engine has to equal.

    A head that takes no part has zero gradients, not none: its moments decay and weight decay applies, as in DeepSpeed.
    """
    module, groups = build(stage, storage=torch.bfloat16 if precision == "bf16" else torch.float32)
    parameters = [{"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    optimizer = torch.optim.AdamW(parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    trained = [p for g in groups for p in g.parameters]
    losses, norms = [], []
    for step in range(STEPS):
        module.train()
        whole = global_batch(step)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module(whole, normaliser(module, whole, 1))["loss"]
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    values = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    return {"losses": losses, "norms": norms, "values": values}


def _engine(stage: int, name: str, precision: str) -> Any:
    from visft_ds.parallel.engine import ZeroEngine

    config = json.loads((CONFIG_ROOT / f"engines/{name}.json").read_text())
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    module, groups = build(stage, storage=torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer_groups = [
        {"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name} for g in groups
    ]
    return ZeroEngine(module, optimizer_groups, config, build_optimizer=torch.optim.AdamW, schedule=factor, seed=0)


def _run(engine: Any, start: int, stop: int, folder: Path | None) -> dict[str, Any]:
    from visft_ds.parallel import distributed
    from visft_ds.parallel.checkpoint import save_checkpoint
    from visft_ds.parallel.engine_state import gather_parameters, gather_state

    rank, world = distributed.rank(), distributed.world_size()
    micro = GLOBAL_BATCH // (world * engine.accumulation)
    losses, norms = [], []
    for step in range(start, stop):
        whole = global_batch(step)
        starts = [(index * world + rank) * micro for index in range(engine.accumulation)]
        batches = [part(whole, first, first + micro) for first in starts]
        report = engine.train_step(step, batches, normaliser(engine.module, whole, world * engine.accumulation))
        losses.append(report.losses["loss"])
        norms.append(report.gradient_norm)
        if folder is not None and step + 1 == SAVED_AT:
            state = gather_state(engine)
            if state is not None:
                save_checkpoint(folder, step + 1, state, {"case": "tiny"}, keep_last=2)
            distributed.barrier()
    return {"losses": losses, "norms": norms, "values": gather_parameters(engine)}


def main(out: str, name: str) -> None:
    """One rank: both stages in fp32 and bf16, a resume of each, and stage 1 without the remedy for stale gradients."""
    from visft_ds.parallel import checkpoint, distributed
    from visft_ds.parallel import engine as engine_module
    from visft_ds.parallel.engine_state import restore_state

    torch.set_num_threads(1)
    engine_module.start_process_group()
    results: dict[str, Any] = {}
    for stage in (1, 2):
        folder = Path(out).parent / f"{name}-stage{stage}"
        results[f"stage{stage}"] = _run(_engine(stage, name, "fp32"), 0, STEPS, folder)
        resumed = _engine(stage, name, "fp32")
        found, _ = checkpoint.newest_checkpoint(folder)
        assert found is not None
        restore_state(resumed, found.load(), found.step)
        results[f"stage{stage}-resumed"] = _run(resumed, SAVED_AT, STEPS, None)
        results[f"stage{stage}-bf16"] = _run(_engine(stage, name, "bf16"), 0, STEPS, None)
    if name != "zero3_offload":  # the loss scaler is the same as without offload
        results["stage1-fp16"] = _run(_engine(1, name, "fp16"), 0, STEPS, None)
    engine_module.clear_stale_gradients = lambda optimizer: None
    results["stage1-without-remedy"] = _run(_engine(1, name, "fp32"), 0, STEPS, None)
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
