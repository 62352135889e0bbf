"""Rings of four ranks on one device compared with float64 attention, for every kernel.

The loop is that of training (context_parallel/ring.py) over an exchange within the process: half of
the heads of a rank's own keys are kept for the end, and either keys or queries travel.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.common import layout_name, random_inputs
from benchmarks.document_packs import random_starts
from benchmarks.streamed_ring import attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.kernels.attention import HopKernel, reference
from megatron_ring.kernels.attention.accuracy import TOLERANCE, error

RANKS = 4
SAMPLES = 2
SENDS_QUERIES = {"keys": lambda q, kv: False, "queries": lambda q, kv: True}
"""The ``sends_queries`` of a Ring by what travels in backward."""


def correctness(
    kernels: Mapping[str, HopKernel],
    tokens: int,
    queries_per_key: int,
    head_dim: int,
    device: str,
    dtype: torch.dtype,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each mask, layout, kernel and tensor that travels, for samples of ``tokens``.

    There are two key-value heads, so that there is a half, and two samples.
    """
    masks = {
        "causal": CAUSAL,
        "window": Mask(window=100),
        "documents": Mask(document_starts=random_starts(100, tokens, SAMPLES), samples=SAMPLES),
    }
    layouts = [
        Layout("ring", tokens, RANKS),
        Layout("striped", tokens, RANKS),
        Layout("striped", tokens, RANKS, 32),
        Layout("zigzag", tokens, RANKS),
    ]
    heads = (2 * queries_per_key, 2, head_dim)
    inputs = [
        x.view(SAMPLES, tokens, *x.shape[2:])
        for x in random_inputs(SAMPLES * tokens, *heads, device, dtype)
    ]
    exact_inputs = [x.double() for x in inputs]
    for mask_name, mask in masks.items():
        expected = attention(exact_inputs, Layout("none", tokens, 1), reference, mask)
        cases = itertools.product(layouts, kernels.items(), SENDS_QUERIES.items())
        for layout, (name, kernel), (travelling, sends_queries) in cases:
            actual = attention(inputs, layout, kernel, mask, sends_queries=sends_queries)
            errors = [error(x, y) for x, y in zip(actual, expected)]
            row = {"kernel": name, "layout": layout_name(layout), "mask": mask_name}
            row |= {"travelling": travelling}
            row |= zip(actual._fields, errors)
            yield row | {"correct": all(x <= TOLERANCE[dtype] for x in errors)}
