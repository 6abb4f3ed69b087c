"""A split as a `webdataset.WebDataset`, for pipelines of your own.

While it is imported, webdataset reads whether `.decode()` may unpickle members and `pipe:` URLs may run
commands.
"""

from __future__ import annotations

import os
from typing import Any

from visft_ds.data.shards import Manifest

os.environ["WDS_SECURE"] = "1"
import webdataset

__all__ = ["open_split", "webdataset"]


def open_split(manifest: Manifest, **options: Any) -> Any:
    """A `webdataset.WebDataset` over the shards of a local split, in order unless `options` say otherwise.

    Samples have `__key__`, the image under its extension, and "json". With more than one process give
    `nodesplitter`. Raises RuntimeError if webdataset was imported earlier with its security off.
    """
    if not webdataset.utils.enforce_security:
        raise RuntimeError(
            "webdataset was imported with its security off: import visft_ds.data.open_webdataset first"
        )
    paths = [manifest.address(shard.name) for shard in manifest.shards]
    return webdataset.WebDataset(paths, **{"shardshuffle": False, "empty_check": False, **options})
