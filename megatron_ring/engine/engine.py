"""DeepSpeed, kept behind one door: its engine, driven one optimizer step at a time.

DeepSpeed is shown one data axis of size D x C. ZeRO shards over it and averages gradients over it; ``loss.py`` makes
that average the true token mean. Only this file and pipeline_engine.py import deepspeed.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.monitor.comet import CometMonitor
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.csv_monitor import csvMonitor
from deepspeed.monitor.tensorboard import TensorBoardMonitor
from deepspeed.monitor.wandb import WandbMonitor
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

from megatron_ring.checkpoint.finite import NotFinite, not_finite
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.tensors import WEIGHT, Piece, Shapes, Tensors
from megatron_ring.data.loader import Batch
from megatron_ring.data.packing import IGNORED
from megatron_ring.engine.fragments import Fragment, fragments, update_compute_weights
from megatron_ring.engine.gradient_norm import clip, counts_here
from megatron_ring.engine.loss import counted_tokens, share_of_mean
from megatron_ring.engine.loss_scale import loss_scale, set_loss_scale
from megatron_ring.engine.model_parallel_unit import model_parallel_unit
from megatron_ring.engine.step_gate import StepGate
from megatron_ring.model.gpt import decay_groups
from megatron_ring.monitoring.metrics import Monitor
from megatron_ring.monitoring.non_finite import NonFiniteDetector, NonFiniteReport
from megatron_ring.monitoring.outputs import BestEffort
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.environment import Environment, keep_freed_memory
from megatron_ring.parallel.tensor import whole_shape
from megatron_ring.settings.setup import Setup

# By their names in DeepSpeed's config.
_MONITORS = {
    "tensorboard": TensorBoardMonitor,
    "wandb": WandbMonitor,
    "csv_monitor": csvMonitor,
    "comet": CometMonitor,
}

# Settings of ZeRO 3 under which DeepSpeed keeps partitions of another kind or a second one.
_OTHER_PARTITIONS = {
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
}


def start_processes(environment: Environment, device: str) -> None:
    """Join the other processes: NCCL on CUDA, gloo on a CPU. Blocks until all have come."""
    environment.complete()
    if device == "cuda":
        torch.cuda.set_device(environment.local_rank)
    else:
        torch.set_num_threads(environment.threads)
        keep_freed_memory()
    # DeepSpeed still calls collectives by the names that torch is about to drop.
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning
    )
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for 20 s here. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )


def leave_processes() -> None:
    """Wait for the others, then take the groups down: a rank that just ends can abort another's last transfer."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the global batch's counted tokens, nats. grad_norm: of the whole gradient, before clipping.

    refused: nothing has moved, because one of them is not finite or the loss was higher than allowed (decision.py).
    """

    loss: float
    grad_norm: float
    tokens: int
    refused: bool


@dataclass(frozen=True)
class Evaluation:
    """loss_sum: nats over all counted tokens; text_bytes: of the text that their targets stand for."""

    loss_sum: float
    tokens: int
    text_bytes: int


class Engine:
    """A model under DeepSpeed. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, model: torch.nn.Module, setup: Setup, groups: ProcessGroups):
        training = setup.config.training
        self.adam = torch.optim.AdamW(
            decay_groups(model, training.weight_decay),
            lr=0.0,  # train_step sets each step's
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=True,
        )
        self.groups = groups
        self.device = torch.device(setup.device)
        self.lookout = NonFiniteDetector(model, self.device)
        self.averaged_over = setup.grid.data_context * setup.micro_batches
        # DeepSpeed would fail with its monitors, and report samples where we report steps, which
        # wandb drops.
        derived = setup.deepspeed.items()
        without_monitors = {key: value for key, value in derived if key not in _MONITORS}
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.adam,
            # DeepSpeed takes the norm only where it clips, and we tell it in any case.
            config=without_monitors | {"gradient_clipping": training.clip_grad or math.inf},
            mpu=model_parallel_unit(setup.grid, groups),
        )
        # Without ZeRO, DeepSpeed's half-precision optimizer takes a step of zeros to make its state. At rate 0 that
        # moves no weight, but AdamW would count it as its first.
        self.adam.state.clear()
        self.engine.clip_fp32_gradients = self._clip_fp32_gradients
        self.monitors = _monitors(setup.deepspeed)
        step = self.adam.step
        self.adam.step = lambda: None if self.decision.refused else step()

    def train_step(
        self, batches: list[Batch], learning_rate: float, highest_loss: float = math.inf
    ) -> StepResult:
        """One optimizer step over the micro-batches of a global batch, none of them on later pipeline stages.

        It is refused, and moves nothing, if its loss is above ``highest_loss`` or anything of it is not finite.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        count = self._sum(counted_tokens(_targets(batches)).to(self.device))
        self.decision = StepGate(self._own_loss, self._norm_to_judge, highest_loss)
        self.lookout.begin()
        self._step(batches, share_of_mean(count, self.averaged_over))
        loss, refused = self.decision.loss, self.decision.refused
        return StepResult(loss, self._grad_norm(), int(count), refused)

    def seen(self) -> NonFiniteReport:
        """What this process has seen of the last step."""
        return self.lookout.seen(dist.get_rank(), self._own_loss())

    def evaluate(self, steps: list[list[Batch]], bytes_per_token: torch.Tensor) -> Evaluation:
        """Sums over whole global batches, without gradients. ``bytes_per_token``: (V,) bytes of text of each id."""
        targets = _targets([batch for batches in steps for batch in batches])
        counted = targets[targets != IGNORED]
        counts = torch.stack([torch.tensor(len(counted)), bytes_per_token[counted].sum()])
        self.engine.eval()
        with torch.no_grad():
            loss = sum(self._evaluated(batches).double() for batches in steps)
        self.engine.train()
        tokens, text_bytes = self._sum(counts.to(self.device)).tolist()
        return Evaluation(float(loss), tokens, text_bytes)

    def shapes(self) -> Shapes:
        """Whole shapes of the parameters of which this process holds something."""
        return {name: whole_shape(parameter) for name, parameter in self.named_parameters()}

    def pieces(self) -> list[Piece]:
        """What this process adds to a checkpoint: views of its memory. All together have every element once."""
        own = [(name, p) for name, p in self.named_parameters() if counts_here(p, self.groups)]
        return [
            piece
            for fragment in self._fragments(own)
            for piece in fragment.share(*self.groups.data_context_rank_and_size)
        ]

    def counters(self) -> dict[str, Any]:
        """What a checkpoint's state says of the optimizer, by its names there."""
        steps = [int(moments["step"]) for moments in self.adam.state.values()]
        return {
            "optimizer_steps": max(steps, default=0),
            "loss_scale": loss_scale(self.engine.optimizer),
        }

    @torch.no_grad()
    def read(self, tensors: Tensors, state: RunState) -> None:
        """Read weights, and the optimizer's state if it has done steps, from a checkpoint that any
        grid has written.

        ``update_compute_weights`` must follow. Not collective. Raises CheckpointError on the ranks
        that find a parameter of theirs missing or shaped otherwise, NotFinite on those that read a
        value that is nan or infinite.
        """
        tensors.check_shapes(self.shapes())
        kinds = tensors.kinds if state.optimizer_steps else [WEIGHT]
        bad = Counter[str]()
        for fragment in self._fragments(self.named_parameters()):
            bad.update(
                {f"{kind}/{fragment.name}": n for kind, n in fragment.fill(tensors, kinds).items()}
            )
        if bad:
            raise NotFinite(not_finite(name, count) for name, count in sorted(bad.items()))
        for moments in self.adam.state.values():
            for moment in moments.values() if not state.optimizer_steps else ():
                moment.zero_()  # who goes back to weights alone has moments of its own
            moments["step"].fill_(state.optimizer_steps)
        set_loss_scale(self.engine.optimizer, state.loss_scale)

    @torch.no_grad()
    def update_compute_weights(self) -> None:
        """Have the weights that compute follow those that ``read`` has changed. Collective."""
        update_compute_weights(self.engine.optimizer)

    def within_optimizer_step(self, note: Callable[[], AbstractContextManager]) -> None:
        """From now on take DeepSpeed's step, with the norm, Adam and the gathering of weights, within ``note()``."""
        take_step = self.engine._take_model_step

        def noted_step(*arguments: Any) -> None:
            with note():
                take_step(*arguments)

        self.engine._take_model_step = noted_step

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What this process has of the parameters, by their names in a whole GPT."""
        return list(self.engine.module.named_parameters())

    def _fragments(self, named: list[tuple[str, torch.nn.Parameter]]) -> list[Fragment]:
        return fragments(named, self.engine.optimizer, self.adam)

    def _sum(self, counts: torch.Tensor) -> torch.Tensor:
        """What was counted in this process's batches, summed over all that have other ones, in place."""
        return self.groups.sum(counts)

    def _step(self, batches: list[Batch], scale: torch.Tensor) -> None:
        """Backward through the micro-batches' loss sums times ``scale``, and the step, which asks for their sum."""
        self._loss_so_far = torch.zeros((), device=self.device)
        for batch in batches:
            share = self._loss_sum(batch) * scale
            self._loss_so_far += share.detach()
            self.engine.backward(share)
            self.engine.step()

    def _own_loss(self) -> torch.Tensor:
        """This process's share of the last step's loss, 0 where others count it, and not finite if its own is not."""
        first = self.groups.tensor is None or dist.get_rank(self.groups.tensor) == 0
        return self._loss_of_shares() / self.averaged_over * first

    def _loss_of_shares(self) -> torch.Tensor:
        """What ``_step`` has added up of the losses, as this process knows them."""
        return self._loss_so_far

    def _grad_norm(self) -> float:
        """Of the step at hand or the last one; not finite where DeepSpeed's -1 says so."""
        norm = float(
            getattr(self.engine.optimizer, "_global_grad_norm", self.engine.get_global_grad_norm())
        )
        return norm if norm >= 0 else math.nan

    def _norm_to_judge(self) -> float:
        """0 where the loss scale adapts: a norm that is not finite is its overflow then, which DeepSpeed answers."""
        return 0.0 if loss_scale(self.engine.optimizer) else self._grad_norm()

    def _evaluated(self, batches: list[Batch]) -> torch.Tensor:
        """The loss summed over a global batch, of all ranks."""
        return self.groups.sum(sum(self._loss_sum(batch) for batch in batches))

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        tokens, positions, targets = (
            x.to(self.device) for x in (batch.tokens_Bl, batch.positions, batch.targets_Bl)
        )
        return self.engine(tokens, positions, batch.document_starts, targets)

    def _clip_fp32_gradients(self) -> None:
        """In the place of DeepSpeed's own, which it calls without ZeRO in fp32."""
        parameters, max_norm = self.engine.module.parameters(), self.engine.gradient_clipping()
        self.engine._global_grad_norm = clip(parameters, max_norm, self.groups)


