"""Published head files: read whole or refused by name.

`published_reference` has the names and shapes of the published code, and says which of our parameters is which. It
knows neither the reader nor the writer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.interop.published_reference import NAMES, OPTIONS, WIDTH, aliased, reference
from tests.options import head_of
from tests.tiny import THREE
from visft_ds.interop.heads import open_head
from visft_ds.interop.published import published_head, read_visft_lora
from visft_ds.interop.weights import Lazy, Weights
from visft_ds.tasks.captioning.head import PUBLISHED_NAMES, CaptioningHead
from visft_ds.tasks.detection.head import DetectionHead
from visft_ds.tasks.segmentation.head import SegmentationHead

FILES = {
    task: f"eva_e_{kind}_heads.ckpt" for task, kind in zip(THREE, ("detection", "segment", "caption"), strict=True)
}
HEADS = {"detection": DetectionHead, "segmentation": SegmentationHead, "captioning": CaptioningHead}


def theirs(task: str, name: str) -> str:
    """Our parameter -> its published name."""
    if task == "captioning":
        return f"visft_heads.caption_decoder.{PUBLISHED_NAMES[name]}"
    number = re.match(r"decoder\.layers\.(\d+)\.", name)
    layer = number[1] if number and task == "segmentation" else "{n}"
    rules = [(ours.replace("{n}", layer), published.replace("{n}", layer)) for ours, published in NAMES[task].items()]
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
        out = head(features, valid, *(more if isinstance(head, CaptioningHead) else ()))
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
def test_a_published_file_gives_the_head(folder: Path, states: dict[str, dict[str, Tensor]], task: str) -> None:
    found = open_head(folder / FILES[task], task)
    head, info = found.build(), found.info
    assert type(head) is HEADS[task] and not head.training
    assert same(head, expected_head(task, states[task], OPTIONS[task]))
    assert (info.task, info.in_channels, info.categories, info.extra) == (task, WIDTH, (), {"format": "visft"})
    assert info.options.items() >= OPTIONS[task].items()
    assert task != "segmentation" or info.options["labelling"] == "published"


@pytest.mark.parametrize("task", THREE)
def test_a_checkpoint_of_its_training_holds_everything(
    states: dict[str, dict[str, Tensor]], tmp_path: Path, task: str
) -> None:
    """One more level, a prefix, bf16, LoRA of the backbone, the optimizer, and all three heads."""
    state = {name: value.bfloat16() for name, value in states["segmentation"].items()}
    wanted = expected_head(task, {name: value.float() for name, value in state.items()}, OPTIONS[task])
    for block in range(2):
        attention = f"visft_heads.backbone.0.blocks.{block}.attn.qkv."
        state |= {f"{attention}lora_A": torch.randn(8, WIDTH), f"{attention}lora_B": torch.randn(2 * WIDTH, 4)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    model, path = {f"module.{name}": value for name, value in state.items()}, tmp_path / "current.ckpt"
    torch.save({"model": model, "optimizer": optimizer, "num_updates": 7, "best_metric_value": None}, path)
    head = open_head(path, task).build()
    assert same(head, wanted) and {value.dtype for value in head.state_dict().values()} == {torch.float32}
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
        found, options, tensors = published_head(task, file)
        assert found == width and options.items() >= sizes[task].items()
        assert sum(torch.Size(one.shape).numel() for one in tensors.values()) == count
        assert {theirs(task, name) for name in tensors} <= state.keys()


@pytest.mark.parametrize(
    ("task", "name", "value", "message"),
    [
        ("detection", "transformer.encoder.layers.1.norm2.bias", torch.ones(17), "norm2.bias"),
        ("detection", "input_proj.weight", None, "no detection head"),
        ("segmentation", "segment_predictor.decoder_norm.bias", None, "decoder.norm.bias is missing"),
    ],
)
def test_what_does_not_fit_is_named(
    states: dict[str, dict[str, Tensor]], tmp_path: Path, task: str, name: str, value: Tensor | None, message: str
) -> None:
    state = {**states[task], f"visft_heads.{name}": value}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "heads.ckpt")
    with pytest.raises(ValueError, match=message):
        open_head(tmp_path / "heads.ckpt", task).build()
