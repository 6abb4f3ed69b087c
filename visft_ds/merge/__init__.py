"""`visft merge`: adapters into base weights, or weights in the form of another library.

cli: the flags. command: the steps. source: the adapter and the base weights that a path names. The forms
themselves are `visft_ds.interop.formats`. Nothing imports this room but the command line.
"""
