"""Configuration of a run: three layers of JSON, then flags; one validated result. No tensor library.

schema: every key with its default, bounds and comment, and contradictions where their keys stand; the page of
    all keys is made of it. Keys of tasks are in visft_ds/tasks/<task>/config.py.
resolve: layers -> `Tree` -> `Recipe` (all errors at once) -> `Draft` (decisions) -> `ResolvedConfig`.
tree: nested values and their sources; flags: the command line of visft train; backbones: names behind
    --backbone; batches: their division; record: the form of run.json, and settings of two runs compared.

A new key: a field in schema.py with a "#:" comment; `NOT_IDENTITY` in resolve.py if a resume may change it.
Ask first whether an existing one can carry it. What depends on the data is no key's default but decided in
prepare/settle.py.
"""

from visft_ds.config.batches import Batches, derive_batches
from visft_ds.config.resolve import ResolvedConfig, changed, resolve

__all__ = ["Batches", "ResolvedConfig", "changed", "derive_batches", "resolve"]
