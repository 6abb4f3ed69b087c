"""Checkpoints, averages and exports: what leaves an engine."""
