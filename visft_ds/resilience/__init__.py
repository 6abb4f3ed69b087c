"""What a run survives: signals, lost and hanging ranks, bad steps, memory."""
