"""Measuring: `visft profile`.

session: the model, engine and loader of a training run, without a run folder. timing: a step by part. memory: bytes by
part. formula: the arithmetic of a step. measure: the order of everything. report: what a person sees. command: the
flags of `train`, and what all commands share.
"""
