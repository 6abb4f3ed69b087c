"""An adapter as a folder of PEFT, read and written without PEFT, whose import costs 3 s and 1 GB.

PEFT has no LoRA on slices of a fused qkv. Ours becomes its plain one on the whole qkv: of G slices rank G*r,
A as it is, B (3D, G*r) block by block and zero elsewhere, alpha G times as large. That is exact. What PEFT
does not know (model, slices, base weights) stands in the header of the weights, which it passes over. A
folder that PEFT wrote has no such header, and adapts whole layers.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from visft_ds.files import read_bytes, reading, write_text
from visft_ds.interop.adapter import Adapter, Factors
from visft_ds.interop.layouts import StoredModel
from visft_ds.interop.weights import Weights, examples, open_weights, save_tensors
from visft_ds.ops.lora import Slices, spread
from visft_ds.settings.fields import Above, Count, Positive, Problems, StrictModel, Text

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_HEADER = "visft_adapter"
_MOST_BYTES = 1 << 24  #: of a configuration that is read
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.+\.lora_[AB])\.weight")
_WAY_OUT = "let PEFT merge it (merge_and_unload), and give the merged weights as the base"
#: Keys of LoraConfig (peft 0.21.2) that change no weight, whatever they say.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
#: Values of init_lora_weights that leave the base weights as they were.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REASONS = {
    "use_dora": "DoRA scales the rows of the weights, too",
    "bias": "it has biases, too",
    "lora_bias": "it has biases, too",
    "modules_to_save": "it has whole layers, too",
}
_Value = TypeVar("_Value")
#: The first pattern that a layer's name ends with, as peft.utils.other.get_pattern_key finds it.
_FIRST = """
import json, re, sys
patterns, layers = json.load(sys.stdin)
ends = [(pattern, re.compile(rf"(.*\\.)?({pattern})$")) for pattern in patterns]
first = [next((pattern for pattern, end in ends if end.match(layer)), None) for layer in layers]
json.dump(first, sys.stdout)
"""
_MOST_SECONDS = 20  #: that all patterns of a folder may take


class StoredAdapter(StrictModel):
    """Facts of an adapter that PEFT does not know: JSON in the header of its weights."""

    version: Literal[1]
    model: StoredModel
    targets: tuple[Text, ...]
    slices: Annotated[dict[str, tuple[tuple[Count, Positive], ...]], Field(min_length=1)]
    base: str | None
    step: Count | None


class PeftConfig(StrictModel):
    """adapter_config.json of a LoRA that changes the weights by scale * B A and nothing else."""

    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    r: Positive
    lora_alpha: Above
    use_rslora: bool = False
    rank_pattern: dict[str, Positive] | None = None  #: end of a layer's name, a regular expression -> rank
    alpha_pattern: dict[str, float] | None = None
    init_lora_weights: bool | str | None = True

    def contradictions(self) -> Problems:
        """The first key that makes it another change than that."""
        if self.init_lora_weights not in _STARTS:
            start = f"{self.init_lora_weights!r} changed the base weights when the training began"
            yield "init_lora_weights", f"{start}; {_WAY_OUT}"
            return
        for key, value in (self.model_extra or {}).items():
            if value and key not in _HARMLESS and (key, value) != ("bias", "none"):
                reason = _REASONS.get(key, "it is no plain LoRA")
                yield key, f"{json.dumps(value)[:40]}: {reason}; {_WAY_OUT}"
                return

    def scale(self, alpha: float, rank: int) -> float:
        """Factor of B A; of rsLoRA (https://arxiv.org/abs/2312.03732) it falls with the root of the rank."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(
    key: str, patterns: Mapping[str, _Value] | None, layers: Sequence[str], default: _Value
) -> list[_Value]:
    """The value of each layer: that of the first pattern which its name ends with.

    Regular expressions of a foreign file may take forever: a process that can be ended compares them. Raises
    ValueError for those that take too long, or are none.
    """
    if not patterns:
        return [default] * len(layers)
    command = [sys.executable, "-I", "-S", "-c", _FIRST]
    content = json.dumps([list(patterns), layers])
    try:
        done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        remedy = f"write names of layers there, or {_WAY_OUT}"
        raise ValueError(f"{key}: its patterns took {_MOST_SECONDS} s; {remedy}") from error
    if done.returncode:
        raise ValueError(f"{key}: {done.stderr.strip().splitlines()[-1]}")
    return [default if first is None else patterns[first] for first in json.loads(done.stdout)]


