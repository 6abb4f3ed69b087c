"""EVA-CLIP's flat files: the tower under `visual.`, the text tower under `text.`, `logit_scale`; no nesting.

Names: https://github.com/baaivision/EVA/tree/master/EVA-CLIP (EVA02_CLIP_E_psz14_plus_s9B.pt).
"""

from __future__ import annotations

from visft_ds.interop.files import WeightFile
from visft_ds.interop.layouts import LAYOUTS, Layout

LAYOUT = LAYOUTS["eva_clip"]


def export_names(file: WeightFile, layout: Layout) -> dict[str, str]:
    """Name in an EVA-CLIP file -> name in `file`, which has the given layout.

    The whole tower (class token and CLIP projection where the file has them) and what belongs to the text side. What no
    EVA-CLIP file has (heads, a language model) is left out.
    """
    names: dict[str, str] = {}
    for name in file:
        if name.startswith(layout.prefix):
            names[LAYOUT.prefix + name[len(layout.prefix) :]] = name
        elif LAYOUT.reason_to_ignore(name) is not None:
            names[name] = name
    return names
