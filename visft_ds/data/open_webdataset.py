"""A split as a `webdataset.WebDataset`, for those who bring a pipeline of their own.

Of WebDataset this project uses the format alone; order, resuming and damage are its own business (`data.loader`). This
is the one place that imports the library, because of what the import decides:

webdataset 1.0.2 reads the environment variable `WDS_SECURE` once, while `webdataset.utils` is imported, into
`webdataset.utils.enforce_security`; unset means insecure. In force it refuses `pipe:` URLs (shell commands), rewriting
of URLs by `GOPEN_REWRITE`, and decoding of members by pickle or `torch.load`. Without it, a member named `x.pyd` runs
code of whoever packed the shard as soon as somebody calls `.decode()`. So the variable is set before the import, and an
import that came earlier without it is an error. The security mode of the library also refuses local files in `gopen`;
`WebDataset` opens those by itself, so that local shards still work.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from visft_ds.data.manifest import Manifest
from visft_ds.names import checked_name

if "webdataset" not in sys.modules:
    os.environ["WDS_SECURE"] = "1"  # worker processes inherit it
import webdataset

_ALLOWED = ("jpg", "jpeg", "png", "json")
#: webdataset takes paths for URLs: these would be cut off or taken for something else.
_UNSAFE = re.compile(r"[?#;]|::|^[a-zA-Z][a-zA-Z0-9+.-]*:")


def open_split(manifest: Manifest, **options: Any) -> Any:
    """A `webdataset.WebDataset` over the local shards of a split, in order unless `options` say otherwise.

    Samples have `__key__`, "jpg" or "png", and "json" as bytes; `.decode("rgb8")` and the like follow as usual. With
    more than one process give `nodesplitter`, as webdataset asks for.

    Args:
        options: further arguments of `WebDataset`; `shardshuffle=False` and `empty_check=False` unless given.

    Raises:
        RuntimeError: webdataset was imported earlier, with its security off.
        ValueError: a path that webdataset would misread. While iterating: a member that is neither an image nor JSON;
            nothing of it is read.
    """
    check_secure()
    chosen = {"shardshuffle": False, "empty_check": False, **options}
    if "select_files" in chosen or "urls" in chosen:
        raise ValueError("urls and select_files are those of the split; filter samples with .select() instead")
    return webdataset.WebDataset(
        [_safe(f"{manifest.root}/{shard.name}") for shard in manifest.shards], select_files=_refuse_others, **chosen
    )


def check_secure() -> None:
    """Raise RuntimeError where webdataset runs with its security off."""
    if not webdataset.utils.enforce_security:
        raise RuntimeError(
            "webdataset was imported before with its security off: it would unpickle members and run pipe: URLs. "
            "Import visft_ds.data.open_webdataset first, or start Python with WDS_SECURE=1 in the environment"
        )


def _safe(path: str) -> str:
    if _UNSAFE.search(path):
        raise ValueError(f"webdataset would not take {path!r} for a path: rename the folder, without ? # ; :: and URL")
    return path


def _refuse_others(name: str) -> bool:
    """Return True for members that are read; raise ValueError for all that are not allowed in a shard."""
    if name.rpartition(".")[2].lower() not in _ALLOWED:
        raise ValueError(f"member {name!r} is not allowed in a shard; allowed are {', '.join(_ALLOWED)}")
    checked_name(name, "a shard", folders=True)  # whoever unpacks samples makes files of their keys
    return True
