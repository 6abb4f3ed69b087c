"""A model of ours in another library: its features as a map, and the code that a README gives for loading
it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from visft_ds.interop.card import README


def as_map(features: Tensor, like: Tensor) -> Tensor:
    """timm's features as a map of that size, without the tokens in front."""
    rows, columns = like.shape[-2:]
    return features if features.ndim == 4 else features[:, -rows * columns :].mT.unflatten(2, (rows, columns))


def run_readme(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *change: str, piece: int = 0, **names: Any
) -> dict[str, Any]:
    """The names after a piece of the code of a README has run in its folder; `change`: a word in it, and what
    to put there.
    """
    pieces = re.findall(
        r"```python\n(.*?)```", (folder / README).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    code = pieces[piece]
    monkeypatch.chdir(folder)
    exec(compile(code.replace(*change) if change else code, README, "exec"), names)
    return names
