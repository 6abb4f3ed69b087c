"""Detection: boxes and their classes.

* `head` and `loss`: the asymmetric DETR of the published ViSFT heads, queries matched to objects.
* `dense`: a box from every cell of the feature map, for few photographs; head, loss and results in one file.
  `roi`: a mask for each of its boxes.
* `data`: targets of an image, the crops of DETR's recipe, and results in COCO's format.
* `config`: the keys of `visft.tasks.detection`; `spec`: the `Task`.

Targets are packed: the objects of all images one after another, and a count of each image. Names of modules
stand in exported files, and `head.PUBLISHED_NAMES` translates them to the published ones: they may not
change. Losses, each with a method, are compared with transformers' DETR
(tests/tasks/test_detection_transformers.py).
"""
