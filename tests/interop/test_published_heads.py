"""Published head files: read whole or refused by name, and written so that their own program would find every key.

`published_reference` has the names and shapes of the published code; the tables of the tasks' tests say which of our
parameters is which. Neither knows the reader or the writer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from visft_ds.interop.files import TensorInfo, WeightFile, open_weights
from visft_ds.interop.head_file import build_empty
from visft_ds.interop.published_heads import find_published, sort_names
from visft_ds.interop.visft import read_visft_lora

from tests.interop.published_reference import FOREIGN, FULL, OPTIONS, WIDTH, aliased, reference
from tests.options import head_of
from tests.tasks.test_detection import PUBLISHED_KEYS as DETECTION_KEYS
from tests.tasks.test_segmentation import PUBLISHED_KEYS as SEGMENTATION_KEYS
from visft_ds.interop.heads import load_heads, open_head, read_head_info
from visft_ds.tasks import TASKS
from visft_ds.tasks.captioning.head import PUBLISHED_NAMES, CaptioningHead
from visft_ds.tasks.detection.head import DetectionHead
from visft_ds.tasks.segmentation.head import SegmentationHead

FILES = {
    task: f"eva_e_{kind}_heads.ckpt" for task, kind in zip(TASKS, ("detection", "segment", "caption"), strict=True)
}
HEADS = {"detection": DetectionHead, "segmentation": SegmentationHead, "captioning": CaptioningHead}


def theirs(task: str, name: str) -> str:
    """Our parameter -> its published name, by the tables of the tasks' own tests."""
    if task == "captioning":
        return f"visft_heads.caption_decoder.{PUBLISHED_NAMES[name]}"
    number = re.match(r"decoder\.layers\.(\d+)\.", name)
    layer = number[1] if number and task == "segmentation" else "{n}"
    table = DETECTION_KEYS if task == "detection" else SEGMENTATION_KEYS
    rules = [(ours.replace("{n}", layer), published.replace("{n}", layer)) for ours, published in table.items()]
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
    return [getattr(one, name) for one in (*getattr(out, "aux", ()), out) for name in fields]


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = list(zip(outputs(one), outputs(other), strict=True))
    return len(pairs) > 1 and all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """What the file of each task holds: that head, and the others as the published files have them."""
    torch.manual_seed(1)
    foreign = {"detection": OPTIONS["detection"], "captioning": FOREIGN}
    return {
        "detection": reference(WIDTH, foreign) | {"det_losses.empty_weight": torch.ones(6)},
        "segmentation": aliased(reference(WIDTH, OPTIONS)),
        "captioning": reference(WIDTH, {task: OPTIONS[task] for task in ("detection", "captioning")}),
    }


