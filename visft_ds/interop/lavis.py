"""LAVIS (https://github.com/salesforce/LAVIS): the giant of EVA-CLIP, flat in `eva_vit_g.pth`, inside BLIP-2 models.

`lavis/models/eva_vit.py` reads the flat file by torch.load with strict=False into a pre-norm tower of 39 blocks without
final norm and head: block 39, `norm` and `head` of the file are passed over, and anything that is missing would stay
random without a word. So everything is written, in torch's own format.
"""

from __future__ import annotations

from visft_ds.interop.files import Entry, WeightFile, view
from visft_ds.interop.layouts import LAYOUTS

FILE = "eva_vit_g.pth"
_PREFIX = LAYOUTS["lavis"].prefix


def with_final_norm(file: WeightFile) -> WeightFile:
    """A BLIP-2 model of LAVIS with `ln_vision` as the tower's final norm, as transformers converts it; others as is.

    LAVIS computes that norm with eps 1e-5, transformers and this package with 1e-6.
    """
    names = {_PREFIX + f"norm.{part}": f"ln_vision.{part}" for part in ("weight", "bias")}
    if any(name in file for name in names) or not all(name in file for name in names.values()):
        return file
    kept = {name: Entry.same(file, name) for name in file if name not in names.values()}
    return view(file, kept | {name: Entry.same(file, theirs) for name, theirs in names.items()})
