"""The error of a ring does not grow with its size, as docs/precision.md claims."""

from pathlib import Path

import pytest
import torch

from benchmarks import draw_precision
from benchmarks.emulated_ring import attention
from benchmarks.precision_errors import (
    FAMILIES,
    FamilyErrors,
    MergingKernel,
    RoundedHops,
    family_errors,
    layout_of,
)
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import reference, sdpa
from tests import oracle


def errors(kernel, ring_size: int) -> list[float]:
    """Return the relative errors of out, dq, dk and dv on a striped ring."""
    inputs = oracle.random_inputs(1, 1024, 2, 1, torch.bfloat16, head_size=32)
    layout = Layout("striped" if ring_size > 1 else "none", 1024, ring_size)
    exact = oracle.attention(*inputs)
    actual = attention(inputs, layout, kernel)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(actual, exact)]


def test_error_grows_for_a_ring_that_merges_in_bfloat16_but_not_for_ours():
    alone = errors(sdpa, 1)
    ours = errors(sdpa, 32)
    merged = errors(MergingKernel(sdpa), 32)
    assert all(large <= 1.1 * small for large, small in zip(ours, alone))
    assert all(large >= 1.5 * small for large, small in zip(merged, alone))


def test_error_does_not_grow_where_the_results_of_each_hop_are_rounded_as_by_flash_attn_4():
    """One rank rounds once, and a ring twice: each hop's results and their sum."""
    alone, small, large = (errors(RoundedHops(reference), size) for size in (1, 2, 32))
    assert all(second >= 1.2 * first for first, second in zip(alone, small))
    assert all(last <= 1.1 * second for second, last in zip(small, large))


def errors_of_family(family: str, tokens: int, ring_size: int, head_dim: int = 32) -> FamilyErrors:
    """Return the errors on one rank and on a striped ring."""
    layouts = [layout_of("striped", tokens, size) for size in (1, ring_size)]
    return family_errors(FAMILIES[family], layouts, sdpa, head_dim, torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_of_inputs_makes_the_error_grow(family):
    """Holds with keys and with queries travelling.

    The bound is 1.25 rather than 1.1 because so short a sequence has few tiles on one process,
    which then rounds dq less often than a ring does.
    """
    assert errors_of_family(family, tokens=512, ring_size=8).largest_growth <= 1.25


@pytest.mark.whole
@pytest.mark.parametrize(
    "family",
    [
        pytest.param("one-hot gradient", marks=pytest.mark.exhaustive),
        "sinks, positive, constant gradient",
        pytest.param("positive, constant gradient", marks=pytest.mark.exhaustive),
    ],
)
def test_no_family_of_inputs_makes_the_error_grow_up_to_64_ranks(family):
    assert errors_of_family(family, tokens=1024, ring_size=64, head_dim=64).largest_growth <= 1.1


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.sinks])
def test_sinks_cost_no_precision_on_one_process(family):
    """Compared with the reference, which computes in float32 and uses delta unrounded."""
    alone = [layout_of("none", 512, 1)] * 2
    of_sdpa = family_errors(FAMILIES[family], alone, sdpa, 32, torch.bfloat16)
    of_reference = family_errors(FAMILIES[family], alone, reference, 32, torch.bfloat16)
    assert of_sdpa.alone["dq"] <= 1.75 * of_reference.alone["dq"]


def test_the_committed_page_has_every_family_and_no_growth_above_1_1():
    lines = Path("docs/precision.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    growth = {row[0]: float(row[-1]) for row in rows if row[0] in FAMILIES}
    assert growth.keys() == FAMILIES.keys()
    assert max(growth.values()) <= 1.1


def test_page_and_picture_are_written(tmp_path):
    draw_precision.main(
        tmp_path / "page.md", seq_length=64, head_dim=16, ring_sizes=(1, 4), family_seq_length=32
    )
    page = (tmp_path / "page.md").read_text()
    setting = "64 tokens, 2 query and 1 key-value heads of 16, bf16, causal; layout striped"
    assert f"{setting}, kernel sdpa on cpu" in page
    firsts = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    rings = ["| ranks", "| ---:", "| 1", "| 4"]
    assert firsts[:8] == rings * 2
    assert firsts[8:] == ["| inputs", "| ---", *(f"| {name}" for name in FAMILIES)]
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
