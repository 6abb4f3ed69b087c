"""Engines, checkpoints and process groups. The only place that imports DeepSpeed."""

import os
import warnings

import torch

# Before anything imports DeepSpeed, which would look for device files, and compute elsewhere than torch
# (WSL2, ROCm).
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# Torch's flight recorder, from which the watchdog names the last collective.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "64")
# DeepSpeed 0.19.8 calls collectives that torch has renamed; nothing a user of this project could change.
warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