@pytest.fixture(scope="module")
def folder(states: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    for task, state in states.items():
        torch.save(state, path / FILES[task])
    return path


@pytest.fixture
def broken(states: dict[str, dict[str, Tensor]], tmp_path: Path) -> Callable[..., Path]:
    """Writes a task's file with some entries replaced; None takes one out."""

    def write(task: str, **changes: Tensor | None) -> Path:
        state = dict(states[task])
        for name, value in changes.items():
            assert name in state or value is not None
            state.pop(name, None)
            if value is not None:
                state[name] = value
        torch.save(state, tmp_path / "heads.ckpt")
        return tmp_path / "heads.ckpt"

    return write


# ---- reading ----


@pytest.mark.parametrize("task", TASKS)
def test_a_published_file_gives_the_head(folder: Path, states: dict[str, dict[str, Tensor]], task: str) -> None:
    head = load_heads(folder / FILES[task], task)
    assert type(head) is HEADS[task] and not head.training
    assert same(head, expected_head(task, states[task], OPTIONS[task]))
    info = read_head_info(folder / FILES[task], task)
    assert (info.task, info.in_channels, info.categories, info.extra) == (task, WIDTH, (), {"format": "visft"})
    assert (
        info.options
        == OPTIONS[task]
        | {
            "detection": {"num_heads": 8},
            "segmentation": {"num_heads": 8, "labelling": "published"},
            "captioning": {},
        }[task]
    )
    assert same(head, expected_head(task, states[task], info.options))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("nesting", ["model", "module.", "model module.", "legacy", "bf16", "safetensors"])
def test_checkpoints_of_every_kind(
    states: dict[str, dict[str, Tensor]], tmp_path: Path, task: str, nesting: str
) -> None:
    """Stage checkpoints: one more level, a prefix, LoRA of the backbone, the optimizer. They hold all three heads."""
    state = states["segmentation"] | {"det_losses.empty_weight": torch.ones(6)}
    for block in range(2):
        attention = f"visft_heads.backbone.0.blocks.{block}.attn.qkv."
        state |= {f"{attention}lora_A": torch.randn(8, WIDTH), f"{attention}lora_B": torch.randn(2 * WIDTH, 4)}
    wanted = expected_head(task, state, OPTIONS[task])
    path = tmp_path / ("w.safetensors" if nesting == "safetensors" else "current.ckpt")
    if nesting == "bf16":
        state = {name: value.bfloat16() for name, value in state.items()}
        wanted = expected_head(task, {name: value.float() for name, value in state.items()}, OPTIONS[task])
    content: dict[str, Any] = {f"module.{name}": t for name, t in state.items()} if "module." in nesting else state
    if "model" in nesting:
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
        content = {"model": content, "optimizer": optimizer, "num_updates": 7, "best_metric_value": None}
    if nesting == "safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=nesting != "legacy")
    head, content = load_heads(path, task), sort_names(open_weights(path))
    assert same(head, wanted) and {value.dtype for value in head.state_dict().values()} == {torch.float32}
    # Every tensor is a head's, the second name of one, or of LoRA (4) and of the detection loss (1).
    groups = (*content.heads.values(), content.repeats)
    assert not content.unknown and sum(map(len, groups)) + 5 == len(state)
    assert read_visft_lora(path).rank == 4


def test_the_foreign_caption_head_is_left_where_it_is(folder: Path) -> None:
    assert read_head_info(folder / FILES["detection"], "captioning").options["decoder_dim"] == 512
    contents = {task: sort_names(open_weights(folder / file)) for task, file in FILES.items()}
    counts = {task: {head: len(names) for head, names in one.heads.items()} for task, one in contents.items()}
    # 2 encoder layers of 12, 3 decoder layers of 18, 18 around them
    both = {"detection": 96, "captioning": 19}
    # 3 pixel layers of 16, 13 around them, 2 decoder layers of 18, 13 around them; all a second time
    assert counts == {"detection": both, "segmentation": {**both, "segmentation": 110}, "captioning": both}
    assert [len(one.repeats) for one in contents.values()] == [0, 110, 0]


@pytest.mark.parametrize(
    ("width", "parameters"),
    [(1792, (8_810_464, 13_847_441, 14_136_723)), (1408, (8_761_312, 13_650_833, 12_956_691))],
)
def test_full_size(width: int, parameters: tuple[int, int, int]) -> None:
    """Sizes as published, from names and shapes alone; our defaults are exactly what the tensors tell."""
    with torch.device("meta"):
        state = reference(width, FULL)
    infos = {name: TensorInfo.of(tensor) for name, tensor in state.items()}
    content = sort_names(WeightFile(Path("eva_e.ckpt"), infos, state.__getitem__, {}))
    assert content.unknown == ()
    for task, count in zip(HEADS, parameters, strict=True):
        info = find_published(content, task, assume=True).info
        head = build_empty(info)
        shapes = {theirs(task, name): tuple(value.shape) for name, value in head.state_dict().items()}
        assert shapes == {name: infos[name].shape for name in content.heads[task].values()}
        assert sum(parameter.numel() for parameter in head.parameters()) == count
        assert info.in_channels == width and info.options.items() >= FULL[task].items()


# ---- refusals ----


@pytest.mark.parametrize(
    ("task", "name", "value", "message"),
    [
        ("detection", "transformer.encoder.layers.1.norm2.bias", torch.ones(17), "norm2.bias"),
        ("detection", "transformer.decoders.vqa.vqa2.norm.bias", torch.ones(4), "Unexpected"),
        ("captioning", "caption_decoder.fc.bias", torch.full((13,), torch.inf), "Not finite"),
        ("captioning", "caption_decoder.decode_step.bias_hh", torch.ones(24).int(), "quantised"),
        ("segmentation", "segment_head.predictor.decoder_norm.bias", torch.ones(32), "Different"),
    ],
)
def test_what_does_not_fit_is_named(
    broken: Callable[..., Path], task: str, name: str, value: Tensor, message: str
) -> None:
    path = broken(task, **{f"visft_heads.{name}": value})
    with pytest.raises(ValueError, match=message):
        load_heads(path, task)
    # sizes of ours, so that nothing but this one tensor is in the way
    head = head_of(task, WIDTH, **OPTIONS[task])
    before = {key: tensor.clone() for key, tensor in head.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        open_head(head, path, task).load_into(head)
    assert all(torch.equal(tensor, before[key]) for key, tensor in head.state_dict().items())


# ---- into heads at hand ----


@pytest.mark.parametrize("task", TASKS)
def test_weights_go_into_a_head_at_hand(folder: Path, states: dict[str, dict[str, Tensor]], task: str) -> None:
    head = head_of(task, WIDTH, **OPTIONS[task]).double()
    opened = open_head(head, folder / FILES[task], task)
    opened.load_into(head)
    info = opened.info
    assert all(torch.equal(t, states[task][theirs(task, name)].double()) for name, t in head.state_dict().items())
    # No tensor tells the number of attention heads, nor, without it, of sampling points.
    told = {name: value for name, value in OPTIONS[task].items() if name != "num_points"}
    assert info.options == told | ({"labelling": "published"} if task == "segmentation" else {})
    assert (info.task, info.in_channels, info.categories, info.extra) == (task, WIDTH, (), {"format": "visft"})


# ---- writing ----
