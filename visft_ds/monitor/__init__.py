"""Output of a run: console (people), metrics.jsonl and TensorBoard (curves), run.json (what was run). No torch."""
