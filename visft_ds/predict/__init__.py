"""Predictions for pictures of one's own: a trained model loaded in one line, typed results, drawings."""
