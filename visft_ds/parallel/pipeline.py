"""The pipeline engine: the prepared model divided over stages, `deepspeed.pipe` x ZeRO-1 data parallel.

DeepSpeed 0.19.8 goes wrong with frozen stages, several parameter groups, several losses and modes of frozen
parts; each remedy here names the fault it cures. They use private parts of DeepSpeed (`_INSTRUCTION_MAP`,
`pipe_buffers`), which is why `start_process_group` refuses releases that were not tested.
"""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine as DeepSpeedPipeline
from torch import Tensor, nn

from visft_ds import distributed
from visft_ds.data.samples import Batch
from visft_ds.distributed import PipelinePosition
from visft_ds.model import MultiTaskModel
from visft_ds.parallel.deepspeed_fixes import step_without_update
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.pipeline_layers import HeadsLayer, facts_of, owners, pipeline_layers, release
from visft_ds.tasks.criterion import LossDenominators

#: Values of an anchor (see `stage_groups`): at least one for each data-parallel rank that ZeRO-1 divides it
#: over.
_ANCHOR_SIZE = 64
#: Steps between two comparisons of samples; comparing makes the host wait for the device.
CHECK_EVERY = 20


class StagesModule(PipelineModule):
    """DeepSpeed's module over the layers of a model (`pipeline_layers`), divided at given bounds.

    Args:
        model: the prepared model; this process keeps the layers of its stage on its device.
        bounds: first layer of each stage, and the number of layers.
    """

    def __init__(self, model: MultiTaskModel, bounds: Sequence[int]) -> None:
        # A tuple: the model is not part of the module, only the layers of this stage are.
        self._model = (model,)
        self._bounds = list(bounds)
        layers = pipeline_layers(model)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers and seeds
            super().__init__(
                layers,
                num_stages=len(bounds) - 1,
                # The heads, and so the losses, are part of the module; predictions have no loss.
                loss_fn=lambda output, batch: output.get("loss", torch.zeros(())),
                dynamic_shape=True,  # images change their size from step to step
            )
        for index, layer in enumerate(layers):
            if not self._local_start <= index < self._local_stop:
                release(layer)

    def _partition_layers(self, method: str = "given") -> None:
        # DeepSpeed's method "parameters" counts what trains: with frozen blocks one stage would get nearly
        # all of them.
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def train(self, mode: bool = True) -> StagesModule:
        """DeepSpeed sets every layer to training mode; frozen heads and backbones stay in evaluation mode."""
        super().train(mode)
        self._model[0].train(mode)
        return self

    @property
    def heads(self) -> HeadsLayer | None:
        """The layer with the heads; None where another stage has it."""
        last = self.forward_funcs[-1]
        return last if isinstance(last, HeadsLayer) else None


