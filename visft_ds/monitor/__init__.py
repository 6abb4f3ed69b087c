"""Output of a run: console (people), metrics.jsonl and TensorBoard (curves), wandb. No torch."""
