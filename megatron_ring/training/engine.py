"""DeepSpeed, kept behind one door: its engine, driven one optimizer step at a time.

DeepSpeed is shown one data axis of size D x C. ZeRO shards over it and averages gradients over it; ``loss.py`` makes
that average the true token mean. This is the only file that imports deepspeed.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ring.data.loader import Batch
from megatron_ring.data.packing import IGNORED
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.environment import Environment
from megatron_ring.training.loss import counted_tokens, loss_sum, share_of_mean
from megatron_ring.training.setup import Setup

# Said by every process before anything else, and no news to who runs on a CPU; hence before the import.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
import deepspeed  # noqa: E402
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine  # noqa: E402


def start_processes(environment: Environment, device: str) -> None:
    """Join the other processes: NCCL on CUDA, gloo on a CPU. Blocks until all have come."""
    environment.complete()
    if device == "cuda":
        torch.cuda.set_device(environment.local_rank)
    else:
        torch.set_num_threads(environment.threads)
    # DeepSpeed still calls collectives by the names that torch is about to drop.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    # On a CPU DeepSpeed would compile a shared-memory all-reduce for 20 s here. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)


def leave_processes() -> None:
    """Wait for the others, then take the groups down: a rank that just ends can abort another's last transfer."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the global batch's counted tokens, nats. grad_norm: of the whole gradient, before clipping."""

    loss: float
    grad_norm: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """loss_sum: nats over all counted tokens; text_bytes: of the text that their targets stand for."""

    loss_sum: float
    tokens: int
    text_bytes: int


class Engine:
    """A model under DeepSpeed. Every method is collective: all ranks call it, in the same order."""

    def __init__(self, model: torch.nn.Module, parameter_groups: list[dict], setup: Setup, groups: ProcessGroups):
        training = setup.config.training
        optimizer = torch.optim.AdamW(
            parameter_groups,
            lr=0.0,  # train_step sets each step's
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=True,
        )
        self.groups = groups
        self.device = torch.device(setup.device)
        self.averaged_over = setup.grid.data_context * setup.micro_batches
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=setup.deepspeed)
        # Without ZeRO, DeepSpeed's half-precision optimizer takes a step of zeros to make its state. At rate 0 that
        # moves no weight, but AdamW would count it as its first.
        optimizer.state.clear()
        self.files = self.engine.checkpoint_engine = _FilesWithKeptFailures(self.engine._config)
        # DeepSpeed's save copies a script beside the checkpoints, on one rank and unguarded against a full disk.
        self.engine._copy_recovery_script = lambda _: None

    def train_step(self, batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the micro-batches of a global batch."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        count = self.groups.sum(_count(batches, self.device))
        total = torch.zeros((), device=self.device)
        grad_norm = None
        for batch in batches:
            local_sum = self._loss_sum(batch)
            self.engine.backward(share_of_mean(local_sum, count, self.averaged_over))
            if self.engine.is_gradient_accumulation_boundary():
                grad_norm = self._gradient_norm_of_plain_fp32()
            self.engine.step()
            total += local_sum.detach()
        loss = self.groups.sum(total) / count.clamp(min=1)
        if grad_norm is None:
            grad_norm = self.engine.get_global_grad_norm()
        return StepResult(loss.item(), float(grad_norm), int(count))

    def evaluate(self, steps: list[list[Batch]], bytes_per_token: torch.Tensor) -> Evaluation:
        """Sums over whole global batches, without gradients. ``bytes_per_token``: (V,) bytes of text of each id."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        counts = torch.zeros(2, dtype=torch.int64)
        self.engine.eval()
        with torch.no_grad():
            for batch in (batch for batches in steps for batch in batches):
                loss += self._loss_sum(batch)
                counted = batch.targets_Bl[batch.targets_Bl != IGNORED]
                counts += torch.stack([torch.tensor(counted.numel()), bytes_per_token[counted].sum()])
        self.engine.train()
        tokens, text_bytes = self.groups.sum(counts.to(self.device)).tolist()
        return Evaluation(self.groups.sum(loss).item(), tokens, text_bytes)

    def save(self, folder: Path, tag: str) -> list[str]:
        """Write this rank's part of the state to ``folder/tag``. Blocks until every rank has written its own.

        Returns what went wrong on any rank, the same list on all of them.
        """
        self.files.failures.clear()
        self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        failures: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(failures, self.files.failures)
        return [failure for of_rank in failures for failure in of_rank]

    def load(self, checkpoint: Path) -> None:
        """Read back what ``save`` wrote, on the same number of data x context ranks."""
        self.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Hand (name, value, step) to DeepSpeed's monitors: wandb, tensorboard, csv, those that are on."""
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events(events)

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        tokens, targets = batch.tokens_Bl.to(self.device), batch.targets_Bl.to(self.device)
        logits = self.engine(tokens, batch.positions.to(self.device), batch.document_starts)
        return loss_sum(logits, targets)

    def _gradient_norm_of_plain_fp32(self) -> torch.Tensor | None:
        """Without ZeRO, in fp32, DeepSpeed reports no norm; the reduced gradients lie on every rank."""
        if self.engine.zero_optimization() or self.engine.bfloat16_enabled() or self.engine.fp16_enabled():
            return None
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


class _FilesWithKeptFailures(TorchCheckpointEngine):
    """Writes checkpoint files and keeps what goes wrong.

    A rank that left DeepSpeed's save by an exception would leave the others in its barriers; so all reach the end of
    it, and learn there whose disk was full.
    """

    def __init__(self, config_params: Any):
        super().__init__(config_params)
        self.failures: list[str] = []

    def save(self, state_dict: dict, path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.failures.append(f"{Path(path).name}: {getattr(error, 'strerror', None) or error}")


def _count(batches: list[Batch], device: torch.device) -> torch.Tensor:
    return sum(counted_tokens(batch.targets_Bl) for batch in batches).to(device)
