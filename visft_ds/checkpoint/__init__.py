"""Checkpoints, and what a run exports.

format: the files of one checkpoint, checked, written whole or not at all, free of any engine. saver: saving
beside the training, and which checkpoints remain. export: heads, adapter and weights in files that other
programs read.

What stands in a checkpoint is `parallel.state.EngineState`; a new entry of state.json needs a place in
`Checkpoint` and in tests/checkpoint/test_checkpoints.py. `format` changes the disk through `os` alone:
tests/checkpoint/faulty_disk.py fails each of its operations. Names of files are in `visft_ds.run_files`;
who saves when is `visft_ds.run.state`.
"""
