"""The data layer: shards on disk, the plan of every step, reading, decoding, transforms and batches.

Import from the modules themselves (`visft_ds.data.manifest`, `.plan`, `.shards`, `.loader`, ...): tools that only pack
or check shards must not pay for importing torch.
"""
