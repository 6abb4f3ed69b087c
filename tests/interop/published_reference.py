"""State dicts with the names and shapes of the published code, built from PyTorch's own layers.

Nothing here knows the reader or the writer of such files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

WIDTH = 12
#: Sizes as published; the number of words and the width of the features are all that differs between files.
OPTIONS: dict[str, dict[str, int]] = {
    "detection": {
        "num_classes": 91,
        "num_queries": 100,
        "encoder_dim": 128,
        "decoder_dim": 256,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "ffn_dim": 1024,
    },
    "segmentation": {
        "num_classes": 80,
        "num_queries": 100,
        "hidden_dim": 256,
        "encoder_layers": 6,
        "decoder_layers": 9,
        "n_points": 4,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 1024,
    },
    "captioning": {"vocabulary_size": 13, "attention_dim": 384, "embed_dim": 384, "decoder_dim": 384},
}
#: Our names -> published ones, behind `visft_heads.`; the first beginning that fits counts, {n} is a layer.
NAMES: dict[str, dict[str, str]] = {
    "detection": {
        "input_proj.": "input_proj.",
        "task_embed.": "transformer.task_embeddings_enc.",
        "encoder.": "transformer.encoder.",
        "memory_proj.": "transformer.enc2dec_proj.",
        "position_proj.": "transformer.pos_embed_proj.",
        "decoder.": "transformer.decoders.detection.detection_coco.",
        "query_embed.": "query_embeds.detection.detection_coco.",
        "class_embed.": "class_embeds.",
        "box_embed.": "bbox_embeds.",
    },
    "segmentation": {
        "pixel_decoder.input_proj.": "segment_pixel_decoder.input_proj.0.0.",
        "pixel_decoder.input_norm.": "segment_pixel_decoder.input_proj.0.1.",
        "pixel_decoder.level_embed.weight": "segment_pixel_decoder.transformer.level_embed",
        "pixel_decoder.layers.": "segment_pixel_decoder.transformer.encoder.layers.",
        "pixel_decoder.lateral_proj.": "segment_pixel_decoder.adapter_1.",
        "pixel_decoder.lateral_norm.": "segment_pixel_decoder.adapter_1.norm.",
        "pixel_decoder.output_conv.": "segment_pixel_decoder.layer_1.",
        "pixel_decoder.output_norm.": "segment_pixel_decoder.layer_1.norm.",
        "pixel_decoder.mask_proj.": "segment_pixel_decoder.mask_features.",
        "decoder.query_feat.": "segment_predictor.query_feat.",
        "decoder.query_pos.": "segment_predictor.query_embed.",
        "decoder.level_embed.": "segment_predictor.level_embed.",
        "decoder.layers.{n}.cross_attn.": "segment_predictor.transformer_cross_attention_layers.{n}.multihead_attn.",
        "decoder.layers.{n}.norm1.": "segment_predictor.transformer_cross_attention_layers.{n}.norm.",
        "decoder.layers.{n}.self_attn.": "segment_predictor.transformer_self_attention_layers.{n}.self_attn.",
        "decoder.layers.{n}.norm2.": "segment_predictor.transformer_self_attention_layers.{n}.norm.",
        "decoder.layers.{n}.linear1.": "segment_predictor.transformer_ffn_layers.{n}.linear1.",
        "decoder.layers.{n}.linear2.": "segment_predictor.transformer_ffn_layers.{n}.linear2.",
        "decoder.layers.{n}.norm3.": "segment_predictor.transformer_ffn_layers.{n}.norm.",
        "decoder.norm.": "segment_predictor.decoder_norm.",
        "decoder.class_embed.": "segment_predictor.class_embed.",
        "decoder.mask_embed.": "segment_predictor.mask_embed.",
    },
}


def _group(**children: nn.Module | nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def _mlp(width: int, out: int) -> nn.Module:
    return _group(layers=nn.ModuleList(nn.Linear(width, size) for size in (width, width, out)))


def _detection(width: int, o: Mapping[str, int]) -> dict[str, nn.Module]:
    inner, outer = o["encoder_dim"], o["decoder_dim"]
    encoder = [nn.TransformerEncoderLayer(inner, 8, o["ffn_dim"]) for _ in range(o["encoder_layers"])]
    decoder = [nn.TransformerDecoderLayer(outer, 8, o["ffn_dim"]) for _ in range(o["decoder_layers"])]
    decoders = _group(layers=nn.ModuleList(decoder), norm=nn.LayerNorm(outer))
    transformer = _group(
        encoder=_group(layers=nn.ModuleList(encoder)),
        enc2dec_proj=nn.Linear(inner, outer),
        pos_embed_proj=nn.Linear(inner, outer),
        decoders=_group(detection=_group(detection_coco=decoders)),
        task_embeddings_enc=nn.Embedding(256, inner),
    )
    return {
        "transformer": transformer,
        "query_embeds": _group(detection=_group(detection_coco=nn.Embedding(o["num_queries"], outer))),
        "input_proj": nn.Conv2d(width, inner, 1),
        "class_embeds": nn.Linear(outer, o["num_classes"] + 1),
        "bbox_embeds": _mlp(outer, 4),
    }


def _captioning(width: int, o: Mapping[str, int]) -> dict[str, nn.Module]:
    attention, state = o["attention_dim"], o["decoder_dim"]
    decoder = _group(
        attention=_group(
            encoder_att=nn.Linear(width, attention),
            decoder_att=nn.Linear(state, attention),
            full_att=nn.Linear(attention, 1),
        ),
        embedding=nn.Embedding(o["vocabulary_size"], o["embed_dim"]),
        decode_step=nn.LSTMCell(o["embed_dim"] + width, state),
        init_h=nn.Linear(width, state),
        init_c=nn.Linear(width, state),
        f_beta=nn.Linear(state, width),
        fc=nn.Linear(state, o["vocabulary_size"]),
    )
    return {"caption_decoder": decoder}


def _segmentation(width: int, o: Mapping[str, int]) -> dict[str, nn.Module]:
    dim, rows = o["hidden_dim"], 8 * o["n_points"]

    def normed(conv: nn.Conv2d) -> nn.Conv2d:
        conv.norm = nn.GroupNorm(32, dim)
        return conv

    def pixel_layer() -> nn.Module:
        return _group(
            self_attn=_group(
                sampling_offsets=nn.Linear(dim, 2 * rows),
                attention_weights=nn.Linear(dim, rows),
                value_proj=nn.Linear(dim, dim),
                output_proj=nn.Linear(dim, dim),
            ),
            norm1=nn.LayerNorm(dim),
            linear1=nn.Linear(dim, o["encoder_ffn_dim"]),
            linear2=nn.Linear(o["encoder_ffn_dim"], dim),
            norm2=nn.LayerNorm(dim),
        )

    pixel = _group(
        input_proj=nn.ModuleList([nn.Sequential(nn.Conv2d(width, dim, 1), nn.GroupNorm(32, dim))]),
        transformer=_group(
            level_embed=nn.Parameter(torch.randn(1, dim)),
            encoder=_group(layers=nn.ModuleList(pixel_layer() for _ in range(o["encoder_layers"]))),
        ),
        mask_features=nn.Conv2d(dim, dim, 1),
        adapter_1=normed(nn.Conv2d(width, dim, 1, bias=False)),
        layer_1=normed(nn.Conv2d(dim, dim, 3, bias=False)),
    )

    def layers(make: Callable[[], Mapping[str, nn.Module]]) -> nn.ModuleList:
        return nn.ModuleList(_group(**make(), norm=nn.LayerNorm(dim)) for _ in range(o["decoder_layers"]))

    ffn = o["decoder_ffn_dim"]
    predictor = _group(
        transformer_self_attention_layers=layers(lambda: {"self_attn": nn.MultiheadAttention(dim, 8)}),
        transformer_cross_attention_layers=layers(lambda: {"multihead_attn": nn.MultiheadAttention(dim, 8)}),
        transformer_ffn_layers=layers(
            lambda: {"linear1": nn.Linear(dim, ffn), "linear2": nn.Linear(ffn, dim)}
        ),
        decoder_norm=nn.LayerNorm(dim),
        query_feat=nn.Embedding(o["num_queries"], dim),
        query_embed=nn.Embedding(o["num_queries"], dim),
        level_embed=nn.Embedding(1, dim),
        class_embed=nn.Linear(dim, o["num_classes"] + 1),
        mask_embed=_mlp(dim, dim),
    )
    head = _group(pixel_decoder=pixel, predictor=predictor)
    return {"segment_pixel_decoder": pixel, "segment_predictor": predictor, "segment_head": head}


PARTS = {"detection": _detection, "segmentation": _segmentation, "captioning": _captioning}


def reference(width: int, options: Mapping[str, Mapping[str, int]]) -> dict[str, Tensor]:
    """State dict of the reference's model with these heads, values far from where they start."""
    parts: dict[str, nn.Module | nn.Parameter] = {}
    for task, sizes in options.items():
        parts |= PARTS[task](width, sizes)
    state = _group(visft_heads=_group(**parts)).state_dict()
    return {
        name: value + 0.1 * torch.randn_like(value) if value.ndim == 1 else value
        for name, value in state.items()
    }


def aliased(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Second names stand for the same tensors again, after the values were changed."""
    pairs = (
        ("segment_head.pixel_decoder.", "segment_pixel_decoder."),
        ("segment_head.predictor.", "segment_predictor."),
    )
    for short, long in pairs:
        state |= {name: state[name.replace(short, long)] for name in state if short in name}
    return state
