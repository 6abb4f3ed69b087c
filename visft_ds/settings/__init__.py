"""Types of settings, below every room that has some: fields with their bounds, and what every task sets.

The schema of a whole run is `visft_ds.config.schema`; the settings of a task stand in `tasks/<task>/config.py`.
"""
