"""The pipeline engine equals one plain PyTorch process on the global batch, predicts the same and goes on bit
for bit.

Two stages with two micro-batches and more against one batch of four; images of another shape in each step;
ragged labels of three tasks that reach the heads on the last stage only. Stage 1 leaves all stages but the
last without anything to train, stage 2 freezes the heads, and with four stages each holds a single layer, of
which some are frozen.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import engine_case as case
from tests.parallel.pipeline_case import ORDERS, SIDES, prediction_batch, tensors_of
from tests.parallel.test_engines import LOSS, NORM, WEIGHTS, check_equal, differences
from tests.parallel.test_traceless import check as check_traceless
from tests.ranks import finish, start_ranks

#: A value of 11 bits, rounded the other way.
FP16_ROUNDING = 2**-11
#: A gradient that is lost moves a weight by twenty times this bound in one step.
FP16_WEIGHTS = 1e-3
FAST = ["2:fp16:shared:overflow", "2:fp32:mixed:resume", "1:fp32:mixed:predict"]
WHOLE = [
    *(
        f"{stage}:{precision}:{order}"
        for stage in (1, 2)
        for precision in ("fp32", "bf16")
        for order in ORDERS
    ),
    *(f"{stage}:fp16:mixed" for stage in (1, 2)),
    "2:fp32:mixed:recompute",
    *FAST,
]
SHAPES = (
    pytest.param(("pipeline2", 2, FAST), id="2x1"),
    pytest.param(("pipeline2", 2, ["traceless", *WHOLE]), id="2x1-whole", marks=pytest.mark.slow),
    pytest.param(("pipeline2", 4, WHOLE), id="2x2", marks=pytest.mark.slow),
    pytest.param(("pipeline4", 4, WHOLE), id="4x1", marks=pytest.mark.slow),
)


@cache
def plain(stage: int, precision: str, order: str, parts: int) -> dict[str, Any]:
    """The reference run of one process."""
    return case.train_plain(stage, precision, ORDERS[order], SIDES, parts)


def reference(name: str, parts: int = 1) -> dict[str, Any]:
    """What a run has to equal."""
    stage, precision, order = name.split(":")[:3]
    return plain(int(stage), precision, order, parts)


@pytest.fixture(scope="module", params=SHAPES)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Every run of one shape of pipeline, and what its ranks printed."""
    engine, world, names = request.param
    out: Path = tmp_path_factory.mktemp(f"{engine}-{world}") / "results.pt"
    return case.results_of("pipeline_case", out, engine, *names, world=world)


