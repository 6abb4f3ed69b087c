"""The tiny model of `engine_case` under the pipeline engine, stage by stage.

One rank (see `test_pipeline.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.pipeline_case OUT.pt ENGINE RUN [RUN ...]
ENGINE is pipeline2 or pipeline4 (stages). RUN is stage:precision:order[:option], e.g. 1:fp32:mixed or
2:fp32:mixed:resume; or "traceless", what `traceless_case` finds. The main process writes all results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import visft_ds.ops.lora
from tests.parallel import engine_case as case
from tests.parallel.start_case import started
from visft_ds.config.resolve import CONFIG_ROOT
from visft_ds.data.samples import Batch
from visft_ds.tasks.spec import LossDenominators

#: Images change their shape from step to step, except where a run of another engine is to go on.
SIDES, SQUARE = ((56, 56), (28, 84), (84, 56)), ((case.SIDE, case.SIDE),)
ORDERS: Mapping[str, tuple[case.Order, case.Sides]] = {
    "mixed": (case.ORDER, SIDES),
    "square": (case.ORDER, SQUARE),
    "shared": ((case.TASKS,) * 3, SIDES),
    **{task: (((task,),) * 3, SIDES) for task in case.TASKS},
}
#: The layers are embedding, two blocks and heads.
BOUNDS = {2: (0, 2, 4), 4: (0, 1, 2, 3, 4)}


def pipeline_config(stages: int, precision: str, option: str) -> dict[str, Any]:
    """What DeepSpeed is given."""
    from visft_ds.parallel import distributed

    config: dict[str, Any] = json.loads((CONFIG_ROOT / "engines/pipeline.json").read_text())
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.GLOBAL_BATCH // (distributed.world_size() // stages),
        "gradient_clipping": case.CLIP,
        "steps_per_print": 10**9,
        "pipeline": {"stages": stages},
    }
    if precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        config["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    if option == "zero0":
        config["zero_optimization"]["stage"] = 0
    if option.startswith("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def build_engine(stage: int, precision: str, stages: int, option: str = "") -> Any:
    """The pipeline engine over the model that `train_plain` trains."""
    from visft_ds.parallel.pipeline import PipelineEngine

    case.forget_autocast()
    visft_ds.ops.lora.choose_backend = case.like_a_gpu
    module, groups = case.build(stage, storage=case.STORAGE[precision])
    module.backbone.recompute = "block" if option == "recompute" else "none"
    return PipelineEngine(
        module,
        [{"params": list(g.parameters), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name} for g in groups],
        pipeline_config(stages, precision, option),
        bounds=BOUNDS[stages],
        build_optimizer=torch.optim.AdamW,
        schedule=case.factor,
        seed=0,
    )


def fed(engine: Any, step: int, order: case.Order, sides: case.Sides) -> tuple[list[Batch], LossDenominators]:
    """What this rank has read of a step: pixels only, labels only, or nothing."""
    place = engine.place
    if place.role is None:
        return [], {}
    batches = []
    for index in range(engine.accumulation):
        first = index * place.dp_size + place.dp_rank
        batch = case.part(step, first, first + 1, order, sides)
        empty = torch.zeros((1, 3, 0, 0), dtype=torch.uint8)
        batches.append(replace(batch, targets={}) if place.role == "images" else replace(batch, images=empty))
    whole = case.global_batch(step, order, sides)
    loss_denominators = (
        case.loss_denominators(engine.module, whole, case.GLOBAL_BATCH) if place.role == "labels" else {}
    )
    return batches, loss_denominators


def run(
    engine: Any, order: case.Order, sides: case.Sides, folder: Path | None = None, start: int = 0
) -> dict[str, Any]:
    """Train as `engine_case.run_steps` does; what that returns and more, on the main process."""
    from visft_ds.parallel import distributed

    feed = partial(fed, order=order, sides=sides)
    return {
        **case.run_steps(engine, start, len(order), folder, feed),
        "training": distributed.gather_objects({n for n, m in engine.module.named_modules() if m.training}),
        "anchors": distributed.gather_objects(
            [p.detach().clone() for n, p in engine.deepspeed.module.named_parameters() if n.startswith("anchor")]
        ),
        "groups": distributed.gather_objects(len(engine.deepspeed.optimizer.param_groups)),
        "held": distributed.gather_objects({n for n, p in engine.module.named_parameters() if not p.is_meta}),
    }


def gone_on(
    stage: int, precision: str, stages: int, folder: Path, order: case.Order, sides: case.Sides
) -> dict[str, Any]:
    """The run from its checkpoint on, in another engine."""
    engine = build_engine(stage, precision, stages)
    exact = case.resume(engine, folder)
    resumed = run(engine, order, sides, None, case.SAVED_AT)
    return {"resumed": {"exact": exact, **resumed}}


def predicted(engine: Any) -> list[Any]:
    """What each rank was told of images of its own, of different sizes; in evaluation mode. On the main process."""
    from visft_ds.parallel import distributed

    rank = distributed.rank()
    outputs = engine.predict(prediction_batch(rank))
    engine.predict(prediction_batch(rank + 1))
    return distributed.gather_objects(tensors_of(outputs)) or []


def tensors_of(outputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """ "task/name" -> tensor of each head's answer."""
    answers = {task: output.last() if hasattr(output, "last") else output for task, output in outputs.items()}
    return {
        f"{task}/{name}": value
        for task, output in answers.items()
        for name, value in vars(output).items()
        if isinstance(value, torch.Tensor)
    }


