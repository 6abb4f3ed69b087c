"""Weights in and out: weights.py reads and writes files, layouts.py knows backbones in them, export.py the
formats.
"""

#: Format -> file of weights in its folder; an adapter has two.
FORMATS = {
    "eva_clip": "eva_clip.pt",
    "lavis": "eva_vit_g.pth",
    "onnx": "model.onnx",
    "open_clip": "open_clip_model.safetensors",
    "peft": "",
    "timm": "model.safetensors",
    "transformers": "model.safetensors",
}
