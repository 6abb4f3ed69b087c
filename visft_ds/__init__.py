"""visft_ds: supervised fine-tuning of vision foundation models on DeepSpeed."""

__version__ = "0.1.0"
