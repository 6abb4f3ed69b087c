from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CacheOptions:
    folder: Path
    max_bytes: int
