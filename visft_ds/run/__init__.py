"""A run on disk and on screen, for visft_ds/train.py.

folder: lock, and what earlier starts left, looked for once before and once under the lock.
machine: what hardware decides (precision, batches, activation checkpointing), facts that ranks share.
start: another run or adapter to begin with; record: run.json; state: checkpoints, resume, export.
report: the plan before the first step and of --dry-run; advice: what data and final metrics mean.
log: console, metrics.jsonl, TensorBoard; evaluation: predictions of all ranks, measured by a process beside.

Names of files stand in visft_ds/run_files.py, the form of run.json in config/record.py. What all ranks do
together is marked "Collective": no branch around it may differ between ranks. Anything that a resume compares
belongs into `ResolvedConfig.identity` or the identity of data and model, nowhere else.
"""
