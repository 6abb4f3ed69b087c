"""Answers of a vision-language model in which the tower of each judged model stands in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.judge import record_in, run
from tests.merge.test_vlm import blip2
from tests.random_tower import adapter_of, move_adapters, random_tower, save_adapter, save_backbone
from visft_ds.evals.judge import vqa
from visft_ds.interop.layouts import fingerprint_of, load_backbone, model_in, open_model, tower_in, whole
from visft_ds.interop.vlm import Vlm
from visft_ds.models.lora import inject_lora
from visft_ds.toy.coco import write_toy_coco

WORDS = ["<image>", "<pad>", "</s>", "<unk>", *(f"word{number}" for number in range(4, 96))]


def _save_processor(folder: Path) -> None:
    """A tokenizer of whole words, of which the first stands for the image, and an image processor."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    images = transformers.BlipImageProcessor(size={"height": 28, "width": 28})
    transformers.Blip2Processor(images, fast, num_query_tokens=4).save_pretrained(folder)


@pytest.mark.slow
def test_the_tower_of_each_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By transformers' own model with that tower; a model around another tower is refused beforehand."""
    torch.manual_seed(0)
    write_toy_coco(tmp_path / "toy", train=6, val=4, height=28, width=28)
    ours = random_tower(depth=2, post_norm=False)
    base = tmp_path / "base.safetensors"
    save_backbone(ours, base)
    file = open_model(base)
    model = whole(model_in(file), file)
    vlm = blip2(image_token_index=0)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():  # so that words depend on the image
            if parameter.ndim > 1 and not name.startswith("vision_model."):
                parameter.normal_(std=0.7)
    vlm.save_pretrained(tmp_path / "other")
    inside = Vlm.of(vlm)
    backbone = load_backbone(base, model)
    inside.put(inside.names(tower_in(file, backbone), backbone))
    vlm.save_pretrained(tmp_path / "vlm")
    for folder in ("vlm", "other"):
        _save_processor(tmp_path / folder)
    inject_lora(ours, rank=3, alpha=1.5)
    move_adapters(ours, spread=3.0)
    save_adapter(adapter_of(ours, fingerprint_of(ours, base)), tmp_path / "adapter")

    said: list[str] = []

    def keep(answer: str, truths: Any) -> float:
        said.append(answer)
        return float(len(answer))

    monkeypatch.setattr(vqa, "accuracy", keep)
    models = [f"base={base}", f"tuned={base}+{tmp_path}/adapter"]
    words = ["--primary", "vqa/toy VLM answers", "--layers", "last", "--quick"]
    on = f"vqa={tmp_path}/toy,vlm={tmp_path}/vlm"
    captions = f"caption={tmp_path}/toy,vlm={tmp_path}/vlm"
    status, _, errors = run(*models, "--on", on, "--on", captions, *words, "--out", tmp_path / "out")
    assert status == 0, errors
    questions = json.loads((tmp_path / "toy/questions/OpenEnded_toy_val2017_questions.json").read_bytes())
    count = len(questions["questions"])
    row, of_captions = record_in(tmp_path / "out")["rows"]
    assert of_captions["name"] == "caption/toy CIDEr-D" and of_captions["items"] == 4
    assert row["items"] == count and len(said) == 2 * count and said[:count] != said[count:]
    assert all("Question" not in answer and "<" not in answer for answer in said) and any(said)
    on = on.replace("/vlm", "/other")
    status, _, errors = run(*models, "--on", on, *words, "--out", tmp_path / "two")
    assert status == 2 and "this model's tower differs" in errors
