"""Shards -> batches: which samples a step trains on, and how they become tensors.

`shards.py` opens a split and reads a sample by its index, `fetch.py` copies remote shards, `labels.py` says
what a label holds, `decode.py` and `dataset.py` make a `RawSample` of bytes, `depth.py` and `panoptic.py`
read maps, `masks.py` writes run-length codes. `transforms.py` has the geometry that a sample's random numbers
draw, `samples.py` what goes from there to the heads, `plan.py` the order of tasks and samples, and
`loader.py` the batches of a rank, made in the processes of `workers.py`. `features.py` keeps features of a
frozen backbone; `open_webdataset.py` opens a split for pipelines of one's own.

A new data set needs no code here: write it as COCO, YOLO, captions or label maps and run `visft shards`; a
new layout goes to `shards/layouts.py`. A new kind of label needs a field in `labels.py` and `RawSample`, a
column in `INDEX_DTYPE` that says which samples have it, and a new `VERSION`. What is drawn for a sample may
depend on (seed, task, data set, epoch, index) alone, never on ranks, workers or the order of reading.
"""
