"""`visft merge`: adapters into base weights, or weights in the form of another library. `visft vlm`: into a
vision-language model.

cli: the flags. command: the steps. vlm: those of `visft vlm`. source: the adapter and the base weights that
a path names. The forms themselves are `visft_ds.interop.formats`. Nothing imports this room but the command
line.
"""