def runs(trained: dict[str, dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """Runs with this part in their names, such as fp32 or resume; a shape that has none skips the test."""
    found = {name: run for name, run in trained.items() if f":{part}:" in f":{name}:"}
    if not found:
        pytest.skip(f"no run of this shape has {part}")
    return found


def test_equals_one_process_and_every_rank_reports_every_loss(trained: dict[str, dict[str, Any]]) -> None:
    for name, run in runs(trained, "fp32").items():
        check_equal(run, reference(name), name)
        assert all(one == run["everyone"][0] for one in run["everyone"]), name
        for ours, theirs in zip(run["named"], reference(name)["named"], strict=True):
            assert ours == pytest.approx(theirs, rel=LOSS, abs=1e-7), (
                name
            )  # means over micro-batches, in fp32


def test_equals_one_process_in_bf16(trained: dict[str, dict[str, Any]]) -> None:
    """In bf16 it matters which images are multiplied together, so the process takes them one by one as the
    stages do.

    Every product is then rounded alike and what is left is the order of fp32 sums: the bounds of fp32 hold.
    """
    for name, run in runs(trained, "bf16").items():
        check_equal(run, reference(name, case.GLOBAL_BATCH), name)


def test_equals_one_process_in_fp16(trained: dict[str, dict[str, Any]]) -> None:
    """Each image by itself, as in bf16. The first step is the same; after it weights differ by rounding in
    fp32.

    That decides now and then how a product of adapted weights is rounded in fp16, by one part in 2048 of one
    value. The heads compute in fp32, on features of a frozen backbone: there the bounds of fp32 hold
    throughout.
    """
    for name, run in runs(trained, "fp16:mixed").items():
        expected = reference(name, case.GLOBAL_BATCH)
        found = differences(run, expected)
        assert found["losses"] <= LOSS, name
        assert run["norms"][0] == pytest.approx(expected["norms"][0], rel=NORM), name
        assert found["norms"] <= (NORM if name[0] == "1" else FP16_ROUNDING), name
        assert found["values"] <= (WEIGHTS if name[0] == "1" else FP16_WEIGHTS), name
        assert run["scales"] == [[case.SCALE] * (len(run["losses"]) + 1)] * len(run["scales"]), name


def test_an_overflow_in_one_stage_lowers_the_scale_of_all_and_changes_nothing(
    trained: dict[str, dict[str, Any]],
) -> None:
    for name, run in runs(trained, "overflow").items():
        world = len(run["scales"])
        # A stage before the last one overflows; the last one has had a finite gradient.
        assert any(run["hooked"]) and run["hooked"][-1] == 0, name
        assert run["reports"] == [(True, "", math.inf)] * world, name
        assert run["scales"] == [case.SCALE / 2] * world and run["skipped_steps"] == [1] * world, name
        before, after = run["states"]
        assert before["updates"] == after["updates"] == 1, name
        for first, second in [
            (before["parameters"], after["parameters"]),
            (before["moments"], after["moments"]),
        ]:
            assert first and all(torch.equal(second[key], value) for key, value in first.items()), name
        assert (before["loss_scale"]["_growth_tracker"], after["loss_scale"]["_growth_tracker"]) == (1, 0), (
            name
        )


def test_a_stage_has_its_own_layers_and_every_group(trained: dict[str, dict[str, Any]]) -> None:
    """DeepSpeed puts every layer of a stage into training mode: frozen heads would drop features out.

    Stages with other numbers of groups would wait for each other for ever; anchors stand for what a stage
    lacks.
    """
    for name, run in runs(trained, "fp32").items():
        frozen, active = ("backbone", "heads") if name.startswith("1") else ("heads", "backbone")
        for modules in run["training"] if not name.endswith("predict") else ():
            assert active in modules and not [m for m in modules if m.startswith(frozen)], name
        groups, held = len(case.GROUPS[int(name[0])]), run["held"]
        assert set(run["groups"]) == {groups}, name
        trains = {name for name in held[0] if ".lora_" in name}  # what the first stage holds
        assert len(run["anchors"][0]) == (0 if trains else groups), name
        assert not any(anchor.any() for anchors in run["anchors"] for anchor in anchors), name
        stages = [held[0], *(one for before, one in pairwise(held) if one != before)]
        assert len(stages) in (2, 4) and sum(map(len, stages)) == len(set().union(*stages)), name
        assert "backbone.pos_embed" in stages[0] and "backbone.norm.weight" in stages[-1], name


def test_predictions_return_to_where_the_images_were(trained: dict[str, dict[str, Any]]) -> None:
    """Every rank has images of its own, of another size; a step after training must not be in training
    mode.
    """
    for name, run in runs(trained, "predict").items():
        module, _ = case.build(int(name[0]))
        module.load_state_dict({**module.state_dict(), **run["values"]})
        module.eval()
        for rank, outputs in enumerate(run["predicted"]):
            with torch.no_grad():
                expected = tensors_of(module(prediction_batch(rank)))
            assert outputs.keys() == expected.keys()
            for key, value in expected.items():
                # The same operations on the same batch, but tensors may lie differently in memory.
                torch.testing.assert_close(
                    outputs[key], value, rtol=1e-5, atol=1e-5, msg=f"{name} {rank} {key}"
                )
    # After all runs one stage read labels of another step.
    assert "step 20: the last pipeline stage has labels of other samples" in trained["printed"][-1]


def test_resume_is_the_same_run_bit_for_bit(trained: dict[str, dict[str, Any]]) -> None:
    """`tests/checkpoint/test_matrix.py` goes on under every other engine."""
    for name, run in runs(trained, "resume").items():
        resumed = run["resumed"]
        assert resumed["exact"] and resumed["losses"] == run["losses"][case.SAVED_AT :], name
        assert all(torch.equal(run["values"][key], value) for key, value in resumed["values"].items()), name
        # A stage starts with the values of its layers.
        assert len(run["start"]) == 4 and not any(any(ranks) for ranks in run["start"].values()), run["start"]


def test_no_stage_makes_an_update_after_a_loss_that_is_refused(trained: dict[str, dict[str, Any]]) -> None:
    """Only the last stage knows the loss; `test_traceless.py` has gradients, matching costs and bf16 too."""
    check_traceless(runs(trained, "traceless")["traceless"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["zero0", "offload", "offload-stale", "no-anchors", "own-backward", "overflow-alone"]
)
def test_faults_of_deepspeed_need_their_remedies(option: str, tmp_path: Path) -> None:
    """Each fault as DeepSpeed has it, with its remedy taken out; all equal one process with it (above, and
    offload).
    """
    run = "2:fp16:shared" if option == "overflow-alone" else "1:fp32:mixed"
    out, name = tmp_path / "results.pt", f"{run}:{option}"
    ranks = start_ranks(["-m", "tests.parallel.pipeline_case", str(out), "pipeline2", name])
    codes, printed = finish(ranks)
    if option == "no-anchors":  # a stage without anything to train
        assert codes[0] and "optimizer got an empty parameter list" in printed[0]
    elif option == "own-backward":  # gradients are sent to a stage that has no use for them
        assert any(codes) and "does not require grad" in "".join(printed)
    elif option == "overflow-alone":  # the next step finds that the stages have other scales
        assert all(codes) and "assert scale == theirs" in printed[0], printed
    else:
        assert codes == [0, 0], "\n".join(printed)
        found = differences(torch.load(out)[name], reference(name))
        if option == "offload":
            assert found["norms"] <= NORM and found["values"] <= WEIGHTS
        else:  # the norm leaves a stage out; gradients of idle heads come back
            assert found["norms"] > 10 * NORM or found["values"] > 10 * WEIGHTS
