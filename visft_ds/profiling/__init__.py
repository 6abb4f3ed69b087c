"""Speed and memory of a training configuration, measured: `visft profile`.

measure: builds what `visft train` builds, in its order but without a run folder, and times its steps, whole
and by part. command: flags, the table, the files of --json and --trace.

To touch: the parts of a step are those that `measure.timed_parts` marks, and none of them may synchronise the
device. What is planned beside what is measured comes from visft_ds.planner. A step here is a step of the
training loop: what changes there changes in `Session._step`.
"""
