"""A tiny model of all three tasks, its batches, and two ways to train it: the ZeRO engine and plain PyTorch.

Run as a module it is one rank of the engine (see `test_engines.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.engine_case OUT.pt ENGINE [straight]
In most steps one task learns and two are idle: a head without a gradient is where DeepSpeed goes wrong
silently. In one step all three learn from the same images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

import visft_ds.ops.lora
from tests.options import criterion_of, head_of
from tests.random_tower import build_backbone, move_adapters
from tests.ranks import run_ranks
from visft_ds.config.resolve import CONFIG_ROOT
from visft_ds.config.schema import OptimizerParams, ParamGroup
from visft_ds.data.samples import Batch, Sample
from visft_ds.distributed import PipelinePosition
from visft_ds.model import MultiTaskModel, TaskModule
from visft_ds.models.lora import inject_lora
from visft_ds.ops.lora import choose_backend
from visft_ds.prepare.model import TrainedGroup, apply_groups
from visft_ds.tasks.criterion import LossDenominators, counts_of
from visft_ds.tasks.transform import collate_joint

SAVED_AT, GLOBAL_BATCH, CLIP, SIDE = 3, 4, 0.001, 56
TASKS = ("detection", "segmentation", "captioning")
#: Who learns in each step.
ORDER = (
    ("detection",),
    ("segmentation",),
    ("captioning",),
    TASKS,
    ("captioning",),
    ("segmentation",),
    ("detection",),
)
STEPS, VOCABULARY = len(ORDER), 12
#: First layers of the stages of a pipeline: the layers are embedding, two blocks and heads.
BOUNDS = {2: (0, 2, 4), 4: (0, 1, 2, 3, 4)}
Order = Sequence[tuple[str, ...]]  #: the tasks of each step
#: (height, width) of the images, or of each of them, step after step, again from the first.
Sides = Sequence[tuple[int, int] | Sequence[tuple[int, int]]]
Build = Callable[..., tuple[MultiTaskModel, tuple[TrainedGroup, ...]]]  #: as `build`
Feed = Callable[[Any, int], tuple[list[Batch], LossDenominators]]  #: (engine, step) -> what a rank is given
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  #: of the frozen matrices
SCALE = 65536.0  #: with which fp16 begins
GROUPS = {
    1: [
        ParamGroup(name="detection", params="heads.detection.*", lr=2e-3, weight_decay=0.1),
        ParamGroup(name="segmentation", params="heads.segmentation.*", lr=1e-3, weight_decay=0.0),
        ParamGroup(name="captioning", params="heads.captioning.*", lr=3e-3),
    ],
    2: [ParamGroup(name="a", params="*.lora_A", lr=1e-2), ParamGroup(name="b", params="*.lora_B", lr=2e-2)],
}


def build_tasks(width: int) -> dict[str, TaskModule]:
    """Three heads, each as small as it gets with everything in it."""
    shared = {
        "detection": {"num_queries": 6, "decoder_layers": 2},
        "segmentation": {"num_queries": 6, "decoder_layers": 1},
        "captioning": {},
    }
    narrow: dict[str, dict[str, Any]] = {
        "detection": {
            "encoder_dim": 16,
            "decoder_dim": 16,
            "encoder_layers": 1,
            "num_heads": 2,
            "ffn_dim": 32,
        },
        "segmentation": {"hidden_dim": 32, "encoder_layers": 1, "num_heads": 2},
        "captioning": {"attention_dim": 16, "embed_dim": 16, "decoder_dim": 16, "encoded_image_size": 3},
    }
    narrow["segmentation"] |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    narrow["captioning"] |= {"vocabulary_size": VOCABULARY}
    loss = {"segmentation": {"train_num_points": 48}}
    return {
        task: TaskModule(
            head_of(task, width, dropout=0.0, **shared[task], **narrow[task]),
            criterion_of(task, **shared[task], **loss.get(task, {})),
        )
        for task in shared
    }


def build(
    stage: int, *, storage: torch.dtype = torch.float32
) -> tuple[MultiTaskModel, tuple[TrainedGroup, ...]]:
    """The same model in every process; frozen matrices in `storage`, what trains in fp32."""
    backbone = build_backbone("debug", seed=3, width=32, depth=2, num_heads=2, image_size=SIDE)
    torch.manual_seed(5)
    module = MultiTaskModel(backbone, build_tasks(32), train_backbone=stage == 2, heads_active=stage == 1)
    if stage == 2:
        inject_lora(backbone, rank=4, alpha=8.0, targets=("q", "v"), seed=1)
        move_adapters(backbone, spread=0.05)  # B = 0 would hide errors in the gradient of A
    groups = apply_groups(module, GROUPS[stage], OptimizerParams(lr=1e-3, weight_decay=1e-4))
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and parameter.ndim >= 2 and name.startswith("backbone.blocks"):
            parameter.data = parameter.data.to(storage)
    return module, groups


def samples(step: int, order: Order = ORDER, sides: Sides = ((SIDE, SIDE),)) -> list[Sample]:
    """Images and labels of a step: a pure function of the step. One image has no object, one no caption."""
    sizes: Any = sides[step % len(sides)]
    rng = np.random.default_rng(100 + step)
    made = []
    for position, objects in enumerate((2, 0, 1, 3)):
        height, width = size = sizes if isinstance(sizes[0], int) else sizes[position]
        targets = {
            "detection": _boxes(rng, objects),
            "segmentation": _masks(rng, objects, size),
            "captioning": _caption(rng, words=(3, 5, 0, 2)[position]),
        }
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        made.append(
            Sample(
                index=position,
                image_id=position,
                original_size=size,
                size=size,
                image=image,
                random_key=1000 * step + position,
                targets={task: targets[task] for task in order[step]},
            )
        )
    return made


def _boxes(rng: np.random.Generator, objects: int) -> Mapping[str, npt.NDArray[Any]]:
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (objects, 2)), rng.uniform(0.1, 0.3, (objects, 2))], axis=1)
    return {"boxes": boxes.astype(np.float32), "labels": rng.integers(1, 90, objects)}


def _masks(rng: np.random.Generator, objects: int, size: tuple[int, int]) -> Mapping[str, npt.NDArray[Any]]:
    masks = np.zeros((objects, size[0] // 4, size[1] // 4), dtype=np.uint8)
    for mask, top, left in zip(masks, rng.integers(0, 8, objects), rng.integers(0, 8, objects), strict=True):
        mask[top : top + 6, left : left + 5] = 255
    return {"masks": masks, "labels": rng.integers(0, 80, objects)}


def _caption(rng: np.random.Generator, words: int) -> Mapping[str, npt.NDArray[Any]]:
    tokens = (
        [VOCABULARY - 2, *rng.integers(1, VOCABULARY - 3, words), VOCABULARY - 1]
        if words
        else [VOCABULARY - 2]
    )
    return {
        "tokens": np.array(tokens, dtype=np.int64),
        "references": np.array(["words"] * bool(words), dtype=object),
    }


def global_batch(step: int, order: Order = ORDER, sides: Sides = ((SIDE, SIDE),)) -> Batch:
    """All images of a step."""
    return collate_joint(samples(step, order, sides))


def part(step: int, start: int, stop: int, order: Order = ORDER, sides: Sides = ((SIDE, SIDE),)) -> Batch:
    """Some images of a step, with their labels; padded captions are as long as its own longest."""
    return collate_joint(samples(step, order, sides)[start:stop])


def loss_denominators(module: MultiTaskModel, whole: Batch, parts: int) -> LossDenominators:
    """What the trainer derives from the counts of all ranks."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in counts_of(module.criteria, [whole]).items():
        task, _, count = name.partition("/")
        result.setdefault(task, {})[count] = torch.tensor(max(value, 1.0) / parts)
    return result


