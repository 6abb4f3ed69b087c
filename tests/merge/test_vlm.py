"""A trained tower inside BLIP-2 and LLaVA: the same features, told what it does not read, refused where it
must be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.random_tower import (
    adapter_of,
    merge,
    move_adapters,
    random_tower,
    relative,
    save_adapter,
    save_backbone,
)
from tests.small_timm import adapted, random_base
from visft_ds.interop.layouts import fingerprint_of, load_backbone, model_in, open_model, tower_in, whole
from visft_ds.interop.vlm import Vlm
from visft_ds.merge.cli import vlm
from visft_ds.models.lora import inject_lora

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {"vocab_size": 96, "max_position_embeddings": 64}


def blip2(image_size: int = 28, image_token_index: int = 90) -> Any:
    """A random model of two layers in each part."""
    text = {**SIZES, **TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "model_type": "opt"}
    config = transformers.Blip2Config(
        vision_config={**SIZES, "image_size": image_size},
        qformer_config={**SIZES, "vocab_size": 64, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_index=image_token_index,
    )
    return transformers.Blip2ForConditionalGeneration(config).eval()


def test_a_tower_in_blip2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three blocks BLIP-2 reads two, by a norm of its own: training that read the third is told so."""
    ours = random_tower(depth=3, post_norm=False)
    base = tmp_path / "base.safetensors"
    save_backbone(ours, base)
    file = open_model(base)
    model = whole(model_in(file), file)
    theirs = blip2()
    inside = Vlm.of(theirs)
    backbone = load_backbone(base, model)
    inside.put(inside.names(tower_in(file, backbone), backbone))
    theirs.half().save_pretrained(tmp_path / "blip2")

    inject_lora(ours, rank=3, alpha=1.5)
    move_adapters(ours)
    adapter = save_adapter(adapter_of(ours, fingerprint_of(ours, base)), tmp_path / "adapter")
    words = [str(adapter), "--backbone", str(base)]
    assert vlm([str(tmp_path / "blip2"), *words, "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr()
    assert "2 blocks of vision; reads all tokens, by its own post_layernorm of block 1" in printed.out
    assert (
        "training read block 2, this model reads block 1; what blocks behind 1 learnt is lost" in printed.err
    )
    assert "visft.model.out_indices=[1]" in printed.err

    swapped = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "new").float().eval()
    vision = swapped.vision_model
    assert torch.equal(vision.post_layernorm.weight, theirs.vision_model.post_layernorm.weight.float())
    vision.post_layernorm = ours.norm
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ours.blocks = ours.blocks[:2]
    ours.depth = 2
    with torch.no_grad():  # 3e-4 is what fp16 rounds of the weights
        assert relative(vision(pixel_values=images).last_hidden_state, ours.tokens(images)[0]) < 3e-3

    with torch.no_grad():
        theirs.vision_model.encoder.layers[0].mlp.fc1.weight[0] += 0.1
    theirs.save_pretrained(tmp_path / "tuned")
    blip2(56).save_pretrained(tmp_path / "larger")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("tuned", "encoder.layers.0.mlp.fc1.weight of this model's tower differs by"),
        ("larger", "embeddings.position_embedding is (1, 5, 32), not (1, 17, 32)"),
        ("empty", "no folder of transformers with config.json"),
    ):
        assert vlm([str(tmp_path / folder), *words]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "layer", "tokens", "reads"),
    [
        ("vit_test_patch8_clip_quickgelu_32", -2, "default", "all tokens but the first of block 0"),
        pytest.param(
            *("vit_test_patch8_siglip_gap_32", -1, "full", "all tokens of block 1"), marks=pytest.mark.slow
        ),
        ("vit_test_plus_patch8_dinov3_qkvb", -1, "full", "all tokens of block 1"),
    ],
)
def test_a_tower_in_llava(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, layer: int, tokens: str, reads: str
) -> None:
    """As if LLaVA had been built around transformers' own model of the merged weights."""
    base = random_base(name, tmp_path)
    _, adapter = adapted(name, base)
    folders = [
        merge(base, of, tmp_path / word, "--format", "transformers")
        for of, word in ((adapter.scaled(0), "plain"), (adapter, "merged"))
    ]
    plain, merged = (transformers.AutoModel.from_pretrained(folder).eval() for folder in folders)
    config = transformers.LlavaConfig(
        vision_config=plain.config.to_dict(),
        text_config=transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2).to_dict(),
        image_token_index=90,
        vision_feature_layer=layer,
        vision_feature_select_strategy=tokens,
    )
    llava = transformers.LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(plain.state_dict())
    llava.save_pretrained(tmp_path / "llava")
    (tmp_path / "llava/tokenizer.json").write_text("{}")
    words = [str(tmp_path / "llava"), f"{tmp_path}/merged-adapter", "--backbone", str(base)]
    capsys.readouterr()
    assert vlm([*words, "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr()
    assert reads in printed.out and ("reads block 0" in printed.err) == (layer == -2)
    swapped = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "new").eval()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = llava.get_image_features(images).pooler_output[0]
        after = swapped.get_image_features(images).pooler_output[0]
        llava.model.vision_tower = merged
        expected = llava.get_image_features(images).pooler_output[0]
    assert relative(after, expected) < 1e-5 < 1e-2 < relative(before, expected)
    assert (tmp_path / "new/tokenizer.json").is_file()
