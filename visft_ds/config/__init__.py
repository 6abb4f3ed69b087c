"""Configuration of a run: three layers of JSON, one resolved and validated result. Imports neither torch nor
deepspeed.

schema: the allowed settings with their contradictions. resolve: from a stage, an engine and a model to a
`ResolvedConfig`, every error at once. batches: what follows for a number of processes. preflight: what must
be on disk.
cli: the flags.
"""

from visft_ds.config.batches import Batches, derive_batches
from visft_ds.config.resolve import ResolvedConfig, changed, resolve

__all__ = ["Batches", "ResolvedConfig", "changed", "derive_batches", "resolve"]
