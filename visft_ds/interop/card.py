"""README.md of exported weights; its head is written by huggingface_hub, and the hub reads it.

It holds hashes, settings and numbers of whole evaluations, never folders or names of people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import built, described
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.pretrained import TIMM, HubFile, on_hub

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

{load}

The licence is that of the base weights.
"""
_PEFT = """\
import timm
from peft import PeftModel

model = {model}  # the base
{separate}model = PeftModel.from_pretrained(model, ".").eval()"""
#: timm's EVA reads `qkv.weight` past the module: without this PEFT's adapter does nothing, and nothing warns.
_SEPARATE = "for block in model.blocks:\n    block.attn.qkv_bias_separate = True\n"
_LOAD = {
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


@dataclass(frozen=True)
class Measurement:
    """Number of the evaluation of a whole split, of a task as the hub names it."""

    task: str
    name: str
    value: float
    data: str
    split: str


def repository_of(weights: str | None) -> str | None:
    """The repository on the hub of what `visft.model.weights` may be."""
    name = None if weights is None else on_hub(weights)
    return None if name is None else HubFile.parse(name).repository


def card(
    title: str,
    form: str,
    model: Mapping[str, object],
    adapter: Adapter | None,
    *,
    base: str | None,
    facts: Mapping[str, str] | None = None,
    measured: Sequence[Measurement] = (),
) -> str:
    """The text.

    Args:
        form: one of the formats of `visft merge`.
        model: as `layouts.model_of`.
        base: repository of the base weights on the hub, where it is known.
        facts: name -> value of what else is known of these weights.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=one.task,
            dataset_type="custom",
            dataset_name=one.data,
            dataset_split=one.split,
            metric_type=one.name,
            metric_value=one.value,
        )
        for one in measured
    ]
    front = ModelCardData(
        base_model=base,
        library_name=form,
        pipeline_tag="image-feature-extraction",
        tags=["vision", "visft", *(["lora"] if form == "peft" else [])],
        model_name=title if results else None,
        eval_results=results or None,
        **({} if base is None else {"base_model_relation": "adapter" if form == "peft" else "finetune"}),
    )
    rows = {"model": described(model), "base weights": base or "a file that has no name on a hub"}
    if adapter is not None:
        rows |= {"adapter": adapter.describe(), "fingerprint of the base weights": adapter.base or "not recorded"}
    rows |= dict(facts or {})
    rows |= {f"{one.name} ({one.split}, {one.data})": f"{one.value:.4f}" for one in measured}
    load = f"```python\n{_peft(adapter, base) if form == 'peft' and adapter else _LOAD[form]}\n```"
    if "layers" in model:
        load += f"\n\n{_reading(model)}"
    return _TEXT.format(
        front=front.to_yaml().strip(),
        title=title,
        what="The LoRA, without its base," if form == "peft" else f"Full weights for {form},",
        facts="\n".join(
            " | ".join(("", *(cell.replace("|", r"\|") for cell in row), "")).strip() for row in rows.items()
        ),
        load=load,
    )


def _peft(adapter: Adapter, base: str | None) -> str:
    """Python that puts a PEFT folder on top of timm's model."""
    preset = str(adapter.model["preset"])
    if not preset.startswith(TIMM):
        make, separate = 'timm.create_model("local-dir:BASE", pretrained=True)', _SEPARATE
        return "# BASE: a folder of visft merge --base FILE --format timm --out BASE\n" + _PEFT.format(
            model=make, separate=separate
        )
    name, size = preset.removeprefix(TIMM), adapter.model.get("image_size")
    given = f"img_size={size}, " if size else ""
    source = "pretrained=True" if base else 'checkpoint_path="BASE"'
    blocks = getattr(build_timm(name, device="meta"), "blocks", ())
    past = any(hasattr(getattr(block, "attn", None), "qkv_bias_separate") for block in blocks)
    make = f'timm.create_model("{name}", num_classes=0, {given}{source})'
    return _PEFT.format(model=make, separate=_SEPARATE if past else "")


def _reading(model: Mapping[str, object]) -> str:
    """Where the features are of a model that was trained up to a block."""
    backbone = built({**model, "preset": model["preset"]}) if str(model["preset"]).startswith(TIMM) else None
    if isinstance(backbone, TimmBackbone):
        return f"It was trained on what `{backbone.ends()[-1]}` gives: `{backbone.pruning}`, then `forward_features`."
    return (
        f"It was trained on what blocks {model['layers']} give, through the last norm: `model.forward_intermediates("
        f"images, indices={model['layers']}, norm=True, intermediates_only=True)`."
    )
