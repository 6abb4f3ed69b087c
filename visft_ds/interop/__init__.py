"""Weights in and out: weights.py reads and writes files, layouts.py knows backbones in them, export.py the formats."""
