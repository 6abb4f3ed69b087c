"""Published head files: read whole or refused by name.

`published_reference` has the names and shapes of the published code, and says which of our parameters is
which. It knows neither the reader nor the writer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.interop.published_reference import NAMES, OPTIONS, WIDTH, aliased, reference
from tests.options import head_of
from tests.tasks.cases import map_of, published_caption_name
from tests.tiny import THREE
from visft_ds.interop.heads import open_head
from visft_ds.interop.published import published_head, read_visft_lora
from visft_ds.interop.weights import Lazy, Weights
from visft_ds.tasks.captioning.head import CaptioningHead
from visft_ds.tasks.classes import COCO_NAMES
from visft_ds.tasks.detection.head import DetectionHead
from visft_ds.tasks.masks.plain import PlainHead
from visft_ds.tasks.segmentation.head import SegmentationHead

FILES = {
    task: f"eva_e_{kind}_heads.ckpt"
    for task, kind in zip(THREE, ("detection", "segment", "caption"), strict=True)
}
HEADS = {"detection": DetectionHead, "segmentation": SegmentationHead, "captioning": CaptioningHead}


def theirs(task: str, name: str) -> str:
    """Our parameter -> its published name."""
    if task == "captioning":
        return f"visft_heads.caption_decoder.{published_caption_name(name)}"
    number = re.match(r"decoder\.layers\.(\d+)\.", name)
    layer = number[1] if number and task == "segmentation" else "{n}"
    rules = [
        (ours.replace("{n}", layer), published.replace("{n}", layer))
        for ours, published in NAMES[task].items()
    ]
    ours, published = next(rule for rule in rules if name.startswith(rule[0]))
    rest = name[len(ours) :]
    if task == "detection":
        rest = rest.replace("cross_attn", "multihead_attn")
    return "visft_heads." + published + rest


def expected_head(task: str, state: Mapping[str, Tensor], options: Mapping[str, Any]) -> nn.Module:
    """Our head with the values of a reference state."""
    head = head_of(task, WIDTH, **options)
    head.load_state_dict({name: state[theirs(task, name)] for name in head.state_dict()})
    return head.eval()


def outputs(head: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    features, valid = torch.randn(2, WIDTH, 3, 4, generator=generator), torch.ones(2, 3, 4, dtype=torch.bool)
    valid[1, 2:] = False
    more = (torch.tensor([[11, 3, 5, 12], [11, 4, 12, 0]]), torch.tensor([4, 3]))
    with torch.no_grad():
        out = head([map_of(features, valid)], *(more if isinstance(head, CaptioningHead) else ()))
    fields = [name for name in ("logits", "boxes", "masks", "scores", "attention") if hasattr(out, name)]
    return [getattr(out, name) for name in fields]


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = list(zip(outputs(one), outputs(other), strict=True))
    return len(pairs) > 1 and all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """What the file of each task holds: that head, and the others as the published files have them."""
    torch.manual_seed(1)
    two = reference(WIDTH, {task: OPTIONS[task] for task in ("detection", "captioning")})
    loss = {"det_losses.empty_weight": torch.ones(6)}
    return {"detection": two | loss, "segmentation": aliased(reference(WIDTH, OPTIONS)), "captioning": two}


@pytest.fixture(scope="module")
def folder(states: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    for task, state in states.items():
        torch.save(state, path / FILES[task])
    return path


@pytest.mark.parametrize("task", THREE)
def test_a_published_file_gives_the_head(
    folder: Path, states: dict[str, dict[str, Tensor]], task: str
) -> None:
    found = open_head(folder / FILES[task], task)
    head, info = found.build(), found.info
    assert type(head) is HEADS[task] and not head.training
    assert same(head, expected_head(task, states[task], OPTIONS[task]))
    assert (info.task, info.shapes, info.categories, info.extra) == (
        task,
        [(WIDTH, 14)],
        (),
        {"format": "visft"},
    )
    assert info.options.items() >= OPTIONS[task].items()
    assert task != "segmentation" or info.options["class_ids"] == "published"


@pytest.mark.parametrize("task", THREE)
def test_a_checkpoint_of_its_training_holds_everything(
    states: dict[str, dict[str, Tensor]], tmp_path: Path, task: str
) -> None:
    """One more level, a prefix, bf16, LoRA of the backbone, the optimizer, and all three heads."""
    state = {name: value.bfloat16() for name, value in states["segmentation"].items()}
    expected = expected_head(task, {name: value.float() for name, value in state.items()}, OPTIONS[task])
    for block in range(2):
        attention = f"visft_heads.backbone.0.blocks.{block}.attn.qkv."
        state |= {
            f"{attention}lora_A": torch.randn(8, WIDTH),
            f"{attention}lora_B": torch.randn(2 * WIDTH, 4),
        }
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    model, path = {f"module.{name}": value for name, value in state.items()}, tmp_path / "current.ckpt"
    torch.save({"model": model, "optimizer": optimizer, "num_updates": 7, "best_metric_value": None}, path)
    head = open_head(path, task).build()
    assert same(head, expected) and {value.dtype for value in head.state_dict().values()} == {torch.float32}
    assert read_visft_lora(path).rank == 4


@pytest.mark.parametrize(
    ("width", "parameters"),
    [(1792, (8_810_464, 13_847_441, 14_136_723)), (1408, (8_761_312, 13_650_833, 12_956_691))],
)
def test_full_size(width: int, parameters: tuple[int, int, int]) -> None:
    """Widths and words as published, from names and shapes alone."""
    sizes = {**OPTIONS, "captioning": {**OPTIONS["captioning"], "vocabulary_size": 9490}}
    with torch.device("meta"):
        state = reference(width, sizes)
    file = Weights({name: Lazy.of(tensor) for name, tensor in state.items()}, Path("eva_e.ckpt"))
    for task, count in zip(HEADS, parameters, strict=True):
        head = published_head(task, file)
        assert head.info.shapes == [(width, 14)] and head.info.options.items() >= sizes[task].items()
        assert sum(torch.Size(one.shape).numel() for one in head.tensors.values()) == count
        assert {theirs(task, name) for name in head.tensors} <= state.keys()


@pytest.mark.parametrize(
    ("task", "name", "value", "message"),
    [
        ("detection", "transformer.encoder.layers.1.norm2.bias", torch.ones(17), "norm2.bias"),
        ("detection", "input_proj.weight", None, "no detection head"),
        ("segmentation", "segment_predictor.decoder_norm.bias", None, "decoder.norm.bias is missing"),
    ],
)
def test_what_does_not_fit_is_named(
    states: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    task: str,
    name: str,
    value: Tensor | None,
    message: str,
) -> None:
    state = {**states[task], f"visft_heads.{name}": value}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "heads.ckpt")
    with pytest.raises(ValueError, match=message):
        open_head(tmp_path / "heads.ckpt", task).build()


def _pmt(maps: int, blocks: int, classes: int, queries: int) -> nn.Module:
    """Modules with the names and shapes of PMT's decoder on a DINOv3 of width 32."""

    def block() -> nn.ModuleDict:
        parts = {
            name: nn.Linear(32, 32, bias=name != "k_proj")
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        inner: dict[str, nn.Module] = {"attention": nn.ModuleDict(parts)}
        inner["mlp"] = nn.ModuleDict({"up_proj": nn.Linear(32, 48), "down_proj": nn.Linear(48, 32)})
        for number in "12":
            inner[f"norm{number}"] = nn.LayerNorm(32)
            inner[f"layer_scale{number}"] = nn.ParameterDict({"lambda1": torch.ones(32)})
        return nn.ModuleDict(inner)

    def upscale() -> nn.ModuleDict:
        near = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        return nn.ModuleDict(
            {"conv1": nn.ConvTranspose2d(32, 32, 2, 2), "conv2": near, "norm": nn.LayerNorm(32)}
        )

    def linear(*widths: int) -> nn.Sequential:
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())]
        return nn.Sequential(*layers[:-1])

    decoder = nn.ModuleDict(
        {
            "lateral_projections": nn.ModuleList(linear(32, 16, 32) for _ in range(maps)),
            "scalers": nn.ParameterList(torch.ones(32) for _ in range(maps)),
            "q": nn.Embedding(queries, 32),
            "blocks": nn.ModuleList(block() for _ in range(blocks)),
            "decoder_norm": nn.LayerNorm(32),
            "upscale": nn.Sequential(upscale(), upscale()),
            "mask_head": linear(32, 32, 32, 32),
            "class_head": nn.Linear(32, classes + 1),
        }
    )
    network = nn.ModuleDict(
        {"decoder": decoder, "bn": nn.ModuleList(nn.BatchNorm1d(32) for _ in range(maps))}
    )
    return nn.ModuleDict({"network": network})


