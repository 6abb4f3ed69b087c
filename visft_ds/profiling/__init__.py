"""Measuring a real configuration: `tools/profile.py train`.

session: the model, engine and loader of a training run, without a run folder. timing: a step by part. memory: bytes by
part. flops: the arithmetic of a step, by formula. counting: the same by counting. hardware: what the device could do.
measure: the order of everything. report: what a person sees. command: the flags.
"""
