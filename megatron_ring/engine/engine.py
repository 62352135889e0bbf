"""DeepSpeed's engine behind one interface: train steps, evaluation, and checkpoint contents.

DeepSpeed sees one data axis of size data x context. ZeRO shards over it and averages gradients over
it; ``loss_and_norm.py`` makes that average the mean over tokens.
"""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from megatron_ring.checkpoint.finite import NonFiniteTensor, describe_non_finite
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.tensors import WEIGHT, Piece, Shapes, Tensors
from megatron_ring.data.document_boundaries import IGNORE_INDEX
from megatron_ring.data.loader import Batch
from megatron_ring.engine.deepspeed_groups import model_parallel_unit
from megatron_ring.engine.deepspeed_monitors import start_monitors, without_monitors
from megatron_ring.engine.extra_keys import rejected_settings_as_config_error
from megatron_ring.engine.loss_and_norm import (
    StepGate,
    clip_gradients,
    counted_tokens,
    is_counted_here,
    token_mean_factor,
)
from megatron_ring.engine.optimizer_state import (
    Fragment,
    fragments,
    loss_scale,
    set_loss_scale,
    update_compute_weights,
)
from megatron_ring.model.gpt import decay_groups
from megatron_ring.monitoring.non_finite import NonFiniteDetector, NonFiniteReport
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.tensor import whole_shape
from megatron_ring.settings.deepspeed_config import with_bucket_size
from megatron_ring.settings.run_settings import RunSettings


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on all ranks.

    loss: mean over the global batch's counted tokens, in nats. grad_norm: of the whole gradient,
    before clipping. tokens: counted ones. refused: no weight was changed, because the loss or the
    norm is not finite or the loss was above the limit (StepGate).
    """

    loss: float
    grad_norm: float
    tokens: int
    refused: bool


@dataclass(frozen=True)
class Evaluation:
    """Sums over evaluated batches.

    loss_sum: nats over all counted tokens. text_bytes: of the text that their targets stand for.
    """

    loss_sum: float
    tokens: int
    text_bytes: int


class Engine:
    """A model under DeepSpeed. Every method that communicates is called by all ranks in one order.

    These are the constructor, ``train_step``, ``evaluate`` and ``update_compute_weights``.
    """

    def __init__(self, model: torch.nn.Module, setup: RunSettings, groups: ProcessGroups):
        training = setup.config.training
        self.adam = torch.optim.AdamW(
            decay_groups(model, training.weight_decay),
            lr=0.0,  # train_step sets the rate of each step
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            fused=True,
        )
        self.groups = groups
        self.device = torch.device(setup.device)
        self.non_finite_detector = NonFiniteDetector(model, self.device)
        self.averaged_over = setup.grid.data_context * setup.micro_batches
        settings = without_monitors(setup.deepspeed)
        # DeepSpeed computes the norm only where it clips, and we always report it.
        settings["gradient_clipping"] = training.clip_grad or math.inf
        settings = with_bucket_size(settings, _element_count(model))
        with rejected_settings_as_config_error():
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.adam,
                config=settings,
                mpu=model_parallel_unit(setup.grid, groups),
            )
        # Without ZeRO, DeepSpeed's half-precision optimizer takes a step with zero gradients to
        # allocate its state. At rate 0 that changes no weight, but AdamW would count the step.
        self.adam.state.clear()
        self.engine.clip_fp32_gradients = self._clip_fp32_gradients
        self.monitors = start_monitors(setup.deepspeed)
        adam_step = self.adam.step
        self.adam.step = lambda: None if self.step_gate.refused else adam_step()

    def train_step(
        self, batches: list[Batch], learning_rate: float, highest_loss: float = math.inf
    ) -> StepResult:
        """Run one optimizer step over the micro-batches of a global batch.

        ``batches`` is empty on pipeline stages after the first. The step is refused, and changes no
        weight, if its loss is above ``highest_loss`` or the loss or gradient is not finite.

        The host reads the results from the device, so all work of the step on its stream is done
        when this returns. Monitoring relies on that (parallel/device_clock.py).
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        count = self._sum_counts(counted_tokens(_targets(batches)).to(self.device))
        self.step_gate = StepGate(self._own_loss, self._norm_for_gate, highest_loss)
        self.non_finite_detector.begin()
        self._run_step(batches, token_mean_factor(count, self.averaged_over))
        return StepResult(
            loss=self.step_gate.loss,
            grad_norm=self._grad_norm(),
            tokens=int(count),
            refused=self.step_gate.refused,
        )

    def non_finite_report(self) -> NonFiniteReport:
        """Return where this rank found non-finite values in the last step. Does not communicate."""
        return self.non_finite_detector.seen(dist.get_rank(), self._own_loss())

    def evaluate(self, steps: list[list[Batch]], bytes_per_token: torch.Tensor) -> Evaluation:
        """Sum the loss over whole global batches, without gradients.

        ``bytes_per_token``: (V,), the bytes of text of each token id.
        """
        targets = _targets([batch for batches in steps for batch in batches])
        counted = targets[targets != IGNORE_INDEX]
        counts = torch.stack([torch.tensor(len(counted)), bytes_per_token[counted].sum()])
        self.engine.eval()
        with torch.no_grad():
            loss = sum(self._global_loss_sum(batches).double() for batches in steps)
        self.engine.train()
        tokens, text_bytes = self._sum_counts(counts.to(self.device)).tolist()
        return Evaluation(float(loss), tokens, text_bytes)

    def shapes(self) -> Shapes:
        """Return the whole shapes of the parameters of which this process holds a part."""
        return {name: whole_shape(parameter) for name, parameter in self.named_parameters()}

    def pieces(self) -> list[Piece]:
        """Return what this rank writes to a checkpoint, as views of its memory.

        The pieces of all ranks cover every element exactly once.
        """
        counted = [
            (name, p) for name, p in self.named_parameters() if is_counted_here(p, self.groups)
        ]
        rank, ranks = self.groups.data_context_rank_and_size
        pieces = []
        for fragment in self._fragments(counted):
            pieces += fragment.pieces_to_save(rank, ranks)
        return pieces

    def optimizer_counters(self) -> dict[str, Any]:
        """Return the optimizer's counters for a checkpoint's RunState, by its field names."""
        steps = [int(moments["step"]) for moments in self.adam.state.values()]
        return {
            "optimizer_steps": max(steps, default=0),
            "loss_scale": loss_scale(self.engine.optimizer),
        }

    @torch.no_grad()
    def load(self, tensors: Tensors, state: RunState) -> None:
        """Load weights, and optimizer state if it has taken steps, from a checkpoint of any grid.

        ``update_compute_weights`` must follow. Does not communicate. Raises CheckpointError on the
        ranks that find one of their parameters missing or of another shape, NonFiniteTensor on
        those that read a value that is nan or infinite.
        """
        tensors.check_shapes(self.shapes())
        with_moments = state.optimizer_steps > 0
        kinds = tensors.kinds if with_moments else [WEIGHT]
        non_finite = Counter[str]()
        for fragment in self._fragments(self.named_parameters()):
            for kind, count in fragment.load(tensors, kinds).items():
                non_finite[f"{kind}/{fragment.name}"] += count
        if non_finite:
            raise NonFiniteTensor(
                describe_non_finite(name, count) for name, count in sorted(non_finite.items())
            )
        for moments in self.adam.state.values():
            if not with_moments:
                # After a roll back to a checkpoint of weights alone, Adam still has moments.
                for moment in moments.values():
                    moment.zero_()
            moments["step"].fill_(state.optimizer_steps)
        set_loss_scale(self.engine.optimizer, state.loss_scale)

    @torch.no_grad()
    def update_compute_weights(self) -> None:
        """Copy the weights that ``load`` has changed to those that compute. Collective; blocks."""
        update_compute_weights(self.engine.optimizer)

    def wrap_optimizer_step(self, context: Callable[[], AbstractContextManager]) -> None:
        """From now on run DeepSpeed's step within ``context()``.

        The step consists of the gradient norm, Adam and the all-gather of weights.
        """
        # _take_model_step (DeepSpeed 0.19.8, runtime/engine.py): both engines call it once a step,
        # after the gradients are reduced. If it changes, look at its callers there and in pipe/.
        take_model_step = self.engine._take_model_step

        def wrapped(*arguments: Any) -> None:
            with context():
                take_model_step(*arguments)

        self.engine._take_model_step = wrapped

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return this process's parts of the parameters, by their names in a whole GPT."""
        return list(self.engine.module.named_parameters())

    def _fragments(self, named: list[tuple[str, torch.nn.Parameter]]) -> list[Fragment]:
        return fragments(named, self.engine.optimizer, self.adam)

    def _sum_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum counts of this rank's batches over the data x context ranks, in place; blocks."""
        return self.groups.sum(counts)

    def _run_step(self, batches: list[Batch], factor: torch.Tensor) -> None:
        """Run backward through every micro-batch's loss sum times ``factor``, and the update."""
        self._loss_so_far = torch.zeros((), device=self.device)
        for batch in batches:
            share = self._loss_sum(batch) * factor
            self._loss_so_far += share.detach()
            self.engine.backward(share)
            self.engine.step()

    def _own_loss(self) -> torch.Tensor:
        """Return this rank's share of the last step's loss.

        It is not finite if this rank's own loss is not; otherwise it is 0 on tensor ranks after the
        first, which share the first one's loss.
        """
        is_first_tensor_rank = self.groups.tensor is None or dist.get_rank(self.groups.tensor) == 0
        return self._step_loss_sum() / self.averaged_over * is_first_tensor_rank

    def _step_loss_sum(self) -> torch.Tensor:
        """Return the micro-batch losses that ``_run_step`` has added up on this rank."""
        return self._loss_so_far

    def _grad_norm(self) -> float:
        """Norm of the gradient of the current or last step; nan where DeepSpeed reports -1."""
        # _global_grad_norm: set by DeepSpeed's optimizers (0.19.8) before they call Adam, while the
        # engine's public get_global_grad_norm() is updated only afterwards.
        before_update = getattr(
            self.engine.optimizer, "_global_grad_norm", self.engine.get_global_grad_norm()
        )
        norm = float(before_update)
        return norm if norm >= 0 else math.nan

    def _norm_for_gate(self) -> float:
        """Return the norm, or 0 under a dynamic loss scale.

        A non-finite norm is an overflow of the loss scale there, which DeepSpeed handles itself.
        """
        return 0.0 if loss_scale(self.engine.optimizer) else self._grad_norm()

    def _global_loss_sum(self, batches: list[Batch]) -> torch.Tensor:
        """Return the loss summed over a global batch, over all ranks; blocks."""
        return self.groups.sum(sum(self._loss_sum(batch) for batch in batches))

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        tokens_Bl = batch.tokens_Bl.to(self.device)
        positions = batch.positions.to(self.device)
        targets_Bl = batch.targets_Bl.to(self.device)
        return self.engine(tokens_Bl, positions, batch.document_starts, targets_Bl)

    def _clip_fp32_gradients(self) -> None:
        """Replace DeepSpeed's method of this name, which it calls in fp32 without ZeRO."""
        parameters = self.engine.module.parameters()
        max_norm = self.engine.gradient_clipping()
        self.engine._global_grad_norm = clip_gradients(parameters, max_norm, self.groups)


def _element_count(model: torch.nn.Module) -> int:
    """Return the elements of the parameters of this process; those that ZeRO 3 splits count whole.

    The same on all ranks of data x context, which have to fill their buckets alike.
    """
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _targets(batches: list[Batch]) -> torch.Tensor:
    """Return the targets of all micro-batches as one int64 vector, empty if there are none."""
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([empty, *(batch.targets_Bl.flatten() for batch in batches)])
