"""Survival of a run: signals, lost and hanging ranks, bad steps, memory."""
