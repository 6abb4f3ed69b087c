"""Benchmarks of frozen features out of domain: data sets, models, scores and their table."""
