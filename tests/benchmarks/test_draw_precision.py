"""The error of a ring does not grow with its size, and the page that says so is drawn from what is measured."""

from pathlib import Path

import pytest
import torch

from benchmarks import draw_precision
from benchmarks.draw_precision import FAMILIES, FamilyErrors, Merging, family_errors
from benchmarks.emulated_ring import attention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import reference, sdpa
from tests import oracle


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


def grown(family: str, tokens: int, ring_size: int, head_dim: int = 32) -> FamilyErrors:
    layouts = [draw_precision.laid_out("striped", tokens, size) for size in (1, ring_size)]
    return family_errors(FAMILIES[family], layouts, sdpa, head_dim, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_of_inputs_makes_the_error_grow(family):
    """Where the keys and where the queries travel. So short a sequence has few tiles on one process,
    which rounds dq less often than a ring does: hence not 1.1."""
    assert grown(family, tokens=512, ring_size=8).largest_growth <= 1.25


@pytest.mark.whole
@pytest.mark.parametrize(
    "family",
    ["one-hot gradient", "positive, constant gradient", "sinks, positive, constant gradient"],
)
def test_no_family_of_inputs_makes_the_error_grow_up_to_64_ranks(family):
    assert grown(family, tokens=1024, ring_size=64, head_dim=64).largest_growth <= 1.1


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.sinks])
def test_sinks_cost_no_precision_on_one_process(family):
    """Beside a kernel in float32 that takes delta as it is."""
    alone = [draw_precision.laid_out("none", 512, 1)] * 2
    ours, wide = (
        family_errors(FAMILIES[family], alone, x, 32, torch.bfloat16) for x in (sdpa, reference)
    )
    assert ours.alone["dq"] <= 1.75 * wide.alone["dq"]


def test_the_page_claims_no_growth_that_is_not_there():
    """The committed table has every family of inputs, and no gradient's error grows by more than 1.1."""
    lines = Path("docs/precision.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    growth = {row[0]: float(row[-1]) for row in rows if row[0] in FAMILIES}
    assert growth.keys() == FAMILIES.keys()
    assert max(growth.values()) <= 1.1


def test_the_page_and_its_picture(tmp_path):
    draw_precision.main(
        tmp_path / "page.md", seq_length=64, head_dim=16, ring_sizes=(1, 4), family_seq_length=32
    )
    page = (tmp_path / "page.md").read_text()
    assert (
        "64 tokens, 2 query and 1 key-value heads of 16, bf16, causal; layout striped, kernel sdpa on cpu"
        in page
    )
    firsts = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    assert firsts[:4] == ["| ranks", "| ---:", "| 1", "| 4"]
    assert firsts[4:] == ["| inputs", "| ---", *(f"| {name}" for name in FAMILIES)]
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
