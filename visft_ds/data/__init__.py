"""The data layer: shards on disk, the plan of every step, reading, decoding, transforms and batches."""