def factor(step: int) -> float:
    """A schedule that changes in every step."""
    return (step + 1) / (STEPS + 1)


def like_a_gpu(device: torch.device, dtype: torch.dtype) -> str:
    """`choose_backend` that takes for bf16 what GPUs take, so that engines meet the kept [W | B] of the
    layers.
    """
    return "augmented" if dtype == torch.bfloat16 else choose_backend(device, dtype)


@patch.object(visft_ds.ops.lora, "choose_backend", like_a_gpu)
def train_plain(
    stage: int,
    precision: str = "fp32",
    order: Order = ORDER,
    sides: Sides = ((SIDE, SIDE),),
    parts: int = 1,
    build: Build = build,
) -> dict[str, Any]:
    """One process, one batch (or `parts` of it, one after another), torch alone: what every engine has to
    equal.

    A head that takes no part has zero gradients, not none: its moments decay and weight decay applies, as in
    DeepSpeed.
    """
    module, groups = build(stage, storage=STORAGE[precision])
    scale = SCALE if precision == "fp16" else 1.0
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    parameters = [{"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
    optimizer = torch.optim.AdamW(parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    trained = [p for g in groups for p in g.parameters]
    losses, norms, sums_of = [], [], []
    for step in range(len(order)):
        module.train()
        whole = global_batch(step, order, sides)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        sums: dict[str, float] = {}
        for start in range(0, GLOBAL_BATCH, GLOBAL_BATCH // parts):
            batch = whole if parts == 1 else part(step, start, start + GLOBAL_BATCH // parts, order, sides)
            with torch.autocast("cpu", STORAGE[precision], enabled=precision != "fp32"):
                found = module(batch, loss_denominators(module, whole, parts))
            (found["loss"] / parts * scale).backward()
            sums = {name: sums.get(name, 0.0) + value.item() / parts for name, value in found.items()}
        for parameter in trained:
            parameter.grad /= scale
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        scheduler.step()
        losses.append(sums["loss"])
        sums_of.append(sums)
    return {
        "losses": losses,
        "norms": norms,
        "named": sums_of,
        "values": {name: parameter.detach() for name, parameter in named.items()},
    }


def engine_config(name: str, precision: str, micro: int, zero: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is given for batches of GLOBAL_BATCH in micro-batches of `micro` images, with other ZeRO
    options.

    "pipeline4" has four stages; "_gathered" behind a name: no parameter is too small to be taken apart again.
    """
    from visft_ds import distributed

    stages = int(name.removeprefix("pipeline")) if name.startswith("pipeline") else 1
    file = "pipeline" if stages > 1 else name.removesuffix("_gathered")
    config: dict[str, Any] = json.loads((CONFIG_ROOT / f"engines/{file}.json").read_text())
    config["zero_optimization"] |= zero
    if name.endswith("_gathered"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": GLOBAL_BATCH * stages // (distributed.world_size() * micro),
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stages > 1:
        config["pipeline"] = {"stages": stages}
    if precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return config


def start_engine(
    stage: int,
    name: str,
    precision: str,
    micro: int = 1,
    build: Build = build,
    zero: Mapping[str, Any] | None = None,
) -> Any:
    """An engine of ds_configs over the tiny model."""
    from deepspeed.runtime import torch_autocast

    from visft_ds.parallel.engine import Engine
    from visft_ds.parallel.pipeline import PipelineEngine
    from visft_ds.parallel.placement import placement_for

    # DeepSpeed remembers the autocast of a process's last engine: one of fp32 would get the loss scaler of
    # fp16.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    visft_ds.ops.lora.choose_backend = like_a_gpu
    config = engine_config(name, precision, micro, zero or {})
    module, trained = build(stage, storage=STORAGE[precision])
    groups = [
        {"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name}
        for g in trained
    ]
    common: dict[str, Any] = {"build_optimizer": torch.optim.AdamW, "schedule": factor, "seed": 0}
    if "pipeline" in config:
        return PipelineEngine(module, groups, config, bounds=BOUNDS[config["pipeline"]["stages"]], **common)
    placement = placement_for(config, None)
    for parameter in module.parameters():
        placement.place(parameter)
    return Engine(module, groups, config, **common)


def fed(
    engine: Any, step: int, order: Order = ORDER, sides: Sides = ((SIDE, SIDE),)
) -> tuple[list[Batch], LossDenominators]:
    """What this rank has read of a step (in pipelines pixels, labels or nothing), and what losses are divided
    by.
    """

    place = getattr(engine, "position", None) or PipelinePosition.here(1)
    if place.role is None:
        return [], {}
    micro = GLOBAL_BATCH // (place.dp_size * engine.accumulation)
    starts = [(index * place.dp_size + place.dp_rank) * micro for index in range(engine.accumulation)]
    batches = [part(step, first, first + micro, order, sides) for first in starts]
    if place.role == "images":
        return [replace(batch, targets={}) for batch in batches], {}
    if place.role == "labels":
        batches = [replace(batch, images=torch.zeros((1, 3, 0, 0), dtype=torch.uint8)) for batch in batches]
    return batches, loss_denominators(engine.module, global_batch(step, order, sides), GLOBAL_BATCH // micro)


def run_steps(
    engine: Any, start: int, stop: int, folder: Path | None = None, feed: Feed = fed
) -> dict[str, Any]:
    """Train some steps on this rank's share; the state after SAVED_AT goes to `folder`. Collective."""
    from visft_ds import distributed
    from visft_ds.checkpoint.format import save_checkpoint
    from visft_ds.parallel.state import gather_state

    reports = []
    for step in range(start, stop):
        reports.append(engine.train_step(step, *feed(engine, step)))
        if folder is not None and step + 1 == SAVED_AT:
            state = gather_state(engine)
            if state is not None:
                save_checkpoint(folder, step + 1, state, {"case": "tiny"})
            distributed.barrier()
    state = gather_state(engine)
    return {
        "losses": [report.losses["loss"] for report in reports],
        "norms": [report.gradient_norm for report in reports],
        "named": [report.losses for report in reports],
        "rates": [dict(report.learning_rates) for report in reports],
        "values": state.parameters if state else {},
        "scales": distributed.gather_objects(
            [report.loss_scale for report in reports] + [engine.loss_scale and engine.loss_scale.value]
        ),
        "everyone": distributed.gather_objects(
            [(r.losses, r.gradient_norm, r.learning_rates) for r in reports]
        ),
    }


def resume(engine: Any, folder: Path) -> bool:
    """Take up the checkpoint in a folder. Returns whether the engine holds it bit for bit."""
    from visft_ds.checkpoint.format import newest_checkpoint
    from visft_ds.parallel.state import gather_state, restore_state

    actual, _ = newest_checkpoint(folder)
    assert actual is not None
    expected = actual.load()
    restore_state(engine, expected, actual.step)
    held = gather_state(engine)
    if held is None:
        return True
    pairs = [(held.parameters, expected.parameters), (held.moments, expected.moments)]
    same = all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
    return same and held.updates == expected.updates and held.loss_scale == expected.loss_scale


def write_results(found: Callable[..., dict[str, Any]]) -> None:
    """One rank of a program `OUT ARGUMENTS`: the main process writes to OUT what `found(OUT, ARGUMENTS)`
    gave.
    """
    from visft_ds import distributed
    from visft_ds.parallel.engine import start_process_group

    torch.set_num_threads(1)
    start_process_group()
    results = found(Path(sys.argv[1]), *sys.argv[2:])
    if distributed.is_main():
        torch.save(results, sys.argv[1])
    if not sys.argv[-1].endswith(":predict"):  # where the stages have parted, nobody would come to a barrier
        distributed.close()


def results_of(
    program: str, out: Path, *arguments: str, world: int = 2, fresh: bool = False
) -> dict[str, Any]:
    """What the ranks of a program of this folder write, and what each printed."""
    printed = run_ranks(["-m", f"tests.parallel.{program}", str(out), *arguments], world, fresh=fresh)
    return {**torch.load(out, weights_only=False), "printed": printed}


def every_run(out: Path, name: str, straight: str = "") -> dict[str, Any]:
    """Both stages in fp32, a resume of each, and 16 bits; of ZeRO-3 also stage 1 with gradients that are
    stale.

    `straight` leaves out all but fp32, on any number of ranks.
    """
    from tests.parallel.test_start import started
    from tests.parallel.test_traceless import OF_MAIN, compared, disagree, told_by_main
    from visft_ds import distributed
    from visft_ds.parallel import engine as engine_module

    results: dict[str, Any] = {}
    for stage in (1, 2):
        folder = out.parent / f"stage{stage}"
        results[f"stage{stage}"] = run_steps(start_engine(stage, name, "fp32"), 0, STEPS, folder)
        if not straight:
            engine = start_engine(stage, name, "fp32")
            exact = resume(engine, folder)
            results[f"stage{stage}-resumed"] = {"exact": exact, **run_steps(engine, SAVED_AT, STEPS)}
    if straight:
        return results
    results["stage2-bf16"] = run_steps(start_engine(2, name, "bf16"), 0, STEPS)
    if name == "zero1":  # of all engines in `test_traceless.py`
        results["traceless"] = compared(name, ["fp32"], ["fault", "rehearsal"])
        results["disagree"] = distributed.gather_objects(disagree())
        results["told by main"] = distributed.gather_objects(
            [told_by_main(error) for error in OF_MAIN.values()]
        )
    if name != "zero3_offload":  # the loss scaler is the same as without offload
        growing = start_engine(1, name, "fp16")
        growing.loss_scale.restore({**growing.loss_scale.state(), "growth_interval": 2})
        results["stage1-fp16"] = run_steps(growing, 0, STEPS)
    if name.startswith("zero3"):  # the others divide no parameters and keep no gradients of idle heads
        results["start"] = started(name)
        engine_module.clear_stale_gradients = lambda optimizer: None
        results["stage1-without-remedy"] = run_steps(start_engine(1, name, "fp32"), 0, STEPS)
    return results


if __name__ == "__main__":
    write_results(every_run)
