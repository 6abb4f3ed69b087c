"""Instance segmentation: a fixed set of masks with classes, by Mask2Former on one feature map or by the plain
head.

`config` its options · `pixel_decoder`, `head` Mask2Former · `results` predictions in COCO's format · `spec`
the task. Targets, matching, losses and the plain head are those of `tasks/masks`.

Names of modules stand in exported files, and `head.PUBLISHED_NAMES` translates them to the published ones:
they stay. The defaults of the options are the published ones (tests/test_ds_configs.py). A parameter is used
only in the forward of the module that owns it, for ZeRO-3.
"""
