"""The ``training`` and ``memory`` sections: batch, optimizer, precision, and memory savings."""

from dataclasses import dataclass, field
from typing import Literal

import tyro
from pydantic import JsonValue

from megatron_ring.config.checks import negative
from megatron_ring.errors import flag, not_positive

# --lr-warmup-iters auto: this part of the schedule's steps, at most that many.
_AUTO_WARMUP_SHARE = 10
_MAX_AUTO_WARMUP = 20
# --min-lr auto: this part of the peak, at most that.
_AUTO_MIN_LR_SHARE = 10
_MAX_AUTO_MIN_LR = 1e-4


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, optimizer, learning-rate schedule, precision and evaluation."""

    train_iters: int = 200
    """Number of optimizer steps."""
    micro_batch_size: int = 1
    """Sequences B of a micro-batch on each data rank."""
    global_batch_size: int = 0
    """Sequences of an optimizer step, over all data ranks and micro-batches. 0: micro_batch_size x
    data ranks, that is no gradient accumulation."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float | Literal["auto"] = "auto"
    """Learning rate at the end of cosine or linear decay. auto: a tenth of lr, at most 1e-4.
    Checkpoints store the number, and a run that resumes from one with auto and the same lr keeps
    it."""
    lr_warmup_iters: int | Literal["auto"] = "auto"
    """Steps of linear warm-up from 0. auto: a tenth of the schedule's steps (lr_decay_iters, or
    else train_iters), at most 20. Checkpoints store the number, and a run that resumes from one
    with auto keeps it, however many steps it has."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    lr_decay_iters: int = 0
    """Steps, warm-up included, after which the learning rate has reached min_lr and stays there. It
    does not depend on train_iters, so a run that is continued with more steps keeps its schedule.
    0: train_iters."""
    weight_decay: float = 0.1
    """AdamW weight decay, applied to matrices only."""
    adam_beta1: float = 0.9
    """AdamW decay rate of the first moment."""
    adam_beta2: float = 0.95
    """AdamW decay rate of the second moment."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Maximum global gradient norm. 0: no clipping."""
    seed: int = 1234
    """Random seed of the initial weights and the order of samples; nothing else is random."""
    deterministic: bool = False
    """Make runs bitwise reproducible on the same number of the same devices. Kernels and operators
    whose accumulation order varies are refused."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute dtype. auto: bf16 if the device multiplies it natively, else fp32. fp16 needs
    CUDA."""
    fused_operations: Literal["auto", "torch", "triton", "liger", "flash-attn", "apex"] = "auto"
    """Library that computes norms, RoPE, SwiGLU and the cross entropy; torch computes what it does
    not have. auto: on CUDA, for each operation, the first of triton (this project's own kernels),
    liger, flash-attn and apex that is installed and has it; else torch. docs/fused.md has the
    table."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage over data x context ranks. 1 partitions the optimizer state, 2 gradients
    too, 3 parameters too."""
    eval_interval: int = 100
    """Steps between validations; there is also one before the first step and one after the last. 0:
    no validation; the test share of --split is evaluated all the same."""
    eval_iters: int = 8
    """Global batches of a validation, and of the test."""
    deepspeed: tyro.conf.Suppress[tyro.conf.Fixed[dict[str, JsonValue]]] = field(
        default_factory=dict
    )
    """Extra keys for DeepSpeed's own config (YAML only). Keys that other options determine and
    keys that DeepSpeed does not read are refused."""

    @property
    def decay_horizon(self) -> int:
        """The step at which cosine or linear decay reaches min_lr."""
        return self.lr_decay_iters or self.train_iters

    @property
    def final_lr(self) -> float:
        """The rate at the end of cosine or linear decay: min_lr, with auto resolved."""
        if self.min_lr != "auto":
            return self.min_lr
        return min(_MAX_AUTO_MIN_LR, self.lr / _AUTO_MIN_LR_SHARE)

    @property
    def warmup_iters(self) -> int:
        """The steps of the warm-up, with auto resolved."""
        if self.lr_warmup_iters != "auto":
            return self.lr_warmup_iters
        return min(_MAX_AUTO_WARMUP, self.decay_horizon // _AUTO_WARMUP_SHARE)

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        problems = not_positive(
            self, "train_iters", "micro_batch_size", "eval_iters", "lr", "adam_eps"
        )
        problems += negative(
            self,
            "global_batch_size",
            "weight_decay",
            "clip_grad",
            "lr_decay_iters",
            "seed",
            "eval_interval",
        )
        numbers_or_auto = ("min_lr", "lr_warmup_iters")
        problems += negative(self, *(n for n in numbers_or_auto if getattr(self, n) != "auto"))
        for name in ("adam_beta1", "adam_beta2"):
            beta = getattr(self, name)
            if not 0 <= beta < 1:
                problems.append(f"{name} {beta} must be at least 0 and below 1. Set {flag(name)}.")
        return problems + self._schedule_problems()

    def _schedule_problems(self) -> list[str]:
        problems = []
        if self.min_lr != "auto" and self.min_lr > self.lr:
            problems.append(
                f"min_lr {self.min_lr} is above lr {self.lr}. Set --min-lr auto (a tenth of lr), "
                "or "
                "--lr."
            )
        if self.lr_decay_style == "constant" and self.lr_decay_iters > 0:
            problems.append(
                f"lr_decay_iters {self.lr_decay_iters} has no effect with lr_decay_style constant. "
                "Set --lr-decay-iters 0, or --lr-decay-style cosine or linear."
            )
        explicit = self.lr_warmup_iters != "auto"  # auto leaves steps for the decay
        if (
            explicit
            and self.lr_decay_style != "constant"
            and self.lr_warmup_iters >= self.decay_horizon
        ):
            end = "train_iters"
            remedy = f"--lr-warmup-iters to at most {self.decay_horizon - 1}"
            if self.lr_decay_iters:
                end = "lr_decay_iters"
                remedy += f", --lr-decay-iters to at least {self.lr_warmup_iters + 1}"
            problems.append(
                f"lr_warmup_iters {self.lr_warmup_iters} must be below {end} {self.decay_horizon}, "
                f"to leave steps for the decay. Set {remedy}, or --lr-decay-style constant."
            )
        return problems


@dataclass(frozen=True)
class MemoryConfig:
    """Recompute, chunking and offload, which save memory."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What backward recomputes. selective: everything except matmuls and attention; full:
    everything except attention; none: nothing."""
    recompute_attention: bool = False
    """Recompute attention too, with --recompute full. A layer then keeps only its input, and the
    ring runs twice."""
    mlp_chunks: int = 1
    """Number of chunks of the sequence that the feed-forward network computes one after another. If
    above 1, backward recomputes each chunk."""
    loss_chunk_size: int = 1024
    """Tokens whose logits are in memory at a time; output head and cross entropy are computed
    together. 0: all tokens at once."""
    offload_activations: bool = False
    """Keep the activations for backward in CPU memory, and prefetch them. CUDA only."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Memory in which DeepSpeed keeps and updates the optimizer state. cpu needs ZeRO stage 1, 2 or
    3."""
    offload_param: Literal["none", "cpu"] = "none"
    """Memory in which DeepSpeed keeps parameters that are not in use. cpu needs ZeRO stage 3."""

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        problems = not_positive(self, "mlp_chunks") + negative(self, "loss_chunk_size")
        if self.recompute_attention and self.recompute != "full":
            problems.append(
                f"recompute_attention has no effect with recompute {self.recompute}. "
                "Set --recompute full, or leave out --recompute-attention."
            )
        return problems
