"""README.md of exported weights; its head is written by huggingface_hub, and the hub reads it.

It holds hashes, settings and numbers of whole evaluations, never folders or names of people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from visft_ds.interop.adapter import Adapter
from visft_ds.interop.formats import ADAPTERS, FORMATS
from visft_ds.interop.layouts import describe_model, model_of
from visft_ds.models import Backbone
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.pretrained import HubFile, on_hub

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

README = "README.md"
_METHOD = "supervised fine-tuning ([ViSFT](https://arxiv.org/abs/2401.10222)) with visft_ds"
_ADAPTER = f"LoRA adapter from {_METHOD}; base weights not included."
_TEXT = """\
---
{front}
---

# {title}

{what}

| | |
|---|---|
{facts}

## How to load it

```python
{load}
```{unmerged}{reading}

Give images whose sides are multiples of {cell} pixels. Pad others with 0 on the right and bottom, after
normalisation, as in training: libraries drop pixels beyond the last whole patch.

The licence is that of the base weights.
"""
#: Of attention that calls F.linear with the weight of its fused qkv, past the layer that PEFT puts there.
_UNMERGED = """

**Without `merge_and_unload()` the adapter of the fused qkv has no effect, and nothing warns:** timm reads its
weight past the layer that PEFT wraps. To keep the adapter apart from the weights:

```python
model = {model}
for module in model.modules():
    if hasattr(module, "qkv_bias_separate"):
        module.qkv_bias_separate = True
model = PeftModel.from_pretrained(model, ".").eval()
```"""


#: Of EVA-G in transformers' form.
_IN_BLIP2 = """\
import torch
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration

model = Blip2ForConditionalGeneration.from_pretrained("Salesforce/blip2-opt-2.7b")
tower = load_file("model.safetensors")
with torch.no_grad():
    for name, parameter in model.vision_model.named_parameters():
        if not name.startswith("post_layernorm"):  # BLIP-2 trained its own
            parameter.copy_(tower[name])"""


def repository_of(weights: str | None) -> str | None:
    """The repository on the hub of what `visft.model.weights` may be."""
    name = None if weights is None else on_hub(weights)
    return None if name is None else HubFile.parse(name).repository


def card(
    title: str,
    form: str,
    backbone: Backbone,
    adapter: Adapter | None,
    base: str | None,
    facts: Mapping[str, str] = {},
    measured: Sequence[EvalResult] = (),
) -> str:
    """The text.

    Args:
        form: one of `formats.FORMATS`.
        base: repository of the base weights on the hub, where it is known.
        facts: name -> value of what else is known of these weights.
        measured: numbers of whole splits.
    """
    from huggingface_hub import ModelCardData

    is_adapter = form in ADAPTERS
    front = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else form,
        pipeline_tag="image-feature-extraction",
        tags=["vision", "visft", "lora"] if is_adapter else ["vision", "visft"],
        model_name=title if measured else None,
        eval_results=list(measured) or None,
    )
    if base is not None:
        front.base_model_relation = "adapter" if is_adapter else "finetune"
    rows = {
        "model": describe_model(model_of(backbone)),
        "base weights": base or "a file that has no name on a hub",
    }
    if adapter is not None:
        rows["adapter"] = adapter.describe()
        rows["fingerprint of the base weights"] = adapter.base or "not recorded"
        if adapter.step is not None:
            rows["steps"] = str(adapter.step)
    rows |= facts
    for result in measured:
        name = f"{result.metric_type} ({result.dataset_split}, {result.dataset_name})"
        rows[name] = f"{result.metric_value:.4f}"
    bands = backbone.bands
    if bands is not None:
        rows["mean of the bands, as shares of the range"] = ", ".join(f"{mean:.4f}" for mean in bands.mean)
        rows["standard deviation"] = ", ".join(f"{std:.4f}" for std in bands.std)
    model = 'timm.create_model("local-dir:BASE", pretrained=True)'
    model += "  # visft export --backbone FILE --format timm --out BASE"
    if isinstance(backbone, TimmBackbone) and bands is None:
        options = "".join(f"{name}={value}, " for name, value in backbone.options.items())
        source = "pretrained=True" if base else 'checkpoint_path="BASE"'
        model = f'timm.create_model("{backbone.name}", num_classes=0, {options}{source})'
    read = ", ".join(f"`{backbone.ends()[number]}`" for number in backbone.layers_read)
    reading = ""
    if len(backbone.layers_read) == 1:
        reading = f"\n\nIt was trained on what {read} gives: `{backbone.pruning}`, `forward_features`."
    elif backbone.layers_read:
        reading = f"\n\nIt was trained on what {read} give, and only these may be read: `{backbone.pruning}`."
    unmerged = ""
    on_qkv = adapter is not None and any(layer.endswith(".qkv") for layer in adapter.layers)
    # timm's model then reads the weight of a fused qkv past its layer, to add q_bias and v_bias.
    has_biases = any(getattr(module, "q_bias", None) is not None for module in backbone.modules())
    if form == "peft" and on_qkv and has_biases:
        unmerged = _UNMERGED.replace("{model}", model)
    load = FORMATS[form].snippet.replace("{model}", model)
    if bands is not None:  # the base is widened as the adapter's was
        widened = "visft merge --adapter . --scale 0 --backbone FILE --out base.safetensors"
        load = load.replace(
            "visft export --backbone FILE", f"{widened} && visft export --backbone base.safetensors"
        )
    if form == "transformers" and not isinstance(backbone, TimmBackbone):
        load = _IN_BLIP2
    cells = {name.replace("|", r"\|"): value.replace("|", r"\|") for name, value in rows.items()}
    return _TEXT.format(
        front=front.to_yaml().strip(),
        title=title,
        what=_ADAPTER if is_adapter else f"Full weights for {form} from {_METHOD}.",
        facts="\n".join(f"| {name} | {value} |" for name, value in cells.items()),
        load=load,
        unmerged=unmerged,
        reading=reading,
        cell=backbone.patch_size,
    )
