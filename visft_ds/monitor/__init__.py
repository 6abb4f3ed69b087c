"""Output of a run: console (people), metrics.jsonl and TensorBoard (curves). No torch.

console: tables, the line of a training step, progress bars of other work. metrics: metrics.jsonl and
TensorBoard, written, read and cut at a resume.

To touch: names of numbers in metrics.jsonl are read by `visft report` and by users' scripts. A failing writer
warns once and never ends a run. Every table of every command is a `console.Section`.
"""
