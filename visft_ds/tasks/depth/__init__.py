"""Depth: metres of every pixel along the camera's axis, by a linear head on the maps or a DPT head.

`config` its options · `data` depth maps under a geometry · `head`, `dpt` the heads · `loss` SILog, gradients,
and relative maps · `results` depth of each pixel, metrics and drawings · `spec` the task.

Metres hold for the camera and the size of the images that a head was trained on: a training image that is
zoomed by z, compared with what evaluation shows, has its depths divided by z (Eigen et al., arXiv 1406.2283).
"""
