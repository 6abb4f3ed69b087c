"""Engines: ZeRO and pipelines behind one interface. The only room that imports DeepSpeed.

engine: process group, `Engine` (ZeRO 0 to 3) and `build_engine`. pipeline, pipeline_layers: the model as
stages. placement: which process holds which values. state: what trains, gathered and put back, by parameter
name. deepspeed_fixes: a function for each fault of DeepSpeed, which names the fault.

A private name of DeepSpeed may be used here, with its fault beside it; visft_ds.DEEPSPEED states the
releases that were tested. Facts of the process group and collectives are in `visft_ds.distributed`, which
needs no DeepSpeed. All engines have to give the losses of tests/golden: tests/parallel compares them with
each other, tests/train/test_golden.py with those numbers.
"""

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