def test_decoders_of_pmt_are_plain_heads(tmp_path: Path) -> None:
    """Every tensor has its place, sizes follow from shapes, and statistics of batch norms become means and
    spreads.
    """
    theirs = _pmt(maps=4, blocks=3, classes=80, queries=9)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    state = {**theirs.state_dict(), "network.decoder.attn_mask_probs": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "pytorch_model.bin")
    file = open_head(tmp_path, "segmentation")
    assert file.info.shapes == [(32, 16)] * 4 and file.info.extra["layers"] == [2, 5, 8, 11]
    expected = {"type": "plain", "num_classes": 80, "num_queries": 9, "blocks": 3, "ffn_dim": 48}
    assert file.info.options.items() >= expected.items() and file.info.names() == COCO_NAMES
    head = file.build()
    assert isinstance(head, PlainHead)
    assert len(list(head.parameters())) == len(list(theirs.parameters()))
    x = torch.randn(2, 5, 32)
    norm, lateral = theirs.eval().get_submodule("network.bn.2"), head.laterals[2]
    ours = lateral.channels(x) * lateral.weight + lateral.bias
    torch.testing.assert_close(ours, norm(x.transpose(1, 2)).transpose(1, 2), rtol=1e-5, atol=1e-6)
    for name in (
        "blocks.1.attention.k_proj.weight",
        "upscale.1.conv2.weight",
        "mask_head.4.bias",
        "scalers.3",
    ):
        mine = {"blocks": "blocks.1.k.weight", "upscal": "upscale.1.near.weight", "mask_h": "mask3.bias"}
        actual = head.get_parameter(mine.get(name[:6], "laterals.3.gain"))
        assert torch.equal(actual, state[f"network.decoder.{name}"])