def prediction_batch(rank: int) -> Batch:
    """Images without labels; another size on each rank."""
    return replace(case.global_batch(rank, sides=SIDES), targets={})


def other_samples(engine: Any) -> str:
    """The error of the stage whose labels belong to other samples than the pixels."""
    order, sides = ORDERS["square"]
    step = 1 if engine.place.role == "labels" else 0
    batches, loss_denominators = fed(engine, step, order, sides)
    try:
        engine.train_step(20, batches, loss_denominators)
    except RuntimeError as error:
        return str(error)
    return ""


def overflowing(engine: Any) -> dict[str, Any]:
    """One step in which a gradient overflows on the first stage alone, between two healthy ones."""
    from visft_ds.parallel import distributed
    from visft_ds.parallel.state import gather_state

    def state() -> dict[str, Any]:
        held = gather_state(engine)
        return {} if held is None else {**vars(held), "moments": dict(held.moments)}

    order, sides = ORDERS["square"]
    engine.train_step(0, *fed(engine, 0, order, sides))
    before = state()
    own = [p for n, p in engine.module.named_parameters() if n.startswith("backbone.blocks.0.") and p.requires_grad]
    hooks = [p.register_hook(lambda gradient: gradient * torch.inf) for p in own if not p.is_meta]
    report = engine.train_step(1, *fed(engine, 1, order, sides))
    for hook in hooks:
        hook.remove()
    after = state()
    engine.train_step(2, *fed(engine, 2, order, sides))
    return {
        "hooked": distributed.gather_objects(len(hooks)),
        "reports": distributed.gather_objects((report.skipped, report.refused, report.gradient_norm)),
        "scales": distributed.gather_objects(engine.loss_scale.value),
        "skipped_steps": distributed.gather_objects(engine.deepspeed.skipped_steps),
        "states": (before, after),
    }


def one_run(engine_name: str, name: str, folder: Path) -> dict[str, Any]:
    """What RUN asks for."""
    from visft_ds.parallel import engine as engine_module
    from visft_ds.parallel import pipeline

    stage, precision, order_name, *options = name.split(":")
    option = options[0] if options else ""
    order, sides = ORDERS[order_name]
    if option == "offload-stale":
        engine_module.clear_stale_gradients = lambda optimizer: None
    if option == "no-anchors":
        pipeline.stage_groups = lambda stages, groups: [  # type: ignore[assignment]
            {**group, "params": own}
            for group in groups
            if (own := [p for p in group["params"] if any(p is other for other in stages.parameters())])
        ]
    if option == "own-backward":
        names = ("RecvActivation", "SendGrad", "RecvGrad", "BackwardPass")
        theirs = {one: how for one, how in pipeline.DeepSpeedPipeline._INSTRUCTION_MAP.items() if one.__name__ in names}
        ours_with_labels = pipeline.instructions
        pipeline.instructions = lambda *arguments: {**ours_with_labels(*arguments), **theirs}
    stages = int(engine_name[8:])
    engine = build_engine(int(stage), precision, stages, option)
    if option.startswith("overflow"):
        if option == "overflow-alone":  # each stage judges by its own part of the gradient
            engine.deepspeed.optimizer._model_parallel_all_reduce = lambda tensor, op: None
        return overflowing(engine)
    if option == "zero0":
        engine.deepspeed.get_global_grad_norm = lambda: 0.0  # it has none
    saved = folder / f"{engine_name}-stage{stage}" if option == "resume" else None
    results = run(engine, order, sides, saved)
    if saved is not None:
        results |= gone_on(int(stage), precision, stages, saved, order, sides)
        results["start"] = started("pipeline")
    if option == "predict":
        results["predicted"] = predicted(engine)
        results["other"] = other_samples(engine)
    return results


def main(out: str, engine_name: str, names: Sequence[str]) -> None:
    """One rank of all runs."""
    from tests.parallel.traceless_case import compared
    from visft_ds.parallel import distributed
    from visft_ds.parallel.engine import start_process_group

    torch.set_num_threads(1)
    start_process_group()
    results = {}
    for name in names:
        if name == "traceless":
            results[name] = compared(engine_name, ["fp32"], ["loss", "leap", "rehearsal"])
            continue
        results[name] = one_run(engine_name, name, Path(out).parent)
        if results[name].get("other"):
            print(results[name]["other"], flush=True)
    if distributed.is_main():
        torch.save(results, out)
    if names[-1].endswith(":predict"):  # the stages have parted: nobody would come to a barrier
        return
    distributed.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
