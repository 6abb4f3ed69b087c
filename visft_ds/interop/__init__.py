"""Weights in and out: one file per foreign format; files.py, layouts.py and adapter.py are what they share."""
