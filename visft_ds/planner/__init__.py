"""Memory and time of a configuration on hardware that need not be there; what to change so that it fits.

trace: operations and bytes of code on the meta device. memory: bytes of a rank by part, of the model's own
step. partition: pipeline stages. hardware: GPUs (rows of gpus.csv) and clusters. time: seconds of a step.
search: the fastest settings, and changes that fit. command: `visft plan`.

Every run is planned before it starts, so that what it needs is known before anything is allocated.

To touch: a new GPU is a row of gpus.csv, with rates from its data sheet. Constants of time and memory have
their sources beside them and tests against published numbers (tests/planner/test_published.py). What the
engine holds in memory is in `memory.plan_stream` alone.
"""
