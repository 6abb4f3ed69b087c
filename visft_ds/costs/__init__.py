"""Arithmetic, bytes and rates of a step, for partition, planner and profiler."""
