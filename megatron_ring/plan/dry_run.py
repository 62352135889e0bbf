"""The output of --dry-run: coordinates, token layout, memory and bytes sent, per process.

Everything is counted from the config and the layout. No process is started. Of the data only the
tokenizer is opened, for its number of ids; of the token stores only the existence is checked.
"""

from megatron_ring.context_parallel.hop_cost import backward_bytes, queries_are_lighter
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.visible_rows import are_sent_directly, share_read
from megatron_ring.data.tokens import missing_files
from megatron_ring.errors import DataError, counted
from megatron_ring.plan.activations import inputs_gathered_again
from megatron_ring.plan.communication import ring_tensors, stage_bytes, tensor_bytes, ulysses_bytes
from megatron_ring.plan.memory import bubble
from megatron_ring.plan.memory_report import memory_lines
from megatron_ring.plan.ring_timeline import visible_pairs_per_rank
from megatron_ring.settings.run_settings import RunSettings

_MAX_DRAWN_TOKENS = 32
_MAX_DRAWN_RANKS = 8
# Counting visits every token, and holds those of a ring shard in memory.
_MAX_COUNTED_TOKENS = 2**27


def plan_lines(setup: RunSettings) -> list[str]:
    """Return missing data, grid, layout, memory and messages, with an empty line before each."""
    sections = [_missing_data(setup), _coordinates(setup)]
    if setup.grid.context > 1:
        sections.append(_layout_drawing(setup.layout, setup.grid.ulysses))
    sections += [memory_lines(setup), _messages(setup)]
    lines = []
    for section in sections:
        if section:
            lines += ["", *section]
    return lines


def _missing_data(setup: RunSettings) -> list[str]:
    """Return a line for each token store that a run would not find; that is no error of a plan."""
    lines = []
    for prefix in setup.config.data.blend:
        try:
            missing = missing_files(prefix)
        except DataError as error:
            lines.append(f"data             {error}")
            continue
        if missing:
            lines.append(
                f"data             no token store {prefix}: no {' and no '.join(missing)}. "
                "The plan does not need it; a run without it ends with exit code 3"
            )
    return lines


# ---- the grid and the layout ----


def _coordinates(setup: RunSettings) -> list[str]:
    axes = " ".join(f"{name:>8}" for name in setup.grid.sizes._fields)
    rows = []
    for rank in range(setup.grid.world_size):
        coordinates = " ".join(f"{c:>8}" for c in setup.grid.coordinates(rank))
        rows.append(f"{rank:>5} {coordinates}")
    return [f" rank {axes}", *rows]


