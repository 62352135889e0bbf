"""One rank of a ring over the link that it is started on: compares with one process and writes what it found.

The results of forward and backward are held to a float64 oracle, and their bytes are written to
``RANK.pt`` in the working folder, so that a run over another link can be compared with this one.
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
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layout = Layout("striped", TOKENS, ranks)
    groups = ProcessGroups.build(Grid(ring=ranks), rank)
    attend = ContextParallelAttention(layout, "sdpa", groups)

    inputs = oracle.random_inputs(1, TOKENS, heads=4, groups=2, dtype=torch.float32)
    expected = oracle.attention(*inputs)
    here = layout.positions(rank)
    q, k, v, dout = (x[:, here] for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves)
    found = oracle.Attention(out.detach(), *torch.autograd.grad(out, leaves, dout), lse.detach())

    expected_here = oracle.Attention(*(x[:, here] for x in expected[:4]), expected.lse[..., here])
    assert beyond_tolerance(found, expected_here, torch.float32) == {}
    torch.save(list(found), f"{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
