"""Values come into a model one tensor at a time, the same ones for whoever asks for them."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.parallel.test_start import WORDS, configured
from tests.planner.made_up import LiveBytes
from tests.prepare.test_stages import write_own
from tests.random_tower import save_backbone
from visft_ds.checkpoint.export import save_base
from visft_ds.config import ResolvedConfig
from visft_ds.errors import RankError
from visft_ds.interop.layouts import base_parameters, buffers_in, open_backbone
from visft_ds.model import MultiTaskModel
from visft_ds.prepare.materialize import HOST, Placement, open_base
from visft_ds.prepare.model import PreparedModel, plan_model, prepare_model

#: More blocks than any tensor is large: two copies of the tower cannot hide in the allowance.
DEEP = {"visft.model.overrides": {"width": 64, "depth": 6, "num_heads": 2, "image_size": 28}}


def prepare(config: ResolvedConfig, placement: Placement = HOST, **given: Any) -> PreparedModel:
    return prepare_model(config, vocabulary=WORDS, placement=placement, **given)


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Halves(Placement):
    """Keeps half of every tensor, as one of two ZeRO-3 processes does."""

    def place(self, parameter: nn.Parameter) -> None:
        flat = parameter.detach().flatten()
        parameter.data = flat[: (flat.numel() + 1) // 2].clone()


class Only(Placement):
    """Holds what has a certain beginning, as a stage of a pipeline does."""

    def __init__(self, *beginnings: str) -> None:
        self.beginnings = beginnings

    def held(self, module: MultiTaskModel) -> Container[str]:
        return {name for name, _ in module.named_parameters() if name.startswith(self.beginnings)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deep tower and heads for it."""
    folder = tmp_path_factory.mktemp("weights")
    config = configured("zero1", DEEP, stage=1)
    made = prepare(config)
    save_backbone(made.module.backbone, folder / "base.safetensors")
    state = {name: value.detach() for name, value in made.module.backbone.named_parameters()}
    torch.save(state, folder / "base.pt")
    return write_own(folder, made, config, WORDS)


@pytest.mark.parametrize(
    ("weights", "placement"), [("base.safetensors", HOST), ("base.safetensors", Halves()), (None, Halves())]
)
def test_no_second_copy_is_ever_alive(files: Path, weights: str | None, placement: Placement) -> None:
    extra = {"visft.model.weights": str(files / weights)} if weights else {}
    config = configured("zero1", {**DEEP, **extra}, stage=1)
    with LiveBytes() as alive:
        parameters = list(prepare(config, placement, heads_from=files).module.parameters())
    largest = max(int(p.numel()) * p.element_size() for p in parameters) * (
        2 if isinstance(placement, Halves) else 1
    )
    whole = size(prepare(config, heads_from=files).module.parameters())
    # A tensor that has been read, and what is kept of it.
    assert size(parameters) < alive.peak <= size(parameters) + 2 * largest < size(parameters) + whole / 4


def test_a_part_has_the_values_of_the_whole(files: Path) -> None:
    for stage, extra in ((1, {}), (2, {"visft.model.weights": str(files / "base.pt")})):
        config = configured("zero1", {**DEEP, **extra}, stage)
        whole = dict(prepare(config).module.named_parameters())
        for beginnings in (
            ("backbone.patch", "backbone.pos"),
            ("backbone.blocks.3.",),
            ("backbone.norm", "heads."),
        ):
            part = prepare(config, Only(*beginnings))
            for name, parameter in part.module.named_parameters():
                assert parameter.is_meta != name.startswith(beginnings), name
                assert parameter.is_meta or torch.equal(parameter, whole[name]), name


def test_a_damaged_value_is_told_by_the_one_process_that_sees_it(files: Path, tmp_path: Path) -> None:
    state = load_file(files / "base.safetensors")
    state["blocks.3.mlp.fc1.bias"][5] = torch.nan
    save_file(state, tmp_path / "base.safetensors")
    config = configured("zero1", {**DEEP, "visft.model.weights": str(tmp_path / "base.safetensors")}, stage=1)
    prepare(config, Only("backbone.blocks.2."))
    for placement, alone in ((HOST, False), (Only("backbone.blocks.3."), True)):
        with pytest.raises(ValueError, match=r"blocks\.3\.mlp\.fc1\.bias holds NaN") as caught:
            prepare(config, placement)
        assert isinstance(caught.value, RankError) is alone


def test_the_base_is_written_as_the_run_started_with_it(tmp_path: Path) -> None:
    """Also what trains of it, which is wider, and whoever holds it."""
    groups = [{"name": "block", "params": "backbone.blocks.1.*"}, {"name": "heads", "params": "heads.*"}]
    config = configured("zero1", {"visft.param_groups": groups}, stage=1)
    named = dict(prepare(config, precision="bf16").module.backbone.named_parameters())
    made = prepare(config, Only("heads."), precision="bf16")
    save_base(made.base, made.module.backbone, tmp_path / "base.safetensors")
    written = load_file(tmp_path / "base.safetensors")
    assert written.keys() == named.keys()
    assert all(value.dtype == named[n].dtype and torch.equal(value, named[n]) for n, value in written.items())
    assert {written[f"blocks.{index}.mlp.fc1.weight"].dtype for index in (0, 1)} == {
        torch.bfloat16,
        torch.float32,
    }


def test_a_random_base_holds_no_buffer_that_timm_computes_itself(tmp_path: Path) -> None:
    """DINOv3's periods of rotation are in no file of timm's, and would be refused in ours."""
    model = {"preset": "timm:vit_small_patch16_dinov3", "out_indices": [0], "overrides": {}}
    config = configured("zero1", {f"visft.model.{key}": value for key, value in model.items()}, stage=1)
    backbone = plan_model(config)[0].backbone
    base = open_base(config.visft.model, backbone, torch.float32)
    assert "rope.periods" in base.buffers
    save_base(base, backbone, tmp_path / "base.safetensors")
    found = open_backbone(backbone, tmp_path / "base.safetensors")
    assert buffers_in(found, base_parameters(backbone)) == {}
