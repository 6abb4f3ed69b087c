"""The forward of each task on a GPU that is not there: shapes and devices alone, and no tensor of another
device.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from tests.parallel import engine_case as case

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("task", case.TASKS)
def test_a_forward_stays_on_its_device(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of `FakeTensorMode` raise where tensors lie on different devices."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    module, _ = case.build(2, storage=torch.bfloat16)
    on_host = case.part(case.TASKS.index(task), 0, 2)  # as the loader gives it
    with FakeTensorMode(allow_non_fake_inputs=True):
        for part in module.modules():
            for name, old in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                fake = torch.empty(old.shape, dtype=old.dtype, device=DEVICE)
                setattr(
                    part,
                    name,
                    nn.Parameter(fake, old.requires_grad) if isinstance(old, nn.Parameter) else fake,
                )
        batch = on_host.to(DEVICE)
        (one,) = module.features(batch)
        target = batch.targets[task]
        output = module.heads[task](
            [one], **{name: getattr(target, of) for name, of in target.head_inputs.items()}
        )
        found = [leaf for leaf in tree_leaves(list(vars(output).values())) if isinstance(leaf, Tensor)]
    assert found and {tensor.device for tensor in (one.features, one.valid, *found)} == {DEVICE}
