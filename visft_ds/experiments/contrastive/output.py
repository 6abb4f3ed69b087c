"""Output of a training beside the weights: record, model card; the folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from visft_ds.experiments.contrastive.fitting import ContrastiveRecipe, Curve
from visft_ds.interop.card import fact_table
from visft_ds.interop.open_clip import CONFIG, FILE
from visft_ds.interop.writing import refuse_existing, write_atomically, write_text
from visft_ds.monitor.metrics import versions

RECORD, CARD = "contrast.json", "README.md"
FORMAT, VERSION = "visft_ds contrastive training", 1
_WHAT = {
    "pretrain": "A small CLIP, trained from random weights by visft_ds on image-text pairs: a vision tower of "
    "EVA-CLIP's architecture and a text transformer.",
    "text": "A CLIP whose text side was fine-tuned on image-text pairs by visft_ds. Its vision tower is that of the "
    "model it was made from, bit for bit.",
}


@dataclass(frozen=True)
class Result:
    """Result of a training."""

    kind: str  #: "pretrain" or "text"
    recipe: ContrastiveRecipe
    curve: Curve
    recalls: Mapping[str, Mapping[str, float]]  #: "before", "after" -> numbers; those of a set that was not learnt from
    seconds: float


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, which becomes `out` where the block ends well, and is removed where not.

    Raises ValueError where `out` exists.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    stage.mkdir()
    try:
        yield stage
        refuse_existing(out)
        stage.replace(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_result(
    folder: Path,
    title: str,
    result: Result,
    facts: Mapping[str, str],
    configs: Sequence[str],
    source: str | None = None,
) -> None:
    """Write the record and the model card.

    Args:
        facts: what it was made of and how, name -> value, without folders.
        configs: files beside the weights, by which open_clip builds the model; empty where it cannot alone.
        source: sha256 of the file it was made from.
    """
    record = {
        "format": FORMAT,
        "version": VERSION,
        "kind": result.kind,
        "recipe": asdict(result.recipe),
        "facts": dict(facts),
        "source_sha256": source,
        "losses": list(result.curve.losses),
        "gradient_norms": list(result.curve.norms),
        "recall": {when: dict(numbers) for when, numbers in result.recalls.items() if numbers},
        "seconds": round(result.seconds, 3),
        "versions": versions(),
    }
    content = orjson.dumps(record, option=orjson.OPT_INDENT_2)
    write_atomically(folder / RECORD, lambda file: file.write(content))
    write_text(folder / CARD, _card(title, result, facts, configs, source))


def _card(title: str, result: Result, facts: Mapping[str, str], configs: Sequence[str], source: str | None) -> str:
    recipe, losses = result.recipe, result.curve.losses
    trained = {
        **facts,
        "steps": f"{recipe.steps} of {recipe.batch_size} pairs",
        "optimiser": f"AdamW, learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}",
        "seed": str(recipe.seed),
        **({"sha256 of the file it was made from": source} if source else {}),
    }
    tenth = max(1, len(losses) // 10)
    measured = {
        "loss, mean of the first and of the last tenth of the steps": f"{sum(losses[:tenth]) / tenth:.3f}, "
        f"{sum(losses[-tenth:]) / tenth:.3f}"
    }
    for name in result.recalls.get("after", {}):
        old, new = (100 * result.recalls[when][name] for when in ("before", "after"))
        measured[f"{name}, before and after"] = f"{old:.1f} %, {new:.1f} %"
    load = [
        "```python",
        "import open_clip",
        "",
        'model = open_clip.create_model("local-dir:FOLDER")  # this folder',
        "```",
    ]
    if CONFIG not in configs:
        load = [f"`{FILE}` has open_clip's names; the configuration is that of the model it was made from."]
    elif "config.json" in configs:
        load += [
            "",
            f"`{CONFIG}` names the folder of `config.json`, from which timm builds the vision tower: change it",
            "where the folder has moved.",
        ]
    return "\n".join(
        [
            *("---", "library_name: open_clip", "tags: [clip, visft]", "---", ""),
            *(f"# {title}", "", _WHAT[result.kind], ""),
            *fact_table("How it was trained", trained, ""),
            *fact_table("Measured", measured, ""),
            *("## How to load it", "", *load, ""),
            f"visft_ds: `visft train --set visft.model.weights={FILE}`, `visft evaluate benchmarks --model {FILE}`.",
            "",
        ]
    )
