"""Forms of weights that `visft export` writes: the file of each, its library, and how a user loads it.

Imports nothing heavy: the flags of the command name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from visft_ds.interop.weights import Weights


class Written(NamedTuple):
    """Content of a format: weights under their library's names, and files of JSON beside them."""

    tensors: Weights
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Format:
    """A form of weights that other programs read."""

    file: str  #: of the weights, in a folder; "": an adapter, which has two
    snippet: str  #: code that loads the folder it stands in, for the model card
    library: str  #: module that loads it, and compares it


FORMATS = {
    "open_clip": Format(
        file="open_clip_model.safetensors",
        library="open_clip",
        snippet='import open_clip\n\nmodel = open_clip.create_model("local-dir:.")',
    ),
    "peft": Format(
        file="",
        library="peft",
        snippet="""\
import timm
from peft import PeftModel

model = {model}
model = PeftModel.from_pretrained(model, ".").merge_and_unload().eval()""",
    ),
    "peft_transformers": Format(
        file="",
        library="peft",
        snippet="""\
from peft import PeftModel
from transformers import AutoModel

model = AutoModel.from_pretrained("BASE")  # visft export --backbone FILE --format transformers --out BASE
model = PeftModel.from_pretrained(model, ".").merge_and_unload().eval()""",
    ),
    "timm": Format(
        file="model.safetensors",
        library="timm",
        snippet='import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)',
    ),
    "transformers": Format(
        file="model.safetensors",
        library="transformers",
        snippet='from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained(".")',
    ),
}
#: Of an adapter alone, not of whole weights.
ADAPTERS = ("peft", "peft_transformers")
