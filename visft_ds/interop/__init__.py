"""Weights in and out: one file per foreign format; files.py, layouts.py and adapters.py are what they share."""
