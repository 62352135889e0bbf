"""The runs that bench_attention times: one forward and backward pass of a ring, or of a baseline.

Our ring in every case, the ring as published, ranks without a ring, and a single process.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.attention_cases import Case, Options, build_mask, select_cases
from benchmarks.common import DTYPES, random_inputs
from megatron_ring.context_parallel import ring as ring_loop
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.hop_cost import queries_are_lighter
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.context_parallel.visible_rows import are_sent_directly
from megatron_ring.kernels.attention import KERNELS, stack_to_kernel_layout, to_kernel_layout
from megatron_ring.parallel.collectives import ProcessGroups, RingExchange
from megatron_ring.parallel.grid import Grid

# Besides the cases: our contiguous ring, which sends queries, beside the published one; ranks
# without a ring; and the process that holds the whole sequence.
LIGHTER = "lighter"
APART = "apart"
SINGLE = "single"

Run = Callable[[], None]


def attention_inputs(
    options: Options, tokens: int, samples_end_to_end: int = 1
) -> list[torch.Tensor]:
    """Return random q, k, v and gradient of the output, each (batch, tokens, heads, head dim).

    With ``samples_end_to_end`` n they are (batch / n, n x tokens, heads, head dim).
    """
    heads = (options.heads, options.kv_heads, options.head_dim)
    return random_inputs(
        samples_end_to_end * tokens,
        *heads,
        options.device_type,
        DTYPES[options.dtype],
        options.batch // samples_end_to_end,
    )


def runs_of_rank(rank: int, options: Options) -> dict[str, Run]:
    """Return the runs to time by name; every rank has the same names."""
    groups = ProcessGroups.build(Grid(ring=options.nproc), rank)
    cases = select_cases(options)
    runs = {name: _ring_run(case, groups, options) for name, case in cases.items()}
    ring = cases["ring"]
    if options.nproc > 1 and (_sends_queries(options) or are_sent_directly(ring.layout, ring.mask)):
        runs[LIGHTER] = runs["ring"]
        runs["ring"] = _published_run(ring, groups, options)
    if _documents_end_with_shards(ring):
        runs[APART] = _apart_run(rank, ring, options)
    runs[SINGLE] = single_run(options, options.nproc) if rank == 0 else lambda: None
    return runs


def _ring_run(case: Case, groups: ProcessGroups, options: Options) -> Run:
    attention = ContextParallelAttention(case.layout, options.kernel, groups)
    *qkv, dout = attention_inputs(options, case.layout.shard_length)
    inputs = [x.requires_grad_() for x in qkv]
    starts = torch.tensor(case.mask.document_starts) if case.mask.document_starts else None

    def run() -> None:
        out, _ = attention(*inputs, case.mask.window, starts)
        torch.autograd.grad(out, inputs, dout)

    return run


def _documents_end_with_shards(case: Case) -> bool:
    """Return whether no document is on two ranks of a contiguous ring."""
    starts = case.mask.document_starts
    tokens = case.mask.samples * case.layout.seq_length
    return set(range(0, tokens, case.layout.shard_length)) <= set(starts)


def _apart_run(rank: int, case: Case, options: Options) -> Run:
    """Return a run in which each rank attends to the documents of its contiguous shard alone."""
    length = case.layout.shard_length
    first = rank * length
    starts = [
        start - first for start in case.mask.document_starts if first <= start < first + length
    ]
    alone = Case(Layout("none", length, 1), Mask(options.window, tuple(starts)))
    return _ring_run(alone, ProcessGroups(), options)


def _sends_queries(options: Options) -> bool:
    """Return whether our ring sends queries in the backward pass with these heads."""
    q, k, v, _ = attention_inputs(options, tokens=1)
    return queries_are_lighter(q, torch.stack([k, v]))


def _published_run(case: Case, groups: ProcessGroups, options: Options) -> Run:
    """Return a run of Ring Attention as published (Liu et al. 2023, section 3).

    Keys and values travel in the backward pass as they do in the forward pass, all of them to all
    ranks.
    """
    q, k, v, dout = attention_inputs(options, case.layout.shard_length, case.mask.samples)
    exchange = RingExchange.over(groups.ring_links)
    kernel = options.kernel
    ring = ring_loop.Ring(
        case.layout,
        exchange.ring_rank,
        KERNELS[kernel],
        options.head_dim**-0.5,
        exchange,
        case.mask,
        sends_queries=lambda q, kv: False,
        splits_own_work=exchange.is_slow,
        sends_all_rows=True,
    )

    def run() -> None:
        local_q = to_kernel_layout(kernel, q)
        kv = stack_to_kernel_layout(kernel, [k, v])
        out, lse = ring_loop.forward(local_q, kv, ring)
        ring_loop.backward(dout, None, local_q, kv, out, lse, ring)

    return run


def single_run(options: Options, threads: int) -> Run:
    """Return a run of one process on the whole sequence, without a ring.

    It uses torch's public function, or the ring's kernel where there is a window.
    """
    mask = build_mask(options)
    whole = Case(Layout("none", options.seq_length, 1), mask)
    run = _ring_run(whole, ProcessGroups(), options) if mask.window else _torch_run(mask, options)

    def with_threads() -> None:
        torch.set_num_threads(threads)
        run()
        torch.set_num_threads(1)

    return with_threads


def _torch_run(mask: Mask, options: Options) -> Run:
    tensors = attention_inputs(options, options.seq_length, mask.samples)
    *inputs, dout = (x.transpose(1, 2) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    bounds = torch.tensor([*(mask.document_starts or (0,)), dout.shape[2]])
    lengths = bounds.diff().tolist()
    grouped = options.heads != options.kv_heads

    def run() -> None:
        documents = zip(*(x.split(lengths, dim=2) for x in inputs))
        outs = [
            F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=grouped)
            for qkv in documents
        ]
        torch.autograd.grad(outs, inputs, dout.split(lengths, dim=2))

    return run
