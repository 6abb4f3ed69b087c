"""Head of a model card, which the hub reads; written by huggingface_hub (which timm brings along)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visft_ds.interop.files import BASE_DRAWN_AS, DRAWN_AS, PICKLE_SUFFIXES, TRAINED_ON, open_weights
from visft_ds.pretrained import PUBLISHED, HubFile

#: Entries of the header of weights that are no published ones any more.
_CHANGED = {DRAWN_AS, BASE_DRAWN_AS, TRAINED_ON, "lora", "tuned"}
#: What the hub's cache calls the folder of a repository with.
_CACHED = "models--"
#: Licences that the hub knows by timm's abbreviation end otherwise; these have a text of their own.
_OWN_TEXT = "-license"


@dataclass(frozen=True)
class Publication:
    """Publication of base weights: repository on the hub, and their licence where it is known."""

    repository: str
    licence: str | None = None


@dataclass(frozen=True)
class Measurement:
    """Number of an evaluation, of a task as the hub names it, on a split of some data."""

    task: str
    name: str
    value: float
    data: str
    split: str


#: Licences of repositories that timm does not tell.
_LICENCES = {"QuanSun/EVA-CLIP": "mit"}


def publication_of(base: Path | None, model: str | None) -> Publication | None:
    """The publication that base weights are from: that of a file in the hub's cache, or the one that a name tells.

    None for all others, and for random weights and those that training made.

    Args:
        model: name of the model of timm, whose tag names a publication; None for a tower of our own.
    """
    if base is None or not base.is_file():
        return None
    if base.suffix not in PICKLE_SUFFIXES and not _CHANGED.isdisjoint(open_weights(base).metadata):
        return None
    told = None
    if base.name in PUBLISHED:
        repository = HubFile.parse(PUBLISHED[base.name]).repository
        told = Publication(repository, _LICENCES.get(repository))
    if model is not None:
        from timm import get_pretrained_cfg

        config = get_pretrained_cfg(model) if "." in model else None
        told = Publication(config.hf_hub_id, config.license) if config is not None and config.hf_hub_id else None
    for part in base.parts:
        if part.startswith(_CACHED):
            repository = part.removeprefix(_CACHED).replace("--", "/", 1)
            return told if told and told.repository == repository else Publication(repository)
    return told


def front_matter(
    title: str,
    library: str,
    base: Publication | None,
    *,
    merged: bool,
    measured: Sequence[Measurement] = (),
) -> list[str]:
    """Lines of the head of a card. What is not known is left out; the licence is that of the base weights.

    Args:
        merged: the weights are whole, not those of an adapter alone.
    """
    from huggingface_hub import EvalResult, ModelCardData

    licence = base.licence if base else None
    own = licence if licence is not None and licence.endswith(_OWN_TEXT) else None
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
    relation = {"base_model_relation": "finetune" if merged else "adapter"} if base else {}
    data = ModelCardData(
        base_model=base.repository if base else None,
        license="other" if own else licence,
        license_name=own,
        license_link=f"https://huggingface.co/{base.repository}" if base and own else None,
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=["vision", "visft", *([] if merged else ["lora"])],
        model_name=title if results else None,
        eval_results=results or None,
        **relation,
    )
    return ["---", data.to_yaml().strip(), "---", ""]
