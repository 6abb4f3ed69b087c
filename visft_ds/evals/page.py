"""Pieces of a page that needs nothing else: HTML text, pictures inside it, and its style."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping

from PIL import Image

from visft_ds.tasks.pictures import Picture


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML already."""
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


def section(title: str, body: str) -> str:
    """A box with a heading; `body` is HTML already."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def table(title: str, rows: Mapping[str, str], *, code: bool = False) -> str:
    """A section of names and values, empty without any."""
    if not rows:
        return ""
    tag = "code" if code else "span"
    escaped = [(html.escape(name), html.escape(value)) for name, value in rows.items()]
    shown = "".join(f"<tr><th>{name}</th><td><{tag}>{value}</{tag}></td></tr>" for name, value in escaped)
    return section(title, f"<table class=plain>{shown}</table>")


def embed(picture: Picture) -> str:
    """A picture as the address of itself."""
    buffer = io.BytesIO()
    # No subsampling of colour: it would blur the thin coloured frames.
    Image.fromarray(picture).save(buffer, format="JPEG", quality=82, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f4f5f6; color: #25272a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 60px; }
header, section { background: #fff; border: 1px solid #e3e4e6; border-radius: 10px;
  padding: 18px 24px; margin: 16px 0; }
h1 { font-size: 25px; margin: 4px 0 8px; } h2 { font-size: 18px; margin: 2px 0 12px; } p, ul { margin: 8px 0; }
h3 { font-size: 15px; margin: 2px 0 8px; color: #55585c; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid #eceded; vertical-align: top; }
th { font-weight: 600; } thead th { color: #55585c; } td { overflow-wrap: anywhere; }
small, .faint { color: #74777b; font-weight: 400; font-size: 13px; } small { margin-left: 6px; }
.numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; }
.main th, .main td { background: #f4f7fb; font-weight: 600; } tbody + tbody { border-top: 14px solid #fff; }
.up { color: #1d7a33; } .down { color: #b3261e; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; margin-top: 14px; }
.card { background: #f4f7fb; border-radius: 8px; padding: 10px 18px; }
.card b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.card span { display: block; color: #55585c; }
.pictures { display: grid; gap: 8px; align-items: start; }
.pictures img { width: 100%; display: block; border-radius: 4px; }
.label { font-weight: 600; color: #55585c; }
.charts { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; flex: 1 1 320px; }
figure svg { width: 100%; height: auto; }
.bars th { width: 130px; font-weight: 400; vertical-align: middle; }
.bar { display: flex; align-items: center; gap: 8px; height: 16px; }
.bar i { height: 11px; border-radius: 2px; min-width: 1px; }
.bar span { font-size: 12px; color: #55585c; font-variant-numeric: tabular-nums; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 8px 36px; }
.plain th { width: 260px; font-weight: 400; }
.key { margin-right: 18px; }
.key i { display: inline-block; width: 22px; height: 10px; border-radius: 2px; margin-right: 6px; }
pre { background: #f4f5f6; border-radius: 6px; padding: 10px 14px; overflow-x: auto; white-space: pre-wrap; }
code, pre { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { header, section { break-inside: avoid; border: 0; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""
