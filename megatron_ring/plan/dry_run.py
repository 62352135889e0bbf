"""What --dry-run tells of a run before it: where each process and token goes, what a process holds, what it sends.

Everything is counted from the config and the layout. No process is started and no data opened but the tokenizer, whose
number of ids is asked for.
"""

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.traffic import backward_bytes, queries_are_lighter
from megatron_ring.plan.activations import inputs_gathered_again
from megatron_ring.plan.memory import bubble
from megatron_ring.plan.memory_report import memory_lines
from megatron_ring.plan.messages import ring_tensors, stage_bytes, tensor_bytes, ulysses_bytes
from megatron_ring.plan.timeline import counted
from megatron_ring.settings.setup import Setup

_PICTURED_TOKENS = 32
_PICTURED_RANKS = 8


def plan_lines(setup: Setup) -> list[str]:
    """The grid, the layout, memory and messages, with an empty line between them."""
    parts = [_coordinates(setup), memory_lines(setup), _messages(setup)]
    if setup.grid.context > 1:
        parts.insert(1, _layout_picture(setup.layout, setup.grid.ulysses))
    return [line for part in parts if part for line in ["", *part]]


# ---- where everything goes ----


def _coordinates(setup: Setup) -> list[str]:
    axes = " ".join(f"{name:>8}" for name in setup.grid.sizes._fields)
    rows = [
        f"{rank:>5} " + " ".join(f"{c:>8}" for c in setup.grid.coordinates(rank))
        for rank in range(setup.grid.world_size)
    ]
    return [f" rank {axes}", *rows]


def _layout_picture(layout: Layout, ulysses: int) -> list[str]:
    """Which ring rank owns each token or stripe, for a sample short enough to see, one row a rank."""
    stripe, smallest = layout.stripe_size, layout.ring_size * 2
    pictured = max(smallest, _PICTURED_TOKENS // smallest * smallest)
    small = Layout(layout.name, pictured * stripe, layout.ring_size, stripe)
    unit = "token" if stripe == 1 else f"stripe of {stripe} tokens"
    title = f"{layout.name} layout, drawn for {small.seq_length} tokens; # is a {unit} that the rank owns"
    ranks = range(min(layout.ring_size, _PICTURED_RANKS))
    rows = []
    for ring_rank in ranks:
        owned = set((small.positions(ring_rank) // stripe).tolist())
        rows.append(
            f"ring rank {ring_rank}  "
            + "".join("#" if unit in owned else "." for unit in range(pictured))
        )
    if layout.ring_size > len(ranks):
        rows.append(f"and {layout.ring_size - len(ranks)} more ranks")
    if ulysses > 1:
        rows.append(
            f"each ring rank is {ulysses} Ulysses members: of its {layout.shard_length} tokens, in this order, member "
            f"u has the u-th run of {layout.shard_length // ulysses}, and attends for all of them with 1/{ulysses} of "
            "the heads"
        )
    return [title, *rows]


# ---- what a process sends ----


def _messages(setup: Setup) -> list[str]:
    return [*_in_ring(setup), *_in_ulysses(setup), *_in_tensor(setup), *_in_pipeline(setup)]


def _in_ring(setup: Setup) -> list[str]:
    """Bytes and work of a hop; a line for the layers with a window and one for those without."""
    if setup.grid.ring == 1:
        return []
    model, layout = setup.config.model, setup.layout
    q_BLhD, kv_2BLgD = ring_tensors(setup.config, setup.grid, layout, setup.precision.dtype)
    backward = backward_bytes(q_BLhD, kv_2BLgD)
    free = setup.config.parallel.context_parallel_reduction == "arrival"
    travels = "queries" if free and queries_are_lighter(q_BLhD, kv_2BLgD) else "keys"
    other = "keys" if travels == "queries" else "queries"
    lines = [
        f"bytes of a hop   {kv_2BLgD.nbytes:,} forward (K and V), {backward[travels]:,} backward (the {travels} "
        f"travel; the {other} would be {backward[other]:,})"
    ]
    for window in sorted({model.window_of(layer) for layer in range(model.num_layers)}):
        mask = Mask(window)
        name = f"window {window}" if window else "full attention"
        lines.append(
            f"work             {name}: {layout.hops(mask.reach(layout.seq_length))} hops, slowest rank over mean "
            f"{counted(layout, mask).imbalance:.4f}, counted in visible pairs"
        )
    return lines


def _in_ulysses(setup: Setup) -> list[str]:
    degree = setup.grid.ulysses
    if degree == 1:
        return []
    tensors = ring_tensors(setup.config, setup.grid, setup.layout, setup.precision.dtype)
    before, behind = ulysses_bytes(*tensors, degree)
    return [
        f"bytes of Ulysses {before:,} before attention (Q, K, V), {behind:,} behind it (output, log-sum-exp), in a "
        "layer's forward; backward their gradients"
    ]


def _in_tensor(setup: Setup) -> list[str]:
    ranks = setup.grid.tensor
    if ranks == 1:
        return []
    how = (
        "all-gathers and reduce-scatters"
        if setup.config.parallel.sequence_parallel
        else "all-reduces"
    )
    forward, backward = tensor_bytes(
        _stream_bytes(setup), ranks, inputs_gathered_again(setup.config)
    )
    return [
        f"bytes of tensor  {forward:,} in a layer's forward, {backward:,} in its backward without "
        f"recomputation ({how} of the residual stream)"
    ]


def _in_pipeline(setup: Setup) -> list[str]:
    grid = setup.grid
    if grid.pipe == 1:
        return []
    sequence_parallel = setup.config.parallel.sequence_parallel
    forward, backward = stage_bytes(_stream_bytes(setup), _tokens(setup), grid, sequence_parallel)
    return [
        f"bytes of a stage {forward:,} forward to the next one for a micro-batch, {backward:,} back",
        f"bubble           {bubble(grid.pipe, setup.micro_batches):.1%} of a step a stage waits: {grid.pipe} stages, "
        f"{setup.micro_batches} micro-batches, (P - 1) / (M + P - 1)",
    ]


def _stream_bytes(setup: Setup) -> int:
    """Of (B, l, E), the residual stream."""
    return _tokens(setup) * setup.config.model.hidden_size * setup.precision.dtype.itemsize


def _tokens(setup: Setup) -> int:
    """B x l: what a process holds of a micro-batch."""
    return setup.config.training.micro_batch_size * setup.resident_length
