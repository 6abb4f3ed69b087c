"""Weights in and out: one file per foreign format; files.py, layouts.py and adapter.py are what they share.

`load_heads` and `save_heads` are here by name. They are imported when they are first asked for: the heads bring all
tasks with them, which most users of this package do not need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visft_ds.interop.heads import load_heads, save_heads

__all__ = ["load_heads", "save_heads"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import visft_ds.interop.heads

    return getattr(visft_ds.interop.heads, name)
