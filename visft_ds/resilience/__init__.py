"""Survival of a run: signals, lost and hanging ranks, bad steps, memory.

stop: one flag for signals and for a launcher that is gone. processes: the ranks that `--num_gpus` starts.
watchdog: a phase that hangs ends its rank. guard: losses and gradients that are not finite. memory: the
largest step first, and what an error of an allocator means. stop and processes import nothing heavy: they
come before torch.

Exit codes are in `visft_ds.errors`; tests/soak does all of this to a run, and compares its end with an
undisturbed one. After a change here run `python -m pytest -m slow tests/resilience tests/soak`.
"""
