"""Rules between sections: what a model, its batch and its memory ask of the grid, of ZeRO and of the device.

A rule looks at a whole config on a grid and gives its message where it is broken: what was asked, the rule with its
numbers, what would be legal, and the flag. Rules assume nothing of one another, so all that is wrong is said at once.
"""

from collections.abc import Callable

from megatron_ring.config import Config
from megatron_ring.context_parallel.invariant import BLOCKS
from megatron_ring.errors import ConfigError, nearest_multiples
from megatron_ring.parallel.degrees import divisors
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings import lengths
from megatron_ring.settings.precision import precision


def problems(config: Config, grid: Grid, device: str) -> list[str]:
    """All that keeps ``config`` from running on ``grid``, but what its sections know of themselves."""
    found = [message for rule in RULES if (message := rule(config, grid))]
    return lengths.problems(config, grid) + found + _device_problems(config, grid, device)


def _heads(config: Config, grid: Grid) -> str | None:
    heads, split = config.model.num_attention_heads, grid.tensor * grid.ulysses
    if heads % split == 0:
        return None
    return (
        f"num_attention_heads {heads} must be a multiple of {split} (tensor_model_parallel_size {grid.tensor} x "
        f"ulysses_degree {grid.ulysses}): heads are split over tensor ranks, then traded among Ulysses ranks. Nearest: "
        f"{nearest_multiples(heads, split)}; with {heads} heads the product may be {divisors(heads)}. "
        "Set --num-attention-heads, --tensor-model-parallel-size or --ulysses-degree."
    )


def _query_groups(config: Config, grid: Grid) -> str | None:
    heads, groups = config.model.num_attention_heads, config.model.key_value_heads
    if groups == heads or groups % grid.tensor == 0:
        return None
    legal = [str(n) for n in range(grid.tensor, heads + 1, grid.tensor) if heads % n == 0]
    return (
        f"num_query_groups {groups} must be a multiple of tensor_model_parallel_size {grid.tensor}: key-value heads "
        "are split over tensor ranks, not repeated there. Set --tensor-model-parallel-size "
        f"(legal: {divisors(groups)}), or --num-query-groups (legal: {', '.join(legal) or 'none'})."
    )


def _feed_forward(config: Config, grid: Grid) -> str | None:
    size = config.model.feed_forward_size
    if size % grid.tensor == 0:
        return None
    return (
        f"ffn_hidden_size {size} must be a multiple of tensor_model_parallel_size {grid.tensor}, whose ranks split it. "
        f"Nearest: {nearest_multiples(size, grid.tensor)}. Set --ffn-hidden-size or --tensor-model-parallel-size."
    )


def _sequence_parallel(config: Config, grid: Grid) -> str | None:
    if grid.tensor > 1 or not config.parallel.sequence_parallel:
        return None
    return (
        "sequence_parallel has no effect while tensor_model_parallel_size is 1. "
        "Set --tensor-model-parallel-size, or leave --sequence-parallel out."
    )


def _stages(config: Config, grid: Grid) -> str | None:
    layers = config.model.num_layers
    if not 0 < layers < grid.pipe:
        return None
    return (
        f"num_layers {layers} leaves stages of pipeline_model_parallel_size {grid.pipe} without a layer. Set "
        f"--num-layers to at least {grid.pipe}, or --pipeline-model-parallel-size to at most {layers}."
    )


def _batch(config: Config, grid: Grid) -> str | None:
    micro, whole = config.training.micro_batch_size, config.training.global_batch_size
    if micro < 1 or whole <= 0 or whole % (micro * grid.data) == 0:
        return None
    return (
        f"global_batch_size {whole} must be a positive multiple of {micro * grid.data} (micro_batch_size {micro} x "
        f"{grid.data} data ranks). Nearest: {nearest_multiples(whole, micro * grid.data)}. Set --global-batch-size."
    )


def _mlp_chunks(config: Config, grid: Grid) -> str | None:
    tokens = lengths.laid_out_length(config, grid) // (
        grid.context * lengths.tokens_are_shared_by(config, grid)
    )
    chunks = config.memory.mlp_chunks
    if not 0 < tokens < chunks:
        return None
    return (
        f"mlp_chunks {chunks} is more than the {tokens} tokens that a process has of a sequence. "
        f"Set --mlp-chunks to at most {tokens}."
    )


def _stages_keep_gradients(config: Config, grid: Grid) -> str | None:
    stage = config.training.zero_stage
    if grid.pipe == 1 or stage < 2:
        return None
    return (
        f"zero_stage {stage} splits gradients, but stages of pipeline_model_parallel_size {grid.pipe} keep theirs "
        "whole until the last micro-batch. Legal: 0, 1. Set --zero-stage 1, or --pipeline-model-parallel-size 1."
    )


