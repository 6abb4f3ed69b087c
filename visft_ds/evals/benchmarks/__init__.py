"""Out-of-domain benchmarks: what a backbone knows about images that it was not fine-tuned on.

A benchmark is one small file: it says which images and texts are encoded, and turns their features into scores
(`scores.Benchmark`). What features cost is paid once for each model and data set (`cache`, `encoding`), and
every difference between two models is taken item by item (`bootstrap`, `table`).
"""
