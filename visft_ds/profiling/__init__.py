"""Speed and memory of a training configuration, measured."""
