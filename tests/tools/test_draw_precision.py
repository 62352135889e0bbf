"""The error of a ring does not grow with its size, and the page that says so is drawn from what is measured."""

import torch

from megatron_ring.context_parallel.emulated import attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import sdpa
from tests import oracle
from tools import draw_precision
from tools.draw_precision import Merging


def errors(kernel, ring_size: int) -> list[float]:
    inputs = oracle.random_inputs(1, 1024, 2, 1, torch.bfloat16, head_size=32)
    layout = Layout("striped" if ring_size > 1 else "none", 1024, ring_size)
    exact = oracle.attention(*inputs)
    found = attention(inputs, layout, kernel)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact)]


def test_ours_does_not_grow_and_one_that_merges_in_bfloat16_does():
    alone, ours, merged = errors(sdpa, 1), errors(sdpa, 32), errors(Merging(sdpa), 32)
    assert all(large <= 1.1 * small for large, small in zip(ours, alone))
    assert all(large >= 1.5 * small for large, small in zip(merged, alone))


def test_the_page_and_its_picture(tmp_path):
    draw_precision.main(tmp_path / "page.md", seq_length=64, head_dim=16, ring_sizes=(1, 4))
    page = (tmp_path / "page.md").read_text()
    assert "64 tokens, 2 query and 1 key-value heads of 16, bf16, causal; layout striped, kernel sdpa on cpu" in page
    assert [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")] == [
        "| ranks",
        "| ---:",
        "| 1",
        "| 4",
    ]
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
