"""The ``parallel`` section: how sequences, layers and weights are split over processes."""

from dataclasses import dataclass
from typing import Literal

from megatron_ring.config.checks import negative
from megatron_ring.errors import not_positive


@dataclass(frozen=True)
class ParallelConfig:
    """How sequences, layers and weights are split over processes."""

    context_parallel: Literal["none", "ring", "striped", "zigzag"] = "none"
    """Layout of a sequence over the ranks of a ring. ring: contiguous shards; striped: stripes of
    stripe_size tokens, assigned round-robin; zigzag: each rank has a chunk of the first half and
    the mirrored one of the second; none: sequences are not split."""
    context_parallel_size: int = 0
    """Number of processes N that split one sequence. 0: all that tensor and pipeline parallelism
    leave, or 1 with --context-parallel none."""
    ulysses_degree: int = 1
    """Ulysses degree U: N = R x U processes form a ring of R members, and the U processes of a
    member exchange heads for sequence by all-to-all. 1: ring only."""
    stripe_size: int | Literal["auto"] = "auto"
    """Stripe size of the striped layout, in tokens; 1 as in the Striped Attention paper. auto: the
    fastest with the attention kernel, the device and the mask, as measured; resolved anew on
    resume."""
    document_placement: Literal["spread", "auto"] = "spread"
    """Where the documents of a packed sample go in a striped ring. spread: each is distributed
    over all ranks; auto: short ones are assigned whole to one rank and long ones are distributed in
    blocks of 128 tokens, decided for each sample from its documents, and spread where that gains
    nothing. Needs --reset-attention-mask."""
    context_parallel_reduction: Literal["arrival", "invariant"] = "arrival"
    """Accumulation order of a ring. arrival: in hop order (fast); invariant: in an order that does
    not depend on the ring size, so that attention is bitwise equal on rings of 1, 2, 4 and 8 ranks
    (slower; striped layout with stripe size 1 only)."""
    attention_kernel: Literal["auto", "flash", "cudnn", "sdpa", "triton", "reference"] = "auto"
    """Attention kernel of a hop. flash: flash-attn; cudnn: cuDNN; sdpa: torch's fused attention;
    triton: this package's kernel; reference: plain torch. auto: the fastest, as measured, that
    supports the device, dtype, head dim and mask; the console shows the choice and the reason."""
    tensor_model_parallel_size: int = 1
    """Tensor-parallel size T: number of processes that split every layer."""
    sequence_parallel: bool = False
    """Split the tokens between layers over the tensor ranks, as Megatron's sequence parallelism
    does. Attention is not split by it."""
    pipeline_model_parallel_size: int = 1
    """Pipeline-parallel size P: number of stages that the layers are divided into."""
    ring_timeout: int = 600
    """Seconds that a rank waits for another one of its ring. Then every rank reports its progress,
    and the job ends with exit code 76. Must exceed the longest legitimate stall (load, save,
    compile). Time in which the process is suspended does not count. On CUDA this holds for a rank
    that has ended or does not respond; if all respond, torch aborts a minute later with its own
    exit code. 0: no limit."""
    world_size: int = 0
    """Number of processes that this config is meant for: --dry-run plans with it, and a run must
    have it. 0: any number."""

    def problems(self) -> list[str]:
        """Return all problems of this section."""
        sizes = ["ulysses_degree", "tensor_model_parallel_size", "pipeline_model_parallel_size"]
        if self.stripe_size != "auto":
            sizes.append("stripe_size")
        problems = not_positive(self, *sizes)
        return problems + negative(self, "context_parallel_size", "ring_timeout", "world_size")
