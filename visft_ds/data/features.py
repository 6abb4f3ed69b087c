"""Kept features of a frozen backbone, so that later epochs need neither pixels nor the backbone.

A file holds the features of one image under one geometry (flip, crop and size), named by the sample's random
key, which decides the geometry. It is written whole or not at all; any number of processes may share a
folder.

Shape letters: h w patch grid, D width, P tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from visft_ds.files import reading, write_bytes, write_text
from visft_ds.ops import to_device

#: Changes when the same image, geometry and weights would give other features, or a file has another form.
VERSION = "4"


@dataclass(frozen=True)
class View:
    """An image under a geometry that repeats after some epochs (`visft.features.views`)."""

    frame: tuple[int, int]  #: height and width in pixels, padding included
    #: bfloat16, a map (h, w, D) of each block that is read, then the tokens (P, D) in front of them, if there
    #: are any; None: they are not kept yet
    features: tuple[Tensor, ...] | None = None

    def to(self, device: torch.device) -> View:
        """The same with its features on `device`."""
        if self.features is None:
            return self
        return View(self.frame, tuple(to_device(tensor, device) for tensor in self.features))


class FeatureCache:
    """Features by random key. All features are rounded to bfloat16, kept or not, so that keeping them changes
    nothing.

    In `root`, which may be None to keep nothing, each `identity` has a folder of its own: everything that the
    features depend on besides the key, by name.
    """

    def __init__(self, root: Path | None, identity: Mapping[str, str]) -> None:
        self.folder: Path | None = None
        if root is not None:
            text = json.dumps({"version": VERSION, **identity}, indent=2, sort_keys=True)
            digest = sha256(text.encode()).hexdigest()
            self.folder = root / digest[:16]
            write_text(self.folder / "identity.json", text)  # for people

    def get(self, key: int, index: int) -> View | None:
        """The view of sample `index` with this key; None if its features are not kept.

        Raises:
            ValueError: a damaged file, or one of another sample.
        """
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        with reading(path, "kept features (delete it: they are computed again)"):
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata()
                names = sorted(file.keys(), key=int)
                features = tuple(file.get_tensor(name) for name in names)
            if metadata["index"] != str(index):
                raise ValueError(f"it is of sample {metadata['index']}, not of sample {index}")
            if any(tensor.dtype != torch.bfloat16 for tensor in features):
                raise ValueError("its numbers are not bfloat16")
            height = int(metadata["height"])
            width = int(metadata["width"])
            return View((height, width), features)

    def put(self, key: int, index: int, frame: tuple[int, int], features: Sequence[Tensor]) -> None:
        """Keep the features of a view. Raises OSError if they cannot be written."""
        path = self._path(key)
        if path is not None and not path.exists():
            height, width = frame
            metadata = {"index": str(index), "height": str(height), "width": str(width)}
            tensors = {str(number): tensor.cpu().contiguous() for number, tensor in enumerate(features)}
            write_bytes(path, safetensors.torch.save(tensors, metadata))

    def _path(self, key: int) -> Path | None:
        """File of the features of this key, in one of 256 folders."""
        if self.folder is None:
            return None
        name = f"{key:016x}.safetensors"
        digest = sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / name
