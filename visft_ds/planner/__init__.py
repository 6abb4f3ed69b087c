"""Memory and time of a configuration on hardware that need not be there; what to change so that it fits.

trace: work and memory of code on the meta device. memory: bytes of a rank by part. hardware: GPUs. time:
seconds of a step. search: the fastest settings, and changes that fit. command: `visft plan`.
"""
