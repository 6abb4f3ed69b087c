"""`visft labels`: the labels of a data set that the heads of a run deny, on a page to decide on them.

`doubts` ranks labels of boxes and regions of label maps, `captions` captions; near duplicates are found by
`predict.likeness`. `command` does it for the splits of a run and writes the page (`page.html.j2`), whose
corrections `visft shards --corrections` applies (`shards/corrections.py`). A new kind of doubt is a line of
`doubts.KINDS` and a function that gives such doubts.
"""
