"""Draw method.png beside this file: what trains and what is frozen in each stage."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FROZEN = ("#e8ecf1", "#51606f")
TRAINED = ("#ffd9a8", "#8a4b00")
OUT = ("#d5ecd4", "#22602a")


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, colours: tuple[str, str]
) -> None:
    """Draw a rounded box with a text in its middle."""
    fill, ink = colours
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08", fc=fill, ec=ink
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=10)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#51606f"})


def stage(
    axes: Axes, x: float, title: str, backbone: tuple[str, str], heads: tuple[str, str], lora: str
) -> None:
    """Draw a stage: images, the backbone, three heads and their losses."""
    axes.text(x, 3.55, title, fontsize=11, weight="bold", color="#222222")
    box(axes, x, 1.2, 0.9, 1.2, "images", FROZEN)
    box(axes, x + 1.3, 0.9, 1.7, 1.8, f"backbone\n\n{lora}", backbone)
    arrow(axes, (x + 0.95, 1.8), (x + 1.25, 1.8))
    for number, name in enumerate(("detection", "segmentation", "captions")):
        y = 2.45 - 1.05 * number
        box(axes, x + 3.5, y, 1.5, 0.7, name, heads)
        arrow(axes, (x + 3.05, 1.8), (x + 3.45, y + 0.35))


def main() -> None:
    """Write the picture beside this file."""
    figure = Figure(figsize=(13, 3.3), dpi=100)
    axes = figure.subplots()
    stage(axes, 0.0, "Stage 1: heads learn", FROZEN, TRAINED, "frozen")
    stage(axes, 5.8, "Stage 2: LoRA learns through frozen heads", TRAINED, FROZEN, "LoRA trains")
    box(axes, 11.6, 0.9, 1.9, 1.8, "merged weights\nor LoRA for\ntimm, PEFT,\ntransformers,\nopen_clip", OUT)
    arrow(axes, (11.0, 1.8), (11.5, 1.8))
    axes.set_xlim(-0.1, 13.7)
    axes.set_ylim(0.1, 3.9)
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    main()
