"""Bundles keep what a step worked on, and replaying one names the first module and the image."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.engine_case import TASKS, build, global_batch, loss_denominators
from visft_ds.model import MultiTaskModel
from visft_ds.resilience.bundle import RECORD, TARGETS, Bundle, RankPart, open_bundle, write_part
from visft_ds.resilience.nan_debug import NonFinite, examine_batch
from visft_ds.resilience.replay import main

STEP_OF_ALL = 3  #: in which all three tasks learn
IMAGE = 2  #: the id of the image that goes wrong, also its place in the batch


@pytest.fixture(name="case")
def _case() -> tuple[MultiTaskModel, Any, Any]:
    module, _ = build(1)
    batch = global_batch(STEP_OF_ALL)
    return module.train(), batch, loss_denominators(module, batch, 1)


def examine(case: tuple[MultiTaskModel, Any, Any]) -> list[NonFinite]:
    return examine_batch(*case, "fp32")


def test_a_healthy_step_gives_no_findings(case: tuple[MultiTaskModel, Any, Any]) -> None:
    assert examine(case) == []


def test_the_first_module_and_the_image_are_named(case: tuple[MultiTaskModel, Any, Any]) -> None:
    def overflow(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        worse = output.clone()
        worse[IMAGE, 0] = torch.inf
        return worse

    case[0].backbone.blocks[1].attn.register_forward_hook(overflow)
    found = examine(case)
    assert found[0].what == "output of backbone.blocks.1.attn"
    assert found[0].images == (IMAGE,)
    assert any(one.what.startswith("criterion: detection: the matching cost") for one in found)


def test_a_parameter_comes_before_what_it_spoils(case: tuple[MultiTaskModel, Any, Any]) -> None:
    with torch.no_grad():
        case[0].heads["captioning"].get_parameter("embedding.weight")[1] = torch.nan
    assert examine(case)[0].what == "parameter heads.captioning.embedding.weight"


def test_a_gradient_is_found_where_it_begins(case: tuple[MultiTaskModel, Any, Any]) -> None:
    """All values are finite: the root of 0 has no finite gradient."""
    module, batch, divisors = case
    criterion = module.criteria["captioning"]

    class Rooted:
        weights, count = criterion.weights, criterion.count

        def __call__(self, output: Any, *rest: Any) -> dict[str, Tensor]:
            parts = criterion(output, *rest)
            name = next(iter(parts))
            return {**parts, name: parts[name] + (output.scores[IMAGE] * 0).sum().sqrt()}

    module.criteria["captioning"] = Rooted()  # type: ignore[assignment]
    found = examine((module, batch, divisors))
    assert found[0].what == "gradient of the output of heads.captioning"
    assert found[0].images == (IMAGE,)


def test_a_gradient_that_overflows_in_fp16_is_found_at_the_loss_scale_of_the_run() -> None:
    """Adapters of a backbone that computes in fp16, whose largest number is 65,504; the heads compute in fp32."""
    module, _ = build(2, storage=torch.float16)
    batch = global_batch(0)
    module.train()
    divisors = loss_denominators(module, batch, 1)
    assert examine_batch(module, batch, divisors, "fp16", 1.0) == []
    found = examine_batch(module, batch, divisors, "fp16", 2.0**40)
    assert found[0].what.startswith("gradient of the output of backbone.blocks.1.")
    assert any(one.what.startswith("gradient of parameter backbone.blocks.0.attn.qkv.lora_") for one in found)


def test_a_bundle_gives_back_what_a_rank_worked_on(case: tuple[MultiTaskModel, Any, Any], tmp_path: Path) -> None:
    _, batch, divisors = case
    assert write_part(tmp_path, RankPart(1, 77, (batch, global_batch(0)), divisors))
    (part,) = Bundle(tmp_path, {"kept": [1], "stages": 1, "world_size": 2}).parts()
    assert (part.rank, part.seed, len(part.batches)) == (1, 77, 2)
    assert part.batches[1].tasks == ("detection",)
    got = part.batches[0]
    assert got.tasks == batch.tasks == TASKS == tuple(TARGETS)
    assert torch.equal(got.images, batch.images) and torch.equal(got.random_keys, batch.random_keys)
    assert batch.frames is not None and torch.equal(got.frames, batch.frames)
    for task in TASKS:
        for entry in fields(batch.targets[task]):
            ours, theirs = (getattr(one.targets[task], entry.name) for one in (got, batch))
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    assert {t: {n: float(v) for n, v in c.items()} for t, c in part.loss_denominators.items()} == {
        t: {n: float(v) for n, v in c.items()} for t, c in divisors.items()
    }


def test_a_bundle_of_a_pipeline_has_the_pixels_of_its_first_stage(
    case: tuple[MultiTaskModel, Any, Any], tmp_path: Path
) -> None:
    """Two pipelines of three stages: ranks 1 and 5 have read the halves of one batch, 0 and 4 those of the other."""
    _, batch, divisors = case
    blind = replace(batch, images=batch.images[..., :0, :0])
    assert write_part(tmp_path, RankPart(1, 7, (replace(batch, targets={}),), {}))
    assert write_part(tmp_path, RankPart(5, 77, (blind,), divisors))
    (part,) = Bundle(tmp_path, {"kept": [1, 5], "stages": 3, "world_size": 6}).parts()
    assert (part.rank, part.seed) == (5, 77) and part.loss_denominators.keys() == divisors.keys()
    assert torch.equal(part.batches[0].images, batch.images) and part.batches[0].tasks == TASKS


def test_what_is_too_large_is_not_kept(
    case: tuple[MultiTaskModel, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visft_ds.resilience.bundle.LARGEST", 1000)
    assert not write_part(tmp_path / "b", RankPart(0, 0, (case[1],), case[2]))
    assert not (tmp_path / "b").exists()


def test_rubbish_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is no bundle" in capsys.readouterr().err
    (tmp_path / RECORD).write_text('{"format": "visft_ds.bundle", "version": 99}')
    with pytest.raises(ValueError, match=r"this release reads visft_ds\.bundle 1"):
        open_bundle(tmp_path)
    (tmp_path / "rank_00000.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read"):
        Bundle(tmp_path, {"kept": [0]}).parts()