def _monitors(config: dict[str, Any]) -> dict[str, Monitor]:
    """Those of DeepSpeed's monitors that ``config`` enables, on global rank 0; one that does not
    start is left out.
    """
    settings, best_effort = get_monitor_config(config), BestEffort()
    started = {}
    for name, kind in _MONITORS.items():
        own = getattr(settings, name)
        if own.enabled and dist.get_rank() == 0 and (monitor := best_effort(name, kind, own)):
            started[name] = monitor.write_events
    return started


def _targets(batches: list[Batch]) -> torch.Tensor:
    """The targets of all micro-batches, int64; there may be no micro-batches."""
    return torch.cat(
        [torch.empty(0, dtype=torch.int64), *(batch.targets_Bl.flatten() for batch in batches)]
    )


def zero3_partitioner(
    setup: Setup, groups: ProcessGroups
) -> Callable[[torch.nn.Parameter], tuple[torch.Tensor, int]] | None:
    """Return a function that partitions an unallocated parameter for ZeRO 3; None: DeepSpeed does.

    DeepSpeed partitions a parameter that exists whole on every rank. The returned function takes
    one with a shape and a type but no memory, and allocates this rank's partition where DeepSpeed
    would. It returns the partition without its padding, and the index of its first element in the
    flattened parameter.
    """
    zero = setup.deepspeed["zero_optimization"]
    if zero["stage"] != 3 or setup.grid.data_context == 1 or zero.keys() & _OTHER_PARTITIONS:
        return None
    offload = zero.get("offload_param", {})
    partitions = deepspeed.zero.Init(
        data_parallel_group=groups.data_context if setup.grid.tensor > 1 else None,
        remote_device=offload.get("device"),
        pin_memory=offload.get("pin_memory", False),
        dtype=setup.precision.dtype,
    )
    # As Init does for a module: under ZeRO 3 every linear layer is DeepSpeed's.
    if zero.get("memory_efficient_linear", True):
        partitions._enable_mem_efficient_linear()

    def partition(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
        partitions._convert_to_deepspeed_param(parameter)
        parameter.ds_numel_aligned = parameter.aligned_size()
        length = parameter.ds_numel_aligned // parameter.ds_zero_partition_world_size
        device = partitions.local_device if parameter.ds_persist else partitions.remote_device
        owned = torch.zeros(length, dtype=parameter.dtype, device=torch.device(device))
        if partitions.pin_memory and owned.device.type == "cpu":
            owned = get_accelerator().pin_memory(owned)
        owned.ds_numel = length
        owned.status = PartitionedParamStatus.AVAILABLE
        owned.final_location = None
        parameter.ds_tensor = owned
        parameter.partition()  # frees the data, of which a partition exists
        start = length * parameter.ds_zero_partition_rank
        return owned[: max(0, min(length, parameter.ds_numel - start))], start

    return partition
