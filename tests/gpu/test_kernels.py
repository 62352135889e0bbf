"""Every attention kernel of the device, through the real ring loop, against the float64 oracle.

For each kernel a pairwise covering set of layouts, masks, dtypes, head dims and memory layouts. The
backward pass is the ring's own: it computes half of the heads first, of which kernels get views.
"""

import functools
from contextlib import nullcontext

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask
from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import KERNELS, choose
from megatron_ring.kernels.attention.determinism import deterministic_algorithms
from megatron_ring.kernels.attention.registry import Feature
from megatron_ring.settings.precision import DTYPES
from tests import oracle, simulated_ring
from tests.gpu.devices import each_device, skip_without
from tests.kernels.attention.test_hops import Serialized
from tests.tolerances import beyond_tolerance
from tests.training.covering import Assignment, Factors, covering

HEADS = 4
TOKENS = {"cuda": 320, "cpu": 96}
"""Of a rank: on a GPU more than two tiles, the last one incomplete."""

FACTORS: Factors = {
    "dtype": ("bf16", "fp16", "fp32", "fp64"),
    "layout": ("striped", "ring", "striped by 32", "zigzag"),
    "ring": (2, 1, 3, 4),
    "mask": ("causal", "documents", "window", "documents and window"),
    "head_dim": (64, 128, 256, 80),
    "key_value_heads": (HEADS, 2, 1),
    "batch": (1, 2),
    "memory": ("dense", "heads first", "part of a projection"),
    "travels": ("keys", "queries"),
    "lse_gradient": (False, True),
    "halves": (True, False),
    "deterministic": (False, True),
}
DTYPES_OF_KERNELS = DTYPES | {"fp64": torch.float64}
DOCUMENT_LENGTHS = (1, 70, 129, 7, 300)
WINDOW = 100


@functools.cache
def rows(kernel: str, device: str) -> list[Assignment]:
    """Return rows in which every pair of values that the kernel supports occurs.

    On a CPU every value. Empty if the kernel cannot run on this machine.
    """

    def is_legal(row: Assignment) -> bool:
        features = []
        features += [Feature.DOCUMENTS] if "documents" in row["mask"] else []
        features += [Feature.WINDOW] if "window" in row["mask"] else []
        features += [Feature.GROUPED_HEADS] if row["key_value_heads"] < HEADS else []
        features += [Feature.SINKS] if row["lse_gradient"] else []
        features += [Feature.DETERMINISM] if row["deterministic"] else []
        try:
            choose(kernel, device, DTYPES_OF_KERNELS[row["dtype"]], row["head_dim"], features)
        except KernelUnavailable:
            return False
        return True

    return covering(FACTORS, is_legal, strength=2 if device == "cuda" else 1)


def errors(kernel: str, row: Assignment, device: str) -> dict[str, float]:
    """Return the errors beyond the tolerance, by tensor."""
    name, _, stripe_size = row["layout"].partition(" by ")
    layout = Layout(name, row["ring"] * TOKENS[device], row["ring"], int(stripe_size or 1))
    dtype = DTYPES_OF_KERNELS[row["dtype"]]
    batch, groups = row["batch"], row["key_value_heads"]
    tokens = layout.seq_length
    inputs = oracle.random_inputs(batch, tokens, HEADS, groups, dtype, row["head_dim"])
    dlse = 0.1 * oracle.random_dlse(inputs[0]).to(device) if row["lse_gradient"] else None
    inputs = [x.to(device) for x in inputs]
    lengths = DOCUMENT_LENGTHS if "documents" in row["mask"] else (tokens,)
    window = WINDOW if "window" in row["mask"] else 0
    document_BS = oracle.documents(batch, tokens, lengths)
    mask = Mask(window)
    if "documents" in row["mask"]:
        starts = oracle.document_starts(document_BS).tolist()
        mask = Mask(window, tuple(starts), samples=batch)
    run = simulated_ring.run(
        layout,
        Serialized(KERNELS[kernel]),
        *inputs,
        mask=mask,
        dlse_BHS=dlse,
        in_memory=functools.partial(in_memory, row["memory"]),
        sends_queries=lambda q, kv: row["travels"] == "queries",
        splits_own_work=row["halves"],
    )
    with torch.device(device):
        visible_BSS = oracle.visible(document_BS.to(device), window)
        expected = oracle.attention(*inputs, visible_BSS, dlse)
    return beyond_tolerance(run.results, expected, dtype)


def in_memory(name: str, x_BLHD: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, with each head's tokens contiguous, or among other heads' rows."""
    if name == "heads first":
        return x_BLHD.transpose(1, 2).contiguous().transpose(1, 2)
    if name == "part of a projection":
        return torch.cat([x_BLHD, x_BLHD], dim=2)[:, :, : x_BLHD.shape[2]]
    return x_BLHD


@each_device
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_ring_equals_the_oracle(kernel, device):
    skip_without(device)
    if not rows(kernel, device):
        pytest.skip(f"{kernel} cannot run here")
    found = {}
    for row in rows(kernel, device):
        try:
            with deterministic_algorithms() if row["deterministic"] else nullcontext():
                differing = errors(kernel, row, device)
        except Exception as error:
            error.add_note(f"The row: {row}")
            raise
        if differing:
            found[tuple(row.values())] = differing
    assert found == {}


@each_device
def test_torchs_and_our_own_kernels_can_run(device):
    skip_without(device)
    expected = {"reference", "sdpa"} | ({"triton"} if device == "cuda" else set())
    assert expected <= {kernel for kernel in KERNELS if rows(kernel, device)}
