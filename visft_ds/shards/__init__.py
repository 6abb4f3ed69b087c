"""Data sets -> shards, and what keeps shards whole: building, verifying, exchanging labels.

`cli.py` is `visft shards`. `layouts.py` recognises what a folder is; `yolo.py`, `maps.py` and `tools.py` turn
the labels of their layouts into COCO's lists, `coco.py` checks COCO's files and makes one label per image of
them, and `build.py` with its `options.py` writes the shards (`archive.py`), the index and the manifest that
`data/shards.py` reads. `depth.py` and `panoptic.py` have their maps, `depth_sets.py` those of NYU and KITTI.
`division.py` splits validation off, `corrections.py` applies what a page of `visft labels` decided.
`bands.py` is about pictures that are more than colours of 8 bits. `common.py` has what the layouts share,
`permute.py` makes a control. `tars.py` indexes shards that others wrote.

A new layout is a function that returns a list of `common.FolderSplit`, and a line in `layouts.recognise`; it
never touches tars. The same input gives the same bytes: whatever changes them raises `data.shards.VERSION`.
Problems of the data are counted in `Findings` and shown, or an error with file and place; never dropped.
"""
