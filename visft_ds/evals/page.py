"""Pages that need nothing else: templates (`*.html.j2`, beside the modules that fill them), pictures inside."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from visft_ds.tasks.pictures import Picture

_PACKAGE = Path(__file__).parents[1]


def render(template: str, **data: object) -> str:
    """Fill a template, named by its path in the package. Texts are escaped unless it says `| safe`, as of charts."""
    environment = Environment(
        loader=FileSystemLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(data)


def embed(picture: Picture) -> str:
    """A picture as the address of itself."""
    buffer = io.BytesIO()
    # No subsampling of colour: it would blur the thin coloured frames.
    Image.fromarray(picture).save(buffer, format="JPEG", quality=82, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
