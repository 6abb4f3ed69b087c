"""EVA-CLIP's flat files: the tower under `visual.`, the text tower under `text.`, `logit_scale`; no nesting.

Names: https://github.com/baaivision/EVA/tree/master/EVA-CLIP (EVA02_CLIP_E_psz14_plus_s9B.pt). Its own code
(rei/eva_clip/factory.py) reads by torch.load and with strict=False: what a file lacks stays random without a word.
"""

from __future__ import annotations

from collections.abc import Iterable

from visft_ds.interop.files import Entry, WeightFile
from visft_ds.interop.layouts import LAYOUTS, Layout

LAYOUT = LAYOUTS["eva_clip"]


def export_entries(file: WeightFile, layout: Layout, target: Layout = LAYOUT) -> dict[str, Entry]:
    """Name in an EVA-CLIP file (or another `target` with its text side) -> what it is made of in `file`.

    The whole tower of `file`, which has the given layout (class token and CLIP projection where it has them), and what
    belongs to the text side. What no EVA-CLIP file has (heads, a language model) is left out.
    """
    entries: dict[str, Entry] = {}
    for name in file:
        if name.startswith(layout.prefix):
            entries[target.prefix + name[len(layout.prefix) :]] = Entry.same(file, name)
        elif target.reason_to_ignore(name) is not None:
            entries[name] = Entry.same(file, name)
    return entries


def missing_parts(names: Iterable[str], prefix: str = LAYOUT.prefix) -> list[str]:
    """Parts of a whole model that a file with these names, tower under `prefix`, lacks."""
    given = set(names)
    wanted = {
        "class token": (prefix + "cls_token",),
        "CLIP projection": (prefix + "head.weight",),
        "text tower": ("text.token_embedding.weight", "token_embedding.weight"),
        "logit scale": ("logit_scale",),
    }
    return [part for part, anchors in wanted.items() if given.isdisjoint(anchors)]
