"""One rank of a run in which rank 1 alone meets a number that is none: what is left must be the run without that step.

RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.refusal_case OUT.json ENGINE PRECISION...
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.matrix_case import start
from tests.parallel.engine_case import ORDER, Feed
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import StepReport, start_process_group
from visft_ds.parallel.state import gather_state

#: Detection, segmentation, captioning, all of them; BAD is passed over in the reference and refused in the others.
STEPS, BAD = (0, 1, 2, 3), 2
#: "leap" is a finite loss that is refused all the same: DeepSpeed would not pass over its gradient by itself.
MODES = ("loss", "fault", "gradient", "leap")


class Disturbed:
    """A criterion that goes wrong on rank 1 as `mode` says."""

    def __init__(self, criterion: Any, mode: str) -> None:
        self.weights, self.count = criterion.weights, criterion.count
        self._criterion, self._mode = criterion, mode

    def __call__(self, *arguments: Any) -> Mapping[str, Tensor]:
        parts = dict(self._criterion(*arguments))
        if distributed.rank() != 1:
            return parts
        if self._mode == "fault":
            raise FloatingPointError("the matching cost 'ce' of image_id 7 is nan")
        name = next(iter(self.weights))
        if self._mode == "loss":
            return {**parts, name: parts[name] * torch.nan}
        return {**parts, name: parts[name] + (parts[name] * 0).sqrt()}  # the root of 0: finite, its gradient is not


def run(engine: Any, feed: Feed, mode: str) -> tuple[dict[str, Tensor], list[StepReport]]:
    reports = []
    for step in STEPS:
        if step == BAD and not mode:
            continue
        criteria, accept = dict(engine.module.criteria), engine.should_update
        if step == BAD and mode == "leap":
            engine.should_update = lambda loss: False
        elif step == BAD:
            for task in ORDER[BAD]:
                engine.module.criteria[task] = Disturbed(criteria[task], mode)
        reports.append(engine.train_step(step, *feed(engine, step)))
        engine.module.criteria.update(criteria)
        engine.should_update = accept
    state = gather_state(engine)
    return dict(state.parameters) if state else {}, reports


def disagree() -> str:
    """What a rank hears where the next step is another one on each; a step before is the same and goes through."""
    device = torch.device("cpu")
    assert distributed.agree_on_step("step 0 detection", {}, distributed.rank() == 1, device)[1]
    try:
        distributed.agree_on_step(f"step 1 {('detection', 'captioning')[distributed.rank()]}", {}, False, device)
    except ValueError as error:
        return str(error)
    return ""


def refusals(name: str, precisions: Sequence[str], modes: Sequence[str]) -> dict[str, Any]:
    """What the main process knows of all cases; nothing elsewhere. Collective."""
    results: dict[str, Any] = {}
    for precision in precisions:
        reference, _ = run(*start(name, 1, precision), "")
        for mode in modes:
            engine, feed = start(name, 1, precision)
            values, reports = run(engine, feed, mode)
            report = reports[STEPS.index(BAD)]
            scales = distributed.gather_objects(engine.loss_scale.value if engine.loss_scale.dynamic else None)
            everyone = distributed.gather_objects([report.refused, report.skipped, dict(report.faults)])
            if distributed.is_main():
                results[f"{precision}-{mode}"] = {
                    "everyone": everyone,
                    "equal": [torch.equal(values[key], value) for key, value in reference.items()],
                    "refused": [one.refused for one in reports],
                    "skipped_steps": engine.deepspeed.skipped_steps,
                    "scales": scales,
                }
    return results


def main(out: str, name: str, precisions: str) -> None:
    torch.set_num_threads(1)
    start_process_group()
    results = refusals(name, precisions.split(","), MODES)
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