class PipelineEngine(Engine):
    """Stages x ZeRO-1 over the layers of a prepared model.

    In a step the first stage takes batches with pixels, the last one batches with labels, and those between
    none. Only the stage of a parameter holds its values: in the other stages' `module` it is on the meta
    device. Every stage gets the mean loss of the global batch before the update, for `should_update`.

    Args:
        bounds: first layer of each stage, and the number of layers.
        others: of `Engine`.
    """

    def __init__(
        self,
        module: MultiTaskModel,
        groups: list[dict[str, Any]],
        config: dict[str, Any],
        *,
        bounds: Sequence[int],
        **others: Any,
    ) -> None:
        self.position = PipelinePosition.here(len(bounds) - 1)
        stage_of = owners(module, bounds)
        #: The first stage with something to train: no gradient flows into it or into those before.
        first_trained = min(
            stage_of[name] for name, value in module.named_parameters() if value.requires_grad
        )
        self._stages = StagesModule(module, bounds)
        super().__init__(module, stage_groups(self._stages, groups), config, inside=self._stages, **others)
        # It wipes gradients of the heads; precision comes by autocast.
        assert not self.deepspeed.using_bf16_optimizer
        # An attribute of the object hides the table of its class: no other engine is changed.
        self.deepspeed._INSTRUCTION_MAP = instructions(self.position.stage, first_trained, self._end_step)
        self.holders = {name: stage * self.position.dp_size for name, stage in stage_of.items()}
        self._steps_here = 0
        self._losses: Mapping[str, float] = {}
        self._accepted = True

    def _step(
        self, step: int, batches: Sequence[Batch], loss_denominators: LossDenominators
    ) -> tuple[Mapping[str, float], float, bool]:
        """`Engine._step` over this pipeline's micro-batches, of which stages in the middle have none.

        Args:
            loss_denominators: as the last stage has counted them; other stages ignore them.

        Raises:
            RuntimeError: labels and pixels of different samples.
        """
        assert len(batches) == (self.accumulation if self.position.role else 0), len(batches)
        compares = self._steps_here == 0 or step % CHECK_EVERY == 0

        def add(losses: Mapping[str, Tensor], received: Tensor, batch: Batch) -> None:
            # The host waits for the device.
            if compares and (ours := int(sample_checksum(batch))) != (theirs := int(received)):
                raise RuntimeError(
                    f"step {step}: the last pipeline stage has labels of other samples (checksum "
                    f"{ours:08x}, of the pixels {theirs:08x}): the stages do not follow the same plan"
                )
            self._add(losses)

        if (heads := self._stages.heads) is not None:
            heads.loss_denominators = loss_denominators
            heads.on_output = add
        self.deepspeed.train_batch(_inputs(self.module, batches, self.device, first=self.position.stage == 0))
        self._steps_here += 1
        norm = float(self.deepspeed.get_global_grad_norm())  # inf where DeepSpeed skipped the update
        return self._losses, norm, self._accepted

    def _end_step(self, engine: Any) -> None:
        """End a step in every stage: make the update, unless `should_update` refuses the loss.

        The last stages know the losses, means over the pipelines, and the loss scale; all ranks get them from
        there.
        """
        losses: Mapping[str, float] = {}
        if self._stages.heads is not None:
            group = self.deepspeed.grid.get_data_parallel_group()
            losses = distributed.mean_losses(self._sums, self._most_losses, group)
        last = (self.position.stages - 1) * self.position.dp_size
        scale = self.loss_scale.value if self.loss_scale else None
        box = [(losses, scale)]
        dist.broadcast_object_list(box, src=last)
        self._losses, theirs = box[0]
        # The last stage's scale multiplied the gradients that came from there; no stage may divide by another
        # one.
        assert scale == theirs, (scale, theirs)
        self._accepted = self.should_update(self._losses["loss"])
        step = partial(DeepSpeedPipeline._exec_optimizer_step, engine)
        if self._accepted:
            step()
        else:
            step_without_update(engine, self.stage, step)

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Any]:
        """Every head's output for this rank's batch, on the CPU, in evaluation mode. All ranks call it
        together.

        Every rank has other images: those of one pipeline's ranks go through it one after another, and each
        output returns to the rank its images came from.
        """
        group = self.deepspeed.grid.get_pipe_parallel_group()
        ranks = self.deepspeed.grid.pp_group
        batches: list[Any] = [None] * len(ranks)
        dist.all_gather_object(batches, batch, group=group)
        outputs: list[dict[str, Any]] = []
        if (heads := self._stages.heads) is not None:
            heads.loss_denominators = None
            heads.on_output = lambda predicted, received, _: outputs.append(to_host(predicted))
        fed = _inputs(self.module, batches, self.device, first=self.position.stage == 0)
        self.deepspeed.eval_batch(fed, reduce_output=None, bcast_loss=False, num_micro_batches=len(ranks))
        returned: list[Any] = [None]
        dist.scatter_object_list(returned, outputs or None, src=ranks[-1], group=group)
        return dict(returned[0])