def _offload_optimizer(config: Config, grid: Grid) -> str | None:
    if config.memory.offload_optimizer == "none" or config.training.zero_stage > 0:
        return None
    return (
        "offload_optimizer cpu moves what ZeRO keeps of the optimizer, and with zero_stage 0 that is nothing. "
        "Legal: 1, 2, 3. Set --zero-stage 1, or --offload-optimizer none."
    )


def _offload_param(config: Config, grid: Grid) -> str | None:
    stage = config.training.zero_stage
    if config.memory.offload_param == "none" or (stage == 3 and grid.pipe == 1):
        return None
    if grid.pipe > 1:
        return (
            "offload_param cpu needs zero_stage 3, which no pipeline takes. "
            "Set --offload-param none, or --pipeline-model-parallel-size 1 with --zero-stage 3."
        )
    return (
        f"offload_param cpu moves parameters that ZeRO 3 has split, and zero_stage is {stage}. "
        "Legal: 3. Set --zero-stage 3, or --offload-param none."
    )


def _roll_back(config: Config, grid: Grid) -> str | None:
    saving = config.checkpoint
    if config.guards.on_bad_step != "roll-back" or saving.save_interval:
        return None
    return (
        f"on_bad_step roll-back needs checkpoints to go back to, and save_interval is 0, with save "
        f"{saving.save or 'empty'}. Set --save and --save-interval, or --on-bad-step skip."
    )


def _blocks_of_ranks(config: Config, grid: Grid) -> str | None:
    parallel = config.parallel
    if parallel.context_parallel_reduction == "arrival" or grid.ring == 1:
        return None
    single_tokens = parallel.context_parallel == "striped" and parallel.stripe_size in ("auto", 1)
    if single_tokens and BLOCKS % grid.ring == 0:
        return None
    return (
        f"context_parallel_reduction invariant adds up over {BLOCKS} blocks of a sample, each whole on a rank, but "
        f"context_parallel is {parallel.context_parallel} with stripe_size {parallel.stripe_size} on {grid.ring} ring "
        f"ranks. Legal: striped with 1 on {divisors(BLOCKS)} ring ranks. Set --context-parallel striped with "
        "--stripe-size 1, --context-parallel-size, or --context-parallel-reduction arrival."
    )


def _blocks_of_sample(config: Config, grid: Grid) -> str | None:
    length = lengths.laid_out_length(config, grid)
    if config.parallel.context_parallel_reduction == "arrival" or length % BLOCKS == 0:
        return None
    return (
        f"seq_length {length} does not divide into the {BLOCKS} blocks of context_parallel_reduction invariant. "
        f"Nearest: {nearest_multiples(length, BLOCKS)}. Set --seq-length, or --context-parallel-reduction arrival."
    )


RULES: tuple[Callable[[Config, Grid], str | None], ...] = (
    _heads,
    _query_groups,
    _feed_forward,
    _sequence_parallel,
    _stages,
    _batch,
    _mlp_chunks,
    _stages_keep_gradients,
    _offload_optimizer,
    _offload_param,
    _roll_back,
    _blocks_of_ranks,
    _blocks_of_sample,
)


def _device_problems(config: Config, grid: Grid, device: str) -> list[str]:
    try:
        found = [_half_without_zero(config, grid, precision(config.training.dtype, device).name)]
    except ConfigError as refused:
        found = refused.problems
    if config.memory.offload_activations and device == "cpu":
        found.append(
            "offload_activations has no effect on this device, a CPU: activations lie in its memory already. "
            "Leave --offload-activations out."
        )
    if config.logging.profile_ring and device == "cuda":
        found.append(
            "profile_ring counts what the host waits, but on this device, CUDA, the device waits for transfers and not "
            "the host: its figures would be wrong. Leave --profile-ring out."
        )
    return [message for message in found if message]


def _half_without_zero(config: Config, grid: Grid, dtype: str) -> str | None:
    # Of gradients in half precision DeepSpeed's optimizer without ZeRO cannot tell whose they are. A pipeline's in
    # bfloat16 is another one, and right.
    wrong = {
        "fp32": False,
        "bf16": grid.tensor > 1 and grid.pipe == 1,
        "fp16": grid.tensor * grid.pipe > 1,
    }
    if config.training.zero_stage > 0 or not wrong[dtype]:
        return None
    return (
        f"zero_stage 0 in {dtype} would count the gradient's norm wrongly (DeepSpeed's optimizer for it does) where "
        f"{grid.tensor * grid.pipe} processes share a model: {grid.tensor} tensor x {grid.pipe} pipeline ranks. "
        "Set --zero-stage 1, or --dtype fp32."
    )
