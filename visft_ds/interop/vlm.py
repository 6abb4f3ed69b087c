"""Vision towers inside vision-language models of transformers: compared with a base, replaced in memory.

| model | its tower | reads |
|---|---|---|
| BLIP-2 (https://arxiv.org/abs/2301.12597) | EVA-G without its last block | all tokens, by its own norm |
| LLaVA and what is built like it | CLIP, SigLIP, DINOv3 | as its configuration says |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visft_ds.files import reading
from visft_ds.interop import transformers_names
from visft_ds.interop.layouts import fitted
from visft_ds.interop.weights import Tensors, Weights
from visft_ds.models import Backbone

_BLIP2 = "blip-2"
#: Tensors of a tower that no base has, that the model around it trained itself, or does not read.
_OWN: tuple[str, ...] = ("embeddings.mask_token", "head.")  # the pooling of SigLIP, which nothing reads
_OWN_OF_BLIP2 = ("post_layernorm.",)
_LAYER = re.compile(r"(?:encoder\.layers|model\.layer)\.(\d+)\.")


@dataclass(frozen=True)
class Vlm:
    """Vision-language model of transformers, and how it reads its tower."""

    model: Any
    tower: Any  #: a module of it
    block: int  #: of the tower, counted from 0, whose output it reads; of several the last
    tokens: str  #: of that output, which it reads, in words

    @classmethod
    def of(cls, model: Any) -> Vlm:
        """The model with the tower in it. Raises ValueError for one of another kind."""
        config = model.config
        if config.model_type == _BLIP2:
            tower = model.vision_model
            last = tower.config.num_hidden_layers - 1
            return cls(model, tower, last, "all tokens, by its own post_layernorm")
        tower = getattr(getattr(model, "model", model), "vision_tower", None)
        if tower is None or not hasattr(tower.config, "num_hidden_layers"):
            raise ValueError(
                f"{type(model).__name__} has no vision tower by a name that is known here: give BLIP-2 or a "
                "model in LLaVA's style"
            )
        depth = tower.config.num_hidden_layers
        layers = getattr(config, "vision_feature_layer", -1)
        if isinstance(layers, int):
            layers = [layers]
        outputs = range(depth + 1)  # the first one is that of the embeddings
        read = max(outputs[layer] for layer in layers)
        without_first = getattr(config, "vision_feature_select_strategy", "full") == "default"
        return cls(model, tower, read - 1, "all tokens but the first" if without_first else "all tokens")

    def describe(self) -> str:
        """Its kind and what it reads, for the console."""
        depth = self.tower.config.num_hidden_layers
        reads = f"reads {self.tokens} of block {self.block}"
        return f"{type(self.model).__name__}, {depth} blocks of vision; {reads}"

    def names(self, tower: Weights, backbone: Backbone) -> Weights:
        """The tensors of a tower of ours under the names of this one, without those that stay as they are.

        Raises ValueError for a tower that does not fit.
        """
        own = _OWN
        if self.model.config.model_type == _BLIP2:
            own += _OWN_OF_BLIP2
        written = transformers_names.written(tower, tower, backbone).tensors
        tensors = {}
        for stored, tensor in written.items():
            name = re.sub(r"^layer\.", "model.layer.", stored.removeprefix("vision_model."))
            layer = _LAYER.match(name)
            if layer is None or int(layer[1]) < self.tower.config.num_hidden_layers:
                tensors[name] = tensor
        present = self.tower.state_dict()
        expected = {name: value for name, value in present.items() if not name.startswith(own)}
        what = f"{type(self.tower).__name__} of this model"
        return fitted(Weights(tensors, tower.path), expected, behind=own, what=what)

    def check_base(self, base: Tensors) -> float:
        """The largest |tensor - base| / |base| of its tower, which is that base, rounded.

        Args:
            base: as `names` gives it.

        Raises:
            ValueError: the tower has other weights, as where the model's training changed it.
        """
        present = self.tower.state_dict()
        largest = 0.0
        for name, tensor in base.items():
            known = tensor.read()
            dtypes = (known.dtype, present[name].dtype, torch.float16)
            limit = 4 * max(torch.finfo(dtype).eps for dtype in dtypes)
            error = present[name].cpu().float() - known.float()
            difference = float(error.norm() / known.float().norm().clamp(min=1e-12))
            if difference > limit:
                raise ValueError(
                    f"{name} of this model's tower differs by {difference:.2g} from the base of the run: the "
                    "tower was trained itself, as in BLIP-2's -coco models, or is of other weights; give a "
                    "model whose tower was frozen"
                )
            largest = max(largest, difference)
        return largest

    @torch.no_grad()
    def put(self, tower: Tensors) -> None:
        """Copy the tensors of a tower, as `names` gives them, into this one, in its dtype."""
        present = self.tower.state_dict()
        for name, tensor in tower.items():
            present[name].copy_(tensor.read())


def open_vlm(folder: Path) -> Vlm:
    """A vision-language model in a folder, in the dtype of its file. Raises ValueError for anything else."""
    from transformers import AutoModelForImageTextToText

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no folder of transformers with config.json; hf download NAME --local-dir {folder} "
            "makes one"
        )
    with reading(folder, "a vision-language model of transformers"):
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True)
    return Vlm.of(model.eval())
