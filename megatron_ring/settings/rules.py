"""Rules between sections: what the model, the batch and memory options require of grid and device.

A rule checks a whole config on a grid. Where it is broken it returns a message with the requested
value, the rule and its numbers, legal values, and the flag. Rules do not depend on each other, so
that all problems are reported together.
"""

from collections.abc import Callable

from megatron_ring.config import Config
from megatron_ring.config.checks import divisors
from megatron_ring.context_parallel.invariant import BLOCKS
from megatron_ring.errors import ConfigError, counted, nearest_multiples
from megatron_ring.parallel.grid import Grid
from megatron_ring.settings import lengths
from megatron_ring.settings.precision import precision


def problems(config: Config, grid: Grid, device: str) -> list[str]:
    """Return why ``config`` cannot run on ``grid``, apart from problems within a section."""
    broken = [message for rule in RULES if (message := rule(config, grid))]
    return lengths.problems(config, grid) + broken + _device_problems(config, grid, device)


def _heads(config: Config, grid: Grid) -> str | None:
    heads = config.model.num_attention_heads
    split = grid.tensor * grid.ulysses
    if heads % split == 0:
        return None
    return (
        f"num_attention_heads {heads} must be a multiple of {split} (tensor_model_parallel_size "
        f"{grid.tensor} x ulysses_degree {grid.ulysses}): heads are split over tensor ranks, then "
        f"over Ulysses ranks. Nearest: {nearest_multiples(heads, split)}; with {heads} heads the "
        f"product may be {_list(divisors(heads))}. Set --num-attention-heads, "
        "--tensor-model-parallel-size or --ulysses-degree."
    )


def _query_groups(config: Config, grid: Grid) -> str | None:
    heads = config.model.num_attention_heads
    groups = config.model.key_value_heads
    if groups == heads or groups % grid.tensor == 0:
        return None
    legal = [n for n in divisors(heads) if n % grid.tensor == 0]
    return (
        f"num_query_groups {groups} must be a multiple of tensor_model_parallel_size "
        f"{grid.tensor}: key-value heads are split over tensor ranks, not repeated. Set "
        f"--tensor-model-parallel-size (legal: {_list(divisors(groups))}), or --num-query-groups "
        f"(legal: {_list(legal) or 'none'})."
    )


def _feed_forward(config: Config, grid: Grid) -> str | None:
    size = config.model.feed_forward_size
    if size % grid.tensor == 0:
        return None
    return (
        f"ffn_hidden_size {size} must be a multiple of tensor_model_parallel_size {grid.tensor}, "
        f"whose ranks split it. Nearest: {nearest_multiples(size, grid.tensor)}. Set "
        "--ffn-hidden-size or --tensor-model-parallel-size."
    )


def _sequence_parallel(config: Config, grid: Grid) -> str | None:
    if grid.tensor > 1 or not config.parallel.sequence_parallel:
        return None
    return (
        "sequence_parallel has no effect while tensor_model_parallel_size is 1. "
        "Set --tensor-model-parallel-size, or leave out --sequence-parallel."
    )


def _stages(config: Config, grid: Grid) -> str | None:
    layers = config.model.num_layers
    if not 0 < layers < grid.pipe:
        return None
    return (
        f"num_layers {layers} is less than pipeline_model_parallel_size {grid.pipe}: every stage "
        f"needs a layer. Set --num-layers to at least {grid.pipe}, or "
        f"--pipeline-model-parallel-size to at most {layers}."
    )


def _batch(config: Config, grid: Grid) -> str | None:
    micro_batch = config.training.micro_batch_size
    global_batch = config.training.global_batch_size
    if micro_batch < 1 or global_batch <= 0:
        return None
    multiple = micro_batch * grid.data
    if global_batch % multiple == 0:
        return None
    return (
        f"global_batch_size {global_batch} must be a multiple of {multiple} (micro_batch_size "
        f"{micro_batch} x {counted(grid.data, 'data rank')}). Nearest: "
        f"{nearest_multiples(global_batch, multiple)}. Set --global-batch-size."
    )


