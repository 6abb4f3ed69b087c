"""Types of settings that every room may import: fields with their bounds, and what all tasks set.

fields: `StrictModel`, the numbers and texts of a configuration. task_schema: the settings of a task and of
a stream of steps. tiles: how pictures are cut. bands: what they are made of. The schema of a whole run is
`visft_ds.config.schema`; the settings of a task stand in `tasks/<task>/config.py`. Nothing here may import
another room, or a tensor library.
"""
