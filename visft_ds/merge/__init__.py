"""`visft merge`: adapters into base weights, or into their mean. `visft vlm`: into a vision-language model.

cli: the flags. command: the steps, also of the weights that `visft export` writes for other libraries. vlm:
those of `visft vlm`. source: the adapter and the base weights that a path names. The forms themselves are
`visft_ds.interop.formats`.
"""
