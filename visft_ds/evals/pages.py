"""Pages: one HTML file each that needs no network, out of templates beside this module."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from visft_ds.evals.records import Interval, number_text
from visft_ds.tasks.pictures import Picture


def render(template: str, **values: Any) -> str:
    """The text of a page; values are escaped unless the template says that they are markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"number": number_text, "interval": _interval}
    return environment.get_template(template).render(**values)


def _interval(of: Mapping[str, Any], percent: bool) -> str:
    return Interval(of["value"], of["low"], of["high"]).text(percent)


def embedded(picture: Picture, form: str = "jpeg") -> str:
    """A picture as a data URI; `png` for flat colours."""
    buffer = io.BytesIO()
    # No subsampling of colour: it would blur the thin coloured frames.
    options: dict[str, Any] = {"quality": 82, "subsampling": 0} if form == "jpeg" else {"optimize": True}
    Image.fromarray(picture).save(buffer, format=form, **options)
    return f"data:image/{form};base64,{base64.b64encode(buffer.getvalue()).decode()}"
