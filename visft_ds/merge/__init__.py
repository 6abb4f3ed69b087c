"""`visft merge`: adapters into base weights, out of them, and weights in the formats of other libraries.

cli: the flags. command: what they ask for. source: the adapter and the base weights that a path names. Formats and
names of other libraries are `visft_ds.interop`'s; nothing imports this room but the command line.
"""
