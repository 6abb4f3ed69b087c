"""Captioning: an LSTM with attention (Show, Attend and Tell)."""
