"""Semantic segmentation: a class for every pixel, by a linear head on the maps or by the plain head.

`config` its options · `head` the linear head and its loss · `results` the class of each pixel, also from
windows, mean IoU, drawings · `spec` the task. Targets are the masks of `tasks/masks`, one for each class of
an image; the plain head and its loss are there, too.

Windows are cut and merged as in EoMT's and PMT's code (tests/tasks/test_semantic.py holds them against it).
Labels beyond a class (`classes.VOID`) count nowhere. Names of the head's modules stand in exported files.
"""