def read_folder(folder: Path) -> Adapter:
    """The adapter in a folder. Raises ValueError for another content, and for values that are not finite."""
    description = folder / CONFIG
    if not description.is_file():
        raise ValueError(f"{folder}: no adapter in it, which has {CONFIG}: give RUN/export/adapter, or a run")
    with reading(description, "a plain LoRA of PEFT"):
        config = PeftConfig.model_validate_json(read_bytes(description, _MOST_BYTES))
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; adapter_model.bin is a pickle and not read: let PEFT save it again"
        )
    with reading(path, "the weights of a plain LoRA of PEFT"):
        file = _factors_in(path)
        names = list(dict.fromkeys(name.rpartition(".")[0] for name in file))
        stored = None
        if _HEADER in file.metadata:
            stored = StoredAdapter.model_validate_json(file.metadata[_HEADER])
            if stored.slices.keys() != set(names):
                raise ValueError(f"it has {examples(names)}, and its header says {examples(stored.slices)}")
            names = [*stored.slices]  # in the order of the model
        ranks = _by_pattern("rank_pattern", config.rank_pattern, names, config.r)
        alphas = _by_pattern("alpha_pattern", config.alpha_pattern, names, config.lora_alpha)
        rows_of = {name: _rows_in(file, name, rank, stored) for name, rank in zip(names, ranks, strict=True)}
        rank = max(own // len(rows_of[name][1]) for name, own in zip(names, ranks, strict=True))
        scale = config.scale(config.lora_alpha, config.r)
        layers = {}
        for name, alpha in zip(names, alphas, strict=True):
            rows, slices = rows_of[name]
            a = file.tensor(f"{name}.lora_A", torch.float32)
            b = _stacked(file.tensor(f"{name}.lora_B", torch.float32).flatten(1), name, slices)
            factor = config.scale(alpha, len(a)) / scale
            if not math.isclose(factor, 1, rel_tol=1e-12):
                b *= factor
            # Zeros in both factors stay zeros in training: nothing is added to what the layer can learn.
            a = _with_rank(a.unflatten(0, (len(slices), -1)), rank).flatten(0, 1)
            layers[name] = Factors(rows, slices, a, _with_rank(b, rank))
    alpha = config.lora_alpha if rank == config.r and not config.use_rslora else scale * rank
    adapter = Adapter(None, rank, alpha, (), layers, path=path)
    if stored is None:
        return adapter
    model = stored.model.options()
    return replace(adapter, model=model, targets=stored.targets, base=stored.base, step=stored.step)


def _factors_in(path: Path) -> Weights:
    """The tensors of a file under our names, none of them read. Raises ValueError for others in it."""
    file = open_weights(path)
    foreign = [key for key in file if not _KEY.fullmatch(key)]
    if foreign:
        reason = "is no part of the LoRA of a linear layer or convolution"
        raise ValueError(f"{examples(foreign)} {reason}; {_WAY_OUT}")
    if not file:
        raise ValueError("it has no tensors")
    return Weights({_KEY.sub(r"\1", key): tensor for key, tensor in file.items()}, path, file.metadata)


def _rows_in(file: Weights, layer: str, rank: int, stored: StoredAdapter | None) -> tuple[int, Slices]:
    """Rows of a layer, and which are adapted; no tensor is read.

    Raises ValueError for sizes that contradict the configuration or the header.
    """
    a = file.get(f"{layer}.lora_A")
    b = file.get(f"{layer}.lora_B")
    if a is None or b is None:
        raise ValueError(f"one of lora_A and lora_B of {examples([layer])} is missing")
    behind = (1, 1) if len(a.shape) == 4 else ()
    fits = len(a.shape) in (2, 4) and a.shape[0] == rank and 0 not in a.shape + b.shape
    if not fits or b.shape[1:] != (rank, *behind):
        raise ValueError(
            f"lora_A of {examples([layer])} is {a.shape} and lora_B {b.shape}, which is not rank {rank} "
            f"(as {CONFIG} says) of a linear layer or a convolution without groups"
        )
    rows = b.shape[0]
    slices = stored.slices[layer] if stored else ((0, rows),)
    bounds = [*chain.from_iterable(slices), rows]
    rise = bounds == sorted(bounds) and all(low < high for low, high in slices)
    if not slices or not rise or rank % len(slices):
        raise ValueError(f"slices {slices} of {examples([layer])} are none of {rows} rows at rank {rank}")
    return rows, slices


def _stacked(b: Tensor, layer: str, slices: Slices) -> Tensor:
    """B of a whole layer, stacked slice by slice. Raises ValueError for values beyond its slices."""
    columns = b.chunk(len(slices), dim=1)
    stacked = torch.cat([part[low:high] for part, (low, high) in zip(columns, slices, strict=True)])
    if not torch.equal(spread(stacked, slices, len(b)), b):
        raise ValueError(
            f"lora_B of {examples([layer])} is not 0 outside of the slices {slices} of its header"
        )
    return stacked


def _with_rank(factor: Tensor, rank: int) -> Tensor:
    """A (G, r, ...) or B (R, r) with zeros up to this rank."""
    behind = (0, 0) * (factor.ndim - 2)
    return F.pad(factor, (*behind, 0, rank - factor.shape[1]))


def write_folder(adapter: Adapter, folder: Path, base_model: str | None = None) -> None:
    """Write both files; the configuration last, without which the folder is no adapter.

    Args:
        base_model: repository of the base weights on the hub.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    facts = {
        "version": 1,
        "model": adapter.model,
        "targets": adapter.targets,
        "slices": adapter.slices,
        "base": adapter.base,
        "step": adapter.step,
    }
    tensors = {}
    rank_pattern = {}
    alpha_pattern = {}
    for layer, (rows, slices, a, stacked) in adapter.layers.items():
        b = spread(stacked, slices, rows)
        if a.ndim == 4:
            b = b[:, :, None, None]
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = b
        if len(slices) > 1:
            rank_pattern[re.escape(layer)] = adapter.rank * len(slices)
            alpha_pattern[re.escape(layer)] = adapter.alpha * len(slices)
    header = {} if adapter.model is None else {_HEADER: json.dumps(facts)}
    save_tensors(folder / WEIGHTS, tensors, header)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        # Whole names: "conv1" alone would be that of every block.
        "target_modules": "|".join(re.escape(layer) for layer in adapter.layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
