"""The tiny model of `engine_case` under the pipeline engine, stage by stage.

One rank (see `test_pipeline.py`):
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.pipeline_case OUT.pt ENGINE RUN [RUN ...]
ENGINE is pipeline2 or pipeline4 (stages). RUN is stage:precision:order[:option], e.g. 1:fp32:mixed or
2:fp32:mixed:resume; or "traceless", what `test_traceless.py` compares. The main process writes all results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.parallel import engine_case as case
from tests.parallel.test_start import started
from visft_ds.data.samples import Batch

#: Images change their shape from step to step.
SIDES = ((56, 56), (28, 84), (84, 56))
ORDERS: Mapping[str, case.Order] = {
    "mixed": case.ORDER,
    "shared": (case.TASKS,) * 3,
    **{task: ((task,),) * 3 for task in case.TASKS},
}
#: What options say to ZeRO.
ZERO: Mapping[str, Mapping[str, Any]] = {
    "zero0": {"stage": 0},
    "offload": {"offload_optimizer": {"device": "cpu"}},
    "offload-stale": {"offload_optimizer": {"device": "cpu"}},
}


def recomputed(*given: Any, **named: Any) -> Any:
    """`engine_case.build`, with a backbone that computes its blocks anew in the backward pass."""
    built = case.build(*given, **named)
    built[0].backbone.recompute = "block"
    return built


def run(engine: Any, order: case.Order, folder: Path | None = None, start: int = 0) -> dict[str, Any]:
    """Train as `engine_case.run_steps` does; what that returns and more, on the main process."""
    from visft_ds import distributed

    return {
        **case.run_steps(engine, start, len(order), folder, partial(case.fed, order=order, sides=SIDES)),
        "training": distributed.gather_objects({n for n, m in engine.module.named_modules() if m.training}),
        "anchors": distributed.gather_objects(
            [
                p.detach().clone()
                for n, p in engine.deepspeed.module.named_parameters()
                if n.startswith("anchor")
            ]
        ),
        "groups": distributed.gather_objects(len(engine.deepspeed.optimizer.param_groups)),
        "held": distributed.gather_objects({n for n, p in engine.module.named_parameters() if not p.is_meta}),
    }


def predicted(engine: Any) -> list[Any]:
    """What each rank was told of images of its own, of different sizes; in evaluation mode. On the main
    process.
    """
    from visft_ds import distributed

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


def read_apart(engine: Any) -> None:
    """Print the error of the stage whose labels belong to other samples than the pixels."""
    try:
        engine.train_step(20, *case.fed(engine, int(engine.position.role == "labels")))
    except RuntimeError as error:
        print(error, flush=True)


def overflowing(engine: Any) -> dict[str, Any]:
    """One step in which a gradient overflows on the first stage alone, between two healthy ones."""
    from visft_ds import distributed
    from visft_ds.parallel.state import gather_state

    def state() -> dict[str, Any]:
        held = gather_state(engine)
        return {} if held is None else {**vars(held), "moments": dict(held.moments)}

    engine.train_step(0, *case.fed(engine, 0))
    before = state()
    own = [
        p
        for n, p in engine.module.named_parameters()
        if n.startswith("backbone.blocks.0.") and p.requires_grad
    ]
    hooks = [p.register_hook(lambda gradient: gradient * torch.inf) for p in own if not p.is_meta]
    report = engine.train_step(1, *case.fed(engine, 1))
    for hook in hooks:
        hook.remove()
    after = state()
    engine.train_step(2, *case.fed(engine, 2))
    return {
        "hooked": distributed.gather_objects(len(hooks)),
        "reports": distributed.gather_objects((report.skipped, report.refused, report.gradient_norm)),
        "scales": distributed.gather_objects(engine.loss_scale and engine.loss_scale.value),
        "skipped_steps": distributed.gather_objects(engine.deepspeed.skipped_steps),
        "states": (before, after),
    }


def take_remedy(option: str) -> None:
    """Take out what the package does about a fault of DeepSpeed, before the engine is built."""
    from visft_ds.parallel import engine as engine_module
    from visft_ds.parallel import pipeline

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
        theirs = {
            one: how
            for one, how in pipeline.DeepSpeedPipeline._INSTRUCTION_MAP.items()
            if one.__name__ in names
        }
        ours_with_labels = pipeline.instructions
        pipeline.instructions = lambda *arguments: {**ours_with_labels(*arguments), **theirs}


def one_run(engine_name: str, name: str, folder: Path) -> dict[str, Any]:
    """What RUN asks for."""
    stage, precision, order_name, option = f"{name}:".split(":")[:4]
    take_remedy(option)
    build = recomputed if option == "recompute" else case.build
    start = partial(case.start_engine, int(stage), engine_name, precision, build=build, zero=ZERO.get(option))
    engine = start()
    if option.startswith("overflow"):
        if option == "overflow-alone":  # each stage judges by its own part of the gradient
            engine.deepspeed.optimizer._model_parallel_all_reduce = lambda tensor, op: None
        return overflowing(engine)
    if option == "zero0":
        engine.deepspeed.get_global_grad_norm = lambda: 0.0  # it has none
    saved = folder / f"{engine_name}-stage{stage}" if option == "resume" else None
    results = run(engine, ORDERS[order_name], saved)
    if saved is not None:
        other = start()
        exact = case.resume(other, saved)
        results["resumed"] = {"exact": exact, **run(other, ORDERS[order_name], None, case.SAVED_AT)}
        results["start"] = started("pipeline")
    if option == "predict":
        results["predicted"] = predicted(engine)
        read_apart(engine)
    return results


def every_run(out: Path, engine_name: str, *names: str) -> dict[str, Any]:
    """Results of all runs by name."""
    from tests.parallel.test_traceless import compared

    return {
        name: compared(engine_name, ["fp32"], ["loss", "leap", "rehearsal"])
        if name == "traceless"
        else one_run(engine_name, name, out.parent)
        for name in names
    }


if __name__ == "__main__":
    case.write_results(every_run)
