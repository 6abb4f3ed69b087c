"""Engines, checkpoints and process groups. The only place that imports DeepSpeed."""

import os
import warnings

# Before anything imports DeepSpeed: on a machine without a GPU it would warn that it had to guess.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed 0.19.8 calls collectives that torch has renamed; nothing a user of this project could change.
warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
