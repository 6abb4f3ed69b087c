"""Run on disk and on screen: its folder, lock, state, report at the start, evaluation beside it."""
