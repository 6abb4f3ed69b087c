"""`visft export`: a whole model in one file that runs without this package. Weights for other libraries are
written by `merge.command`.

cli: the flags. command: the steps, from a run to a folder. graph: pictures of any size to the maps of a
backbone and the answer of a head, as a module of tensors alone. answers: what heads predict, decoded in the
pixels of the pictures. verify: the file beside our own predictions. eight_bits: int8. readme, page: the
page of a folder, and the one that runs it in a browser.

`predict.exported` reads a folder back. Nothing imports this room but the command line. A new kind of head is
a function in `answers` and an entry in its `ANSWERS`.
"""