def _mlp_chunks(config: Config, grid: Grid) -> str | None:
    length = lengths.padded_length(config, grid)
    if length < 1:
        return None  # reported by its section
    parts = grid.context * lengths.tensor_ranks_per_token_split(config, grid)
    # A length of fewer tokens than parts is illegal; with a legal one each process has a token.
    tokens = max(length // parts, 1)
    chunks = config.memory.mlp_chunks
    if chunks <= tokens:
        return None
    return (
        f"mlp_chunks {chunks} is more than the {counted(tokens, 'token')} of a sequence on each "
        f"process. Set --mlp-chunks to at most {tokens}."
    )


def _zero_in_pipeline(config: Config, grid: Grid) -> str | None:
    stage = config.training.zero_stage
    if grid.pipe == 1 or stage < 2:
        return None
    return (
        f"zero_stage {stage} splits gradients, but stages of pipeline_model_parallel_size "
        f"{grid.pipe} keep theirs whole until the last micro-batch. Legal: 0, 1. "
        "Set --zero-stage 1, or --pipeline-model-parallel-size 1."
    )


def _offload_optimizer(config: Config, grid: Grid) -> str | None:
    if config.memory.offload_optimizer == "none" or config.training.zero_stage > 0:
        return None
    return (
        "offload_optimizer cpu moves the optimizer state that ZeRO partitions, and zero_stage 0 "
        "does not partition it. Legal: 1, 2, 3. Set --zero-stage 1, or --offload-optimizer none."
    )


def _offload_param(config: Config, grid: Grid) -> str | None:
    stage = config.training.zero_stage
    if config.memory.offload_param == "none" or (stage == 3 and grid.pipe == 1):
        return None
    if grid.pipe > 1:
        return (
            "offload_param cpu needs zero_stage 3, which pipelines do not support. Set "
            "--offload-param none, or --pipeline-model-parallel-size 1 with --zero-stage 3."
        )
    return (
        "offload_param cpu moves the parameters that ZeRO 3 partitions, but zero_stage is "
        f"{stage}. Legal: 3. Set --zero-stage 3, or --offload-param none."
    )


def _roll_back(config: Config, grid: Grid) -> str | None:
    checkpoint = config.checkpoint
    if config.guards.on_bad_step != "roll-back" or checkpoint.save_interval:
        return None
    return (
        "on_bad_step roll-back needs checkpoints to roll back to, but save_interval is 0, with "
        f"save {checkpoint.save or 'empty'}. Set --save and --save-interval, or --on-bad-step skip."
    )


def _invariant_ranks(config: Config, grid: Grid) -> str | None:
    parallel = config.parallel
    if parallel.context_parallel_reduction == "arrival" or grid.ring == 1:
        return None
    if lengths.stripes_single_tokens(config) and BLOCKS % grid.ring == 0:
        return None
    return (
        f"context_parallel_reduction invariant accumulates over {BLOCKS} blocks of a sample, each "
        f"whole on a rank, but context_parallel is {parallel.context_parallel} with stripe_size "
        f"{parallel.stripe_size} on {counted(grid.ring, 'ring rank')}. Legal: striped with "
        f"stripe_size 1 on {_list(divisors(BLOCKS))} ring ranks. Set --context-parallel striped "
        "with --stripe-size 1, --context-parallel-size, or --context-parallel-reduction arrival."
    )


def _invariant_length(config: Config, grid: Grid) -> str | None:
    length = lengths.padded_length(config, grid)
    if config.parallel.context_parallel_reduction == "arrival" or length % BLOCKS == 0:
        return None
    return (
        f"seq_length {length} must be a multiple of {BLOCKS}, the number of blocks of "
        f"context_parallel_reduction invariant. Nearest: {nearest_multiples(length, BLOCKS)}. "
        "Set --seq-length, or --context-parallel-reduction arrival."
    )


def _placement_layout(config: Config, grid: Grid) -> str | None:
    parallel = config.parallel
    if not _places_documents(config, grid) or parallel.context_parallel == "striped":
        return None
    return (
        "document_placement auto assigns what it does not place as context_parallel striped does, "
        f"but context_parallel is {parallel.context_parallel}. Set --context-parallel striped, or "
        "--document-placement spread."
    )


def _placement_documents(config: Config, grid: Grid) -> str | None:
    if not _places_documents(config, grid) or config.data.reset_attention_mask:
        return None
    return (
        "document_placement auto places documents that do not attend to each other, but "
        "reset_attention_mask is off, so a sample is one document. Set --reset-attention-mask, "
        "or --document-placement spread."
    )


def _placement_reduction(config: Config, grid: Grid) -> str | None:
    reduction = config.parallel.context_parallel_reduction
    if not _places_documents(config, grid) or reduction == "arrival":
        return None
    return (
        "document_placement auto gives each sample an order of its own, but "
        "context_parallel_reduction invariant adds up in the order of striped single tokens. "
        "Set --context-parallel-reduction arrival, or --document-placement spread."
    )


def _places_documents(config: Config, grid: Grid) -> bool:
    return config.parallel.document_placement == "auto" and grid.ring > 1


RULES: tuple[Callable[[Config, Grid], str | None], ...] = (
    _heads,
    _query_groups,
    _feed_forward,
    _sequence_parallel,
    _stages,
    _batch,
    _mlp_chunks,
    _zero_in_pipeline,
    _offload_optimizer,
    _offload_param,
    _roll_back,
    _invariant_ranks,
    _invariant_length,
    _placement_layout,
    _placement_documents,
    _placement_reduction,
)


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _device_problems(config: Config, grid: Grid, device: str) -> list[str]:
    try:
        dtype = precision(config.training.dtype, device).name
    except ConfigError as error:
        messages = error.problems
    else:
        messages = _half_precision_problems(config, grid, dtype)
    if config.memory.offload_activations and device == "cpu":
        messages.append(
            "offload_activations has no effect on this device, a CPU: activations are in CPU "
            "memory already. Leave out --offload-activations."
        )
    return messages


def _half_precision_problems(config: Config, grid: Grid, dtype: str) -> list[str]:
    # Without ZeRO, DeepSpeed's half-precision optimizers do not know which gradients are replicated
    # over tensor ranks or pipeline stages. Pipelines use another optimizer in bf16, which does.
    is_wrong = {
        "fp32": False,
        "bf16": grid.tensor > 1 and grid.pipe == 1,
        "fp16": grid.tensor * grid.pipe > 1,
    }
    if config.training.zero_stage > 0 or not is_wrong[dtype]:
        return []
    return [
        f"zero_stage 0 in {dtype} would compute a wrong gradient norm (a fault of DeepSpeed's "
        f"optimizer for it) where {grid.tensor * grid.pipe} processes share a model: {grid.tensor} "
        f"tensor x {grid.pipe} pipeline ranks. Set --zero-stage 1, or --dtype fp32."
    ]
