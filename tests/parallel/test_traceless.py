"""Steps that leave no trace: a loss or gradient that is no number, on one rank of two, and those of the
rehearsal.

What is left must be the run without that step. Representative cases run with `test_engines.py` and
`test_pipeline.py`, in processes that are there anyway. One rank:
    RANK=0 WORLD_SIZE=2 ... python -m tests.parallel.test_traceless OUT.pt ENGINE PRECISION [PRECISION ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.engine_case import ORDER, SCALE, fed, results_of, start_engine, write_results
from visft_ds import distributed
from visft_ds.errors import exit_code

ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero3_offload", "pipeline2")
#: Detection, segmentation, captioning, all of them; BAD is passed over in the reference and leaves no trace
#: in others.
STEPS, BAD = (0, 1, 2, 3), 2
#: On rank 1 alone a loss, a matching cost or a gradient is no number; "leap" is a finite loss that is refused
#: all the
#: same: DeepSpeed would not pass over its gradient by itself. "rehearsal": under `unchanged` all steps are
#: made before the first one, when there are no moments yet, and BAD in its place.
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
        return {
            **parts,
            name: parts[name] + (parts[name] * 0).sqrt(),
        }  # the root of 0: finite, its gradient is not


def rehearse(engine: Any, steps: Sequence[int]) -> None:
    """Make steps without a trace, not even in random numbers, after which no loss is accepted that was not
    before.
    """
    from visft_ds.parallel.state import unchanged, updates_done

    torch.manual_seed(7)
    done = updates_done(engine)
    with unchanged(engine):
        assert {engine.train_step(step, *fed(engine, step)).refused for step in steps} == {"loss"}
    found = torch.rand(4)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(4)) and updates_done(engine) == done
    assert not engine.should_update(float("nan"))


def run(engine: Any, mode: str) -> tuple[Mapping[str, Tensor], list[Any]]:
    """Weights after a few steps and the reports of all; without a mode the BAD step is passed over."""
    from visft_ds.parallel.state import gather_state

    reports = []
    if mode == "rehearsal":
        rehearse(engine, STEPS)
    for step in STEPS:
        if step == BAD and mode == "rehearsal":
            rehearse(engine, [BAD])
        if step == BAD and mode in ("", "rehearsal"):
            continue
        criteria, accept = dict(engine.module.criteria), engine.should_update
        if step == BAD and mode == "leap":
            engine.should_update = lambda loss: False
        elif step == BAD:
            for task in ORDER[BAD]:
                engine.module.criteria[task] = Disturbed(criteria[task], mode)
        reports.append(engine.train_step(step, *fed(engine, step)))
        engine.module.criteria.update(criteria)
        engine.should_update = accept
    state = gather_state(engine)
    return state.parameters if state else {}, reports


def disagree() -> str:
    """What a rank hears where the next step is another one on each; a step before is the same and goes
    through.
    """
    device = torch.device("cpu")
    assert distributed.agree_on_step("step 0 detection", {}, distributed.rank() == 1, device)[1]
    try:
        distributed.agree_on_step(
            f"step 1 {('detection', 'captioning')[distributed.rank()]}", {}, False, device
        )
    except ValueError as error:
        return str(error)
    return ""


def told_by_main(error: Exception) -> str:
    """What a rank hears of an error of the main process, and how it would end."""

    def fail() -> None:
        raise error

    try:
        distributed.by_main_process(fail)
    except (ValueError, OSError) as heard:
        return f"{type(heard).__name__} {heard} {exit_code(heard)}"
    return "nothing"


#: Errors of the main process, one of them without a text -> what every rank hears.
OF_MAIN = {
    "ValueError no such file 2": ValueError("no such file"),
    "MainError TimeoutError 5": TimeoutError(),
    "MainError [Errno 116] Stale file handle 5": OSError(116, "Stale file handle"),
    "MainError [Errno 28] No space left on device 2": OSError(28, "No space left on device"),
}


def compared(name: str, precisions: Sequence[str], modes: Sequence[str]) -> dict[str, Any]:
    """What the main process knows of all cases. Collective."""
    results: dict[str, Any] = {}
    for precision in precisions:
        reference, without = run(start_engine(1, name, precision), "")
        for mode in modes:
            engine = start_engine(1, name, precision)
            values, reports = run(engine, mode)
            report = reports[BAD]
            results[f"{precision}-{mode}"] = {
                "scales": distributed.gather_objects(engine.loss_scale and engine.loss_scale.value),
                "everyone": distributed.gather_objects([report.refused, report.skipped, dict(report.faults)]),
                "equal": [torch.equal(values[key], value) for key, value in reference.items()],
                "reports_equal": reports == without,
                "refused": [report.refused for report in reports],
                "skipped_steps": engine.deepspeed.skipped_steps,
            }
    return results


def check(results: Mapping[str, Any]) -> None:
    """What `compared` found is as it should be."""
    for case, found in results.items():
        precision, mode = case.split("-")
        assert found["everyone"][0] == found["everyone"][1]  # all ranks know the same
        assert all(found["equal"]) and found["equal"], case  # bit for bit the run without this step
        scale = SCALE if precision == "fp16" else None
        if mode == "rehearsal":
            # Losses, norms and rates too.
            assert found["reports_equal"] and found["skipped_steps"] == 0 and found["scales"] == [scale] * 2
            continue
        assert found["skipped_steps"] == 1
        refused, skipped, faults = found["everyone"][0]
        if mode == "gradient" and precision == "fp16":
            # Any overflow of fp16 looks like this; it lowers the scale and is no reason for an alarm.
            assert (refused, skipped, found["scales"]) == ("", True, [SCALE / 2] * 2)
            continue
        assert found["refused"] == ["", "", "gradient" if mode == "gradient" else "loss", ""]
        assert found["scales"] == [scale] * 2 and not skipped
        known = {"fault": ["image_id 7"], "loss": ["captioning/", "nan"]}.get(mode, [])
        assert all(word in str(faults[1]) for word in known) and (
            mode == "gradient" or list(faults) == [1] * bool(known)
        )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_no_trace_in_any_precision(engine: str, tmp_path: Path) -> None:
    precisions = ("fp32", "bf16") if engine == "zero3_offload" else ("fp32", "bf16", "fp16")
    results = results_of("test_traceless", tmp_path / "out.pt", engine, *precisions)
    assert results.pop("printed") and results.keys() == {
        f"{precision}-{mode}" for precision in precisions for mode in MODES
    }
    check(results)


if __name__ == "__main__":
    write_results(lambda out, name, *precisions: compared(name, precisions, MODES))
