"""Base of layers with a low-rank adapter: an explicit merge, and files without adapters while merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Parameters that an adapted layer may have beside those of the layer it replaces.
KINDS = ("lora_A", "lora_B", "lora_magnitude")


class AdaptedLayer(nn.Module):
    """A layer that takes over weight and bias of the one it replaces and adds lora_A, lora_B and, or not, magnitudes.

    While merged, `state_dict` holds the merged weight without the adapters, so that nothing can apply them again.
    Subclasses compute the forward, the first values of the adapters, and `delta`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None

    def __init__(
        self, base: nn.Module, a: Sequence[int], b: Sequence[int], *, rank: int, alpha: float, magnitude: bool
    ) -> None:
        """Take over a layer's parameters.

        Args:
            base: with `weight` and `bias`.
            a, b: shapes of lora_A and lora_B, (rows, r). The adapters are fp32 over weights of any narrower dtype.
            magnitude: whether there is one, of as many entries as B has rows.
        """
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.shapes = {"lora_A": tuple(a), "lora_B": tuple(b)}  # ZeRO-3 takes those of parameters away
        weight: Any = base.weight
        self.weight = weight
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]
        like: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(*a, **like))
        self.lora_B = nn.Parameter(torch.zeros(*b, **like))
        self.register_parameter("lora_magnitude", nn.Parameter(torch.empty(b[0], **like)) if magnitude else None)

    def start(self, generator: torch.Generator | None) -> None:
        """Give A and the magnitudes their first values, where the layer holds any."""
        if self.weight.is_meta:
            return
        self.lora_A.data.copy_(self.random_a(generator))
        if self.lora_magnitude is not None:
            self.lora_magnitude.data.copy_(self.first_magnitude(self.weight))

    def random_a(self, generator: torch.Generator | None = None) -> Tensor:
        """Initial values of A, fp32 on the CPU, so that every device starts alike.

        kaiming_uniform_(a=sqrt(5)), as loralib initialises it: uniform in +-1/sqrt(fan in).
        """
        shape = self.shapes["lora_A"]
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)

    def first_magnitude(self, weight: Tensor) -> Tensor:
        """Initial magnitudes, fp32: the norms of the adapted rows of a weight on any device."""
        raise AssertionError("subclasses say it")

    def delta(self) -> Tensor:
        """The dense change of the weight, which is not merged, in the precision of the adapters."""
        raise AssertionError("subclasses say it")

    @property
    def merged(self) -> bool:
        """Return True while the update is part of `weight`."""
        return self._original is not None

    _original: Tensor | None = None

    @torch.no_grad()
    def merge(self) -> float:
        """Add the update to the weight, in fp32 and rounded once; keeps the original weight for `unmerge`.

        Returns:
            The share of the update that survived the rounding: <W_after - W_before, delta> / <delta, delta>, 1 for a
            zero update.

        Raises:
            ValueError: already merged.
        """
        if self.merged:
            raise ValueError("this LoRA layer is merged already; unmerge it first")
        before = self.weight.detach()
        delta = self.delta()
        after = (before.to(delta.dtype) + delta).to(before.dtype)
        self._original = before
        self.weight.data = after
        size = torch.sum(delta.double() ** 2)
        kept = torch.sum((after.double() - before.double()) * delta.double())
        return float(kept / size) if size > 0 else 1.0

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Raises ValueError where nothing is merged."""
        if self._original is None:
            raise ValueError("this LoRA layer is not merged; merge it first")
        self.weight.data = self._original.to(self.weight.device)
        self._original = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in KINDS:
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:
            raise ValueError(f"{prefix}: cannot load into a merged LoRA layer; unmerge it first")
        super()._load_from_state_dict(state_dict, prefix, *args)


def resized(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """The change of rows (n, ...) that DoRA moves by `delta` and then gives the lengths `magnitude` (n,)."""
    turned = weight.to(delta.dtype) + delta
    factor = magnitude / lengths(turned)
    return turned * factor.view(-1, *(1,) * (turned.ndim - 1)) - weight


def lengths(rows: Tensor) -> Tensor:
    """(n, ...) -> (n,): Euclidean, never quite zero, so that a row of zeros stays one."""
    return rows.flatten(1).norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)
