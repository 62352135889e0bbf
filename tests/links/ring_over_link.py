"""One rank of a ring over a link: checks its results and writes them to a file.

The results of forward and backward are compared with a float64 oracle and written to ``RANK.pt`` in
the working folder, so that a run over another link can be compared with this one bit for bit.
"""

import os

import torch
import torch.distributed as dist

from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.grid import Grid
from tests import oracle
from tests.tolerances import beyond_tolerance

TOKENS = 512


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    layout = Layout("striped", TOKENS, ranks)
    groups = ProcessGroups.build(Grid(ring=ranks), rank)
    attention = ContextParallelAttention(layout, "sdpa", groups)

    inputs = oracle.random_inputs(1, TOKENS, heads=4, groups=2, dtype=torch.float32)
    expected = oracle.attention(*inputs)
    local = layout.positions(rank)
    q, k, v, dout = (x[:, local] for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, dout)
    result = oracle.Attention(out.detach(), *gradients, lse.detach())

    expected = oracle.Attention(*(x[:, local] for x in expected[:4]), expected.lse[..., local])
    assert beyond_tolerance(result, expected, torch.float32) == {}
    torch.save(list(result), f"{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