def _layout_drawing(layout: Layout, ulysses: int) -> list[str]:
    """Draw which ring rank owns each token or stripe of a short sample, one row per rank."""
    stripe = layout.stripe_size
    smallest = layout.ring_size * 2
    units = max(smallest, _MAX_DRAWN_TOKENS // smallest * smallest)
    units = min(units, layout.seq_length // stripe)
    small = Layout(layout.name, units * stripe, layout.ring_size, stripe)
    unit_name = "token" if stripe == 1 else f"stripe of {stripe} tokens"
    lines = [
        f"{layout.name} layout, drawn for {counted(small.seq_length, 'token')}; "
        f"# is a {unit_name} that the rank owns"
    ]
    drawn_ranks = min(layout.ring_size, _MAX_DRAWN_RANKS)
    for ring_rank in range(drawn_ranks):
        owned = set((small.positions(ring_rank) // stripe).tolist())
        marks = "".join("#" if unit in owned else "." for unit in range(units))
        lines.append(f"ring rank {ring_rank}  {marks}")
    if layout.ring_size > drawn_ranks:
        lines.append(f"and {counted(layout.ring_size - drawn_ranks, 'more rank')}")
    if layout.placement:
        lines.append(
            "samples whose documents are placed by size have an order of their own, in blocks of "
            f"{layout.placement.block} tokens (--document-placement auto)"
        )
    if ulysses > 1:
        lines.append(
            f"each ring rank is {ulysses} Ulysses members: of its {layout.shard_length} tokens, in "
            f"this order, member u holds the u-th run of {layout.shard_length // ulysses}, and "
            f"computes attention for all of them with 1/{ulysses} of the heads"
        )
    return lines


# ---- bytes that a process sends ----


def _messages(setup: RunSettings) -> list[str]:
    return [
        *_ring_lines(setup),
        *_ulysses_lines(setup),
        *_tensor_lines(setup),
        *_pipeline_lines(setup),
    ]


def _ring_lines(setup: RunSettings) -> list[str]:
    """Return the bytes of a hop, and its work in layers with a window and in those without."""
    if setup.grid.ring == 1:
        return []
    model = setup.config.model
    layout = setup.layout
    q_BLhD, kv_2BLgD = ring_tensors(setup.config, setup.grid, layout, setup.precision.dtype)
    backward = backward_bytes(q_BLhD, kv_2BLgD)
    may_send_queries = setup.config.parallel.context_parallel_reduction == "arrival"
    sends_queries = may_send_queries and queries_are_lighter(q_BLhD, kv_2BLgD)
    sent = "queries" if sends_queries else "keys"
    other = "keys" if sends_queries else "queries"
    lines = [
        f"bytes of a hop   {kv_2BLgD.nbytes:,} forward (K and V), {backward[sent]:,} backward "
        f"(the {sent} travel; the {other} would be {backward[other]:,})"
    ]
    documents = ""
    if setup.config.data.reset_attention_mask:
        lines.append(
            "                 at most: documents are kept apart, so a row goes only to the ranks "
            "that read it (--profile-ring measures it)"
        )
        documents = (
            ", as if a sample were one document: separate documents are less work, and how much "
            "each rank has depends on their lengths (--profile-ring measures it)"
        )
    for window in sorted({model.window_of(layer) for layer in range(model.num_layers)}):
        mask = Mask(window)
        name = f"window {window}" if window else "full attention"
        balance = _balance(layout, mask, documents)
        lines.append(f"work             {name}: {_hops(layout, mask)}, {balance}")
    return lines


def _hops(layout: Layout, mask: Mask) -> str:
    hops = counted(layout.ring_size, "hop")
    if are_sent_directly(layout, mask):
        share = share_read(layout, mask.window)
        return f"{hops}, {share:.1%} of the keys sent, straight to the ranks that read them"
    return hops


def _balance(layout: Layout, mask: Mask, documents: str) -> str:
    if layout.seq_length > _MAX_COUNTED_TOKENS:
        return f"balance not counted for more than {_MAX_COUNTED_TOKENS:,} tokens"
    pairs_R = visible_pairs_per_rank(layout, mask)
    imbalance = float(pairs_R.max() / pairs_R.mean())
    return f"slowest rank over mean {imbalance:.4f}, counted in visible pairs{documents}"


def _ulysses_lines(setup: RunSettings) -> list[str]:
    degree = setup.grid.ulysses
    if degree == 1:
        return []
    tensors = ring_tensors(setup.config, setup.grid, setup.layout, setup.precision.dtype)
    before, after = ulysses_bytes(*tensors, degree)
    return [
        f"bytes of Ulysses {before:,} before attention (Q, K, V), {after:,} after it (output, "
        "log-sum-exp), in a layer's forward; the gradients of these in backward"
    ]


def _tensor_lines(setup: RunSettings) -> list[str]:
    ranks = setup.grid.tensor
    if ranks == 1:
        return []
    sequence_parallel = setup.config.parallel.sequence_parallel
    collectives = "all-gathers and reduce-scatters" if sequence_parallel else "all-reduces"
    gathers_again = inputs_gathered_again(setup.config)
    forward, backward = tensor_bytes(_stream_bytes(setup), ranks, gathers_again)
    return [
        f"bytes of tensor  {forward:,} in a layer's forward, {backward:,} in its backward without "
        f"recomputation ({collectives} of the residual stream)"
    ]


def _pipeline_lines(setup: RunSettings) -> list[str]:
    stages = setup.grid.pipe
    if stages == 1:
        return []
    sequence_parallel = setup.config.parallel.sequence_parallel
    forward, backward = stage_bytes(
        _stream_bytes(setup), _tokens(setup), setup.grid, sequence_parallel
    )
    idle = bubble(stages, setup.micro_batches)
    return [
        f"bytes of a stage {forward:,} forward to the next one for a micro-batch, "
        f"{backward:,} back",
        f"bubble           a stage is idle for {idle:.1%} of a step: {stages} stages, "
        f"{counted(setup.micro_batches, 'micro-batch')}, (P - 1) / (M + P - 1)",
    ]


def _stream_bytes(setup: RunSettings) -> int:
    """Return the bytes of the residual stream (B, l, E)."""
    return _tokens(setup) * setup.config.model.hidden_size * setup.precision.dtype.itemsize


def _tokens(setup: RunSettings) -> int:
    """Return B x l, the tokens of a micro-batch on this process."""
    return setup.config.training.micro_batch_size * setup.tokens_per_rank
