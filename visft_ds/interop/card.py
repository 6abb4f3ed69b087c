"""README.md of exported weights; its head is written by huggingface_hub, and the hub reads it.

It holds hashes, settings and numbers of whole evaluations, never folders or names of people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import described, model_of
from visft_ds.models import Backbone
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.pretrained import HubFile, on_hub

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

README = "README.md"
_TEXT = """\
---
{front}
---

# {title}

{what} of a supervised fine-tuning ([ViSFT](https://arxiv.org/abs/2401.10222)) with visft_ds.

| | |
|---|---|
{facts}

## How to load it

```python
{load}
```{reading}

Give images whose sides are multiples of {cell} pixels. Pad others with 0 on the right and bottom, after normalisation,
as in training: libraries drop pixels beyond the last whole patch.

The licence is that of the base weights.
"""
_LOAD = {
    "peft": """\
import timm
from peft import PeftModel

model = {model}
for module in model.modules():  # else timm's EVA passes by the layers that PEFT adapts, and nothing warns
    if hasattr(module, "qkv_bias_separate"):
        module.qkv_bias_separate = True
model = PeftModel.from_pretrained(model, ".").eval()""",
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)',
    "transformers": 'from transformers import AutoModel\n\nmodel = AutoModel.from_pretrained(".")',
    "open_clip": 'import open_clip\n\nmodel = open_clip.create_model("local-dir:.")',
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
    '# features = session.run(["features"], {"images": images})[0]',
    "eva_clip": "# with EVA-CLIP's own code\nmodel, *_ = create_model_and_transforms("
    '"EVA02-CLIP-bigE-14-plus", pretrained="eva_clip.pt")',
    "lavis": "# takes the place of LAVIS' own eva_vit_g.pth, see create_eva_vit_g in lavis/models/eva_vit.py\n"
    'weights = torch.load("eva_vit_g.pth")',
}


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
    facts: Mapping[str, str] | None = None,
    measured: Sequence[EvalResult] = (),
) -> str:
    """The text.

    Args:
        form: one of the formats of `visft merge`.
        base: repository of the base weights on the hub, where it is known.
        facts: name -> value of what else is known of these weights.
        measured: numbers of whole splits.
    """
    from huggingface_hub import ModelCardData

    front = ModelCardData(
        base_model=base,
        library_name=form,
        pipeline_tag="image-feature-extraction",
        tags=["vision", "visft", *(["lora"] if form == "peft" else [])],
        model_name=title if measured else None,
        eval_results=list(measured) or None,
        **({} if base is None else {"base_model_relation": "adapter" if form == "peft" else "finetune"}),
    )
    rows = {
        "model": described(model_of(backbone)),
        "base weights": base or "a file that has no name on a hub",
    }
    if adapter is not None:
        rows |= {
            "adapter": adapter.describe(),
            "fingerprint of the base weights": adapter.base or "not recorded",
        }
    rows |= dict(facts or {})
    for one in measured:
        rows[f"{one.metric_type} ({one.dataset_split}, {one.dataset_name})"] = f"{one.metric_value:.4f}"
    model = 'timm.create_model("local-dir:BASE", pretrained=True)  # visft merge --base FILE --format timm --out BASE'
    if isinstance(backbone, TimmBackbone):
        options = "".join(f"{name}={value}, " for name, value in backbone.options.items())
        source = "pretrained=True" if base else 'checkpoint_path="BASE"'
        model = f'timm.create_model("{backbone.name}", num_classes=0, {options}{source})'
    read = ", ".join(f"`{backbone.ends()[number]}`" for number in backbone.layers_read)
    reading = f"\n\nIt was trained on what {read} gives: `{backbone.pruning}`, `forward_features`."
    if len(backbone.layers_read) > 1:
        reading = f"\n\nIt was trained on what {read} give, and only these may be read: `{backbone.pruning}`."
    return _TEXT.format(
        front=front.to_yaml().strip(),
        title=title,
        what="The LoRA, without its base," if form == "peft" else f"Full weights for {form},",
        facts="\n".join(
            "| {} | {} |".format(*(cell.replace("|", r"\|") for cell in row)) for row in rows.items()
        ),
        load=_LOAD[form].replace("{model}", model),
        reading=reading if backbone.layers_read else "",
        cell=backbone.patch_size,
    )
