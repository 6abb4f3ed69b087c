"""One rank of runs with a step that must leave no trace: what is left must be the run without that step.

RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.traceless_case OUT.pt ENGINE PRECISION,...
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
from visft_ds.parallel.state import gather_state, unchanged, updates_done

#: Detection, segmentation, captioning, all of them; BAD is passed over in the reference and leaves no trace in others.
STEPS, BAD = (0, 1, 2, 3), 2
#: On rank 1 alone a loss, a matching cost or a gradient is no number; "leap" is a finite loss that is refused all the
#: same: DeepSpeed would not pass over its gradient by itself. "rehearsal": under `unchanged` all steps are made before
#: the first one, when there are no moments yet, and BAD in its place.
MODES = ("loss", "fault", "gradient", "leap", "rehearsal")


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


def rehearse(engine: Any, feed: Feed, steps: Sequence[int]) -> None:
    """Make steps without a trace, not even in random numbers, after which no loss is accepted that was not before."""
    torch.manual_seed(7)
    done = updates_done(engine)
    with unchanged(engine):
        assert {engine.train_step(step, *feed(engine, step)).refused for step in steps} == {"loss"}
    found = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(4)) and updates_done(engine) == done
    assert not engine.should_update(float("nan"))


def run(engine: Any, feed: Feed, mode: str) -> tuple[dict[str, Tensor], list[StepReport]]:
    reports = []
    if mode == "rehearsal":
        rehearse(engine, feed, STEPS)
    for step in STEPS:
        if step == BAD and mode == "rehearsal":
            rehearse(engine, feed, [BAD])
        if step == BAD and mode in ("", "rehearsal"):
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


def compared(name: str, precisions: Sequence[str], modes: Sequence[str]) -> dict[str, Any]:
    """What the main process knows of all cases; nothing elsewhere. Collective."""
    results: dict[str, Any] = {}
    for precision in precisions:
        reference, without = run(*start(name, 1, precision), "")
        for mode in modes:
            engine, feed = start(name, 1, precision)
            values, reports = run(engine, feed, mode)
            report = reports[BAD]
            scales = distributed.gather_objects(engine.loss_scale.value if engine.loss_scale.dynamic else None)
            everyone = distributed.gather_objects([report.refused, report.skipped, dict(report.faults)])
            if distributed.is_main():
                results[f"{precision}-{mode}"] = {
                    "everyone": everyone,
                    "equal": [torch.equal(values[key], value) for key, value in reference.items()],
                    "reports_equal": reports == without,
                    "refused": [one.refused for one in reports],
                    "skipped_steps": engine.deepspeed.skipped_steps,
                    "scales": scales,
                }
    return results


def main(out: str, name: str, precisions: str) -> None:
    torch.set_num_threads(1)
    start_process_group()
    results = compared(name, precisions.split(","), MODES)
    if distributed.is_main():
        torch.save(results, out)
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
