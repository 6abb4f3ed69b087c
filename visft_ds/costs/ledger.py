"""Ledger of live storages by kind, each counted once, however many tensors view it; on the meta device as well.

New ones are seen as operators make them, and leave when nothing holds them any more. What libraries take for themselves
inside a call (cuBLAS, cuDNN, MKL workspaces) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Kinds of memory, in the order in which they are printed.
FROZEN, TRAINED, OPTIMIZER, GRADIENTS, BUCKETS, GATHERED, ACTIVATIONS, TRANSIENT, OTHER = (
    "weights, frozen",
    "weights, trained",
    "optimizer state",
    "gradients",
    "reduce buckets",
    "gathered weights",
    "activations",
    "transient",
    "other",
)
KINDS = (FROZEN, TRAINED, OPTIMIZER, GRADIENTS, BUCKETS, GATHERED, ACTIVATIONS, TRANSIENT, OTHER)


@dataclass
class _Live:
    """Storage that is alive."""

    reference: Any  #: weak; kept so that it can tell when the storage goes
    size: int
    kind: str
    born: int  #: when it was noted


class Ledger:
    """Live storages of one kind of device: bytes by kind now, at the peak of their sum, and each kind's own peak."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._live: dict[int, _Live] = {}
        self._clock = self._peak_clock = 0
        self.now: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.at_peak: dict[str, int] = dict(self.now)
        self.highest: dict[str, int] = dict(self.now)

    def add(self, tensor: Tensor, kind: str, *, instead_of: tuple[str, ...] = ()) -> None:
        """Note the storage of a tensor; a known one keeps its kind unless that is one of `instead_of`."""
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is not None:
            if known.kind in instead_of and known.kind != kind:
                self._rename(known, kind)
        elif size:
            self._clock += 1
            self._live[key] = _Live(weakref.ref(storage, partial(self._gone, key)), size, kind, self._clock)
            self._change(kind, size)

    def add_all(self, tensors: Iterable[Tensor], kind: str, *, instead_of: tuple[str, ...] = ()) -> None:
        """`add` for each."""
        for tensor in tensors:
            self.add(tensor, kind, instead_of=instead_of)

    def forget_peaks(self) -> None:
        """Start looking for peaks from what lives now."""
        self.at_peak, self.highest, self._peak_clock = dict(self.now), dict(self.now), self._clock

    def _rename(self, entry: _Live, kind: str) -> None:
        if entry.born <= self._peak_clock:  # it lives, so it lived at the peak, whatever it was called then
            self.at_peak[entry.kind] -= entry.size
            self.at_peak[kind] += entry.size
        self._change(entry.kind, -entry.size)
        entry.kind = kind
        self._change(kind, entry.size)

    def _gone(self, key: int, _: object) -> None:
        entry = self._live.pop(key)
        self._change(entry.kind, -entry.size)

    def _change(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self.highest[kind] = max(self.highest[kind], self.now[kind])
        if size > 0 and sum(self.now.values()) > sum(self.at_peak.values()):
            self.at_peak, self._peak_clock = dict(self.now), self._clock


class Allocations(TorchDispatchMode):
    """Adds what every operator returns."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._ledger.add_all((leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), TRANSIENT)
        return result


class _Parameters:
    """The parameters a saved tensor may turn out to be, or to look into."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        #: ZeRO-3 gathers a parameter's storage for a module's forward and gives it back after.
        self.moving = any(hasattr(p, "ds_id") for p in self._parameters)
        self._owners = None if self.moving else self._by_storage()

    def owners(self, tensor: Tensor) -> list[nn.Parameter]:
        """Those in the same storage; several where an engine keeps them in one flat tensor."""
        owners = self._by_storage() if self._owners is None else self._owners
        return owners.get(tensor.untyped_storage()._cdata, [])

    def _by_storage(self) -> dict[int, list[nn.Parameter]]:
        owners: dict[int, list[nn.Parameter]] = {}
        for parameter in self._parameters:
            if parameter.numel():
                owners.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)
        return owners


def _is_same(parameter: nn.Parameter, tensor: Tensor) -> bool:
    """Return True if a saved tensor is the parameter itself, not a view of it."""
    alike = parameter.shape == tensor.shape and parameter.stride() == tensor.stride()
    return bool(alike and parameter.storage_offset() == tensor.storage_offset())


@contextmanager
def saved_tensors_counted(ledger: Ledger, module: nn.Module) -> Iterator[None]:
    """Note as activations what autograd keeps for the backward pass; parameters, and what lived before, are not.

    Looking must not change what lives. Without hooks autograd keeps a parameter itself, so that ZeRO-3 can take its
    gathered storage away; a hook is given another tensor in that storage, which would hold it. So the parameter takes
    its place. A view of a parameter (such as `weight.t()`, which torch's linear layer keeps) does hold the storage.
    """
    parameters = _Parameters(module)

    def pack(tensor: Tensor) -> Tensor:
        owners = parameters.owners(tensor)
        if not owners:
            ledger.add(tensor, ACTIVATIONS, instead_of=(TRANSIENT,))
        elif parameters.moving:
            ledger.add(tensor, GATHERED, instead_of=(TRANSIENT,))
            return next((parameter for parameter in owners if _is_same(parameter, tensor)), tensor)
        return tensor

    with saved_tensors_hooks(pack, torch.Tensor.detach):
        yield
