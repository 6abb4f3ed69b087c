"""Panoptic segmentation: each pixel belongs to one segment, a thing of its own or all of a kind of stuff.

`config` its options · `head` the plain head of `tasks/masks`, with what its masks are merged by · `results`
the segments of an image · `metrics` panoptic quality · `spec` the task. Targets, matching and losses are
those of `tasks/masks`; maps come from `data/panoptic.py`.
"""