def stage_groups(stages: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parameters of each optimiser group that this stage holds, or an anchor where it holds none.

    ZeRO-1 runs collectives for each group, so stages with different numbers of groups would wait for each
    other for ever, and a stage without any fails at start. An anchor is a parameter that nothing uses: it
    stays 0.
    """
    here = {id(parameter) for parameter in stages.parameters()}
    divided = []
    for number, group in enumerate(groups):
        held = [parameter for parameter in group["params"] if id(parameter) in here]
        if not held:
            device = next(stages.parameters()).device
            anchor = nn.Parameter(torch.zeros(_ANCHOR_SIZE, device=device))
            anchor.ds_pipe_replicated = False  # type: ignore[attr-defined]  # DeepSpeed asks when it adds norms up
            stages.register_parameter(f"anchor{number}", anchor)
            held = [anchor]
        divided.append({**group, "params": held})
    return divided


def instructions(
    stage: int, first_trained: int, update: Callable[[Any], None]
) -> dict[Any, Callable[..., None]]:
    """DeepSpeed's table of instructions for a stage, with these differences.

    The last stage hands the heads their batch before their forward. Where nothing in front trains, tokens are
    received without a gradient and none is sent; a stage with nothing to train in it or in front has no
    backward at all. DeepSpeed wants a gradient of every tensor that travels, and fails where there is none.
    `update` takes the place of the optimiser's step.
    """

    def receive_tokens(engine: Any, buffer_id: int) -> None:
        DeepSpeedPipeline._exec_recv_activations(engine, buffer_id)
        if stage <= first_trained:
            engine.pipe_buffers["inputs"][buffer_id][0].requires_grad_(False)

    def send_gradient(engine: Any, buffer_id: int) -> None:
        if stage <= first_trained:
            engine.pipe_buffers["inputs"][buffer_id] = None
        else:
            DeepSpeedPipeline._exec_send_grads(engine, buffer_id)

    def receive_gradient(engine: Any, buffer_id: int) -> None:
        if stage >= first_trained:
            DeepSpeedPipeline._exec_recv_grads(engine, buffer_id)

    def backward(engine: Any, buffer_id: int) -> None:
        if stage >= first_trained:
            DeepSpeedPipeline._exec_backward_pass(engine, buffer_id)
        else:
            engine.pipe_buffers["outputs"][buffer_id] = None
            engine.pipe_buffers["output_tensors"][buffer_id] = None

    def forward(engine: Any, buffer_id: int) -> None:
        if (heads := engine.module.heads) is not None:
            heads.batch = engine.pipe_buffers["labels"][buffer_id]
        DeepSpeedPipeline._exec_forward_pass(engine, buffer_id)

    return {
        **DeepSpeedPipeline._INSTRUCTION_MAP,
        schedule.RecvActivation: receive_tokens,
        schedule.SendGrad: send_gradient,
        schedule.RecvGrad: receive_gradient,
        schedule.BackwardPass: backward,
        schedule.ForwardPass: forward,
        schedule.OptimizerStep: update,
    }


def _inputs(
    model: MultiTaskModel, batches: Sequence[Batch], device: torch.device, *, first: bool
) -> Iterator[Any]:
    """(inputs, labels) of each micro-batch, as DeepSpeed wants them: inputs on the first stage, labels on the
    last.
    """
    for batch in batches:
        if first:
            there = batch.to(device)
            yield (there.images, there.sizes, facts_of(model, batch, sample_checksum(batch))), None
        else:
            yield (), batch


def to_host(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of heads (dataclasses of tensors) on the CPU, without earlier layers, which are for losses
    only.
    """
    moved = {}
    for task, output in outputs.items():
        output = output.last() if hasattr(output, "last") else output
        tensors = {name: value.cpu() for name, value in vars(output).items() if isinstance(value, Tensor)}
        moved[task] = replace(output, **tensors)
    return moved


def sample_checksum(batch: Batch) -> Tensor:
    """(1,) int64: crc32 over indices, image ids and random keys, in their order."""
    facts = torch.cat((batch.indices, batch.image_ids, batch.random_keys))
    return torch.tensor([zlib.crc32(facts.cpu().numpy().tobytes())])
