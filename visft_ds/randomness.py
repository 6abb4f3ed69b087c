"""Random numbers that follow from a key or from a seed and a name, and from nothing else."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def generator(key: int, stream: int = 0) -> np.random.Generator:
    """Random numbers of a key: transforms draw from stream 0, losses that sample points from the others."""
    return np.random.Generator(np.random.Philox(key=np.array([key, stream], dtype=np.uint64)))


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on a seed and the name of what it fills, and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
