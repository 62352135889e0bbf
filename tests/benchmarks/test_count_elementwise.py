"""The count of memory traffic: its rules, and the count of a layer beside the least possible."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import count_elementwise
from benchmarks.count_elementwise import LLAMA_1_3B, Options, count_layer, least_elements
from benchmarks.memory_traffic import COPIES, ELEMENTWISE, PRODUCTS, MemoryTraffic
from megatron_ring.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks" / "elementwise.md").read_text()
# The most of the least possible bytes, and the most calls, of a layer's element-wise operators.
MOST = {"none": (1.30, 26), "selective": (1.50, 30), "full": (1.40, 30)}


def counted(run, category: str = ELEMENTWISE) -> tuple[int, int, int]:
    with MemoryTraffic() as traffic:
        run()
    total = traffic.counts.total([category])
    return total.calls, total.read, total.written


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_each_tensor_is_read_and_written_once():
    a, b = meta(10), meta(10)
    assert counted(lambda: a + b) == (1, 80, 40)
    assert counted(lambda: a * a) == (1, 40, 40)
    assert counted(lambda: a.add_(b)) == (1, 80, 40)
    assert counted(lambda: a.zero_()) == (1, 0, 40)
    assert counted(lambda: torch.add(a, b, out=meta(10))) == (1, 80, 40)


def test_views_and_allocations_move_nothing():
    x = meta(4, 6)
    assert counted(lambda: (x.T, x[1:], x.view(24), x.expand(2, 4, 6), torch.empty_like(x))) == (
        0, 0, 0,
    )  # fmt: skip


def test_expanded_elements_count_once():
    assert counted(lambda: meta(1).expand(10) + meta(10)) == (1, 44, 40)


def test_casts_are_copies_and_an_assignment_to_itself_moves_nothing():
    x, y = meta(10), meta(4)
    assert counted(lambda: x.bfloat16(), COPIES) == (1, 40, 20)

    def add_to_slice():
        x[:4] += y

    assert counted(add_to_slice, COPIES) == (0, 0, 0)
    assert counted(add_to_slice) == (1, 32, 16)


def test_an_embedding_reads_the_rows_that_it_returns():
    ids, table = meta(3, dtype=torch.int64), meta(1000, 4)
    assert counted(lambda: functional.embedding(ids, table)) == (1, 48 + 24, 48)


def test_products_are_apart():
    assert counted(lambda: meta(3, 4) @ meta(4, 5), PRODUCTS) == (1, 4 * (12 + 20), 4 * 15)


@pytest.mark.parametrize("recompute", MOST)
def test_a_layer_moves_at_most_one_and_a_half_of_the_least(recompute):
    """At full size: Llama of 1.3 billion parameters, 32,768 tokens, bf16, cuDNN's attention."""
    options = Options()
    operations, _ = count_elementwise.chosen_operations(options, LLAMA_1_3B)
    moved = count_layer(options, LLAMA_1_3B, operations, recompute).moved
    least = least_elements(LLAMA_1_3B, recompute) * 2 * options.tokens
    most, most_calls = MOST[recompute]
    assert 1 <= moved.bytes / least <= most
    assert moved.calls <= most_calls


def test_torchs_operations_move_three_times_as_much():
    """The count does distinguish: without the kernels it is far above the limit."""
    options = Options(fused_operations="torch", tokens=1024)
    operations, _ = count_elementwise.chosen_operations(options, LLAMA_1_3B)
    moved = count_layer(options, LLAMA_1_3B, operations, "selective").moved
    assert moved.bytes / (least_elements(LLAMA_1_3B, "selective") * 2 * 1024) > 4


def test_grouped_heads_need_less():
    grouped = replace(LLAMA_1_3B, num_query_groups=4)
    rotated = 2 * 2 * (16 - 4) * 128
    assert least_elements(LLAMA_1_3B, "none") - least_elements(grouped, "none") == rotated


def test_the_benchmark_writes_what_it_prints(run_main):
    document, printed = run_main(count_elementwise, "--tokens", "256", "--recompute", "selective")
    (layer,) = document["layers"]
    parts = layer["bytes_per_token"]
    assert set(parts) == {"forward", "backward", "outside"}
    assert f"**{layer['of_least']:.2f}**" in printed
    moved = sum(
        parts[part][category][direction]
        for part in ("forward", "backward")
        for category in count_elementwise.MOVED
        for direction in ("read", "written")
    )
    assert moved == pytest.approx(layer["elementwise"])


def test_messages_of_a_ring_are_counted(run_main):
    document, _ = run_main(
        count_elementwise, "--tokens", "256", "--recompute", "none", "--ring-size", "4"
    )
    (layer,) = document["layers"]
    assert layer["of_least"] is None
    packing = layer["bytes_per_token"]["backward"]["communication packing"]
    assert packing["read"] > 0


def test_invalid_options_are_rejected(run_main):
    with pytest.raises(ConfigError, match=r"tokens 0 .*--tokens"):
        run_main(count_elementwise, "--tokens", "0")


# ---- docs/benchmarks/elementwise.md ----


def test_the_page_has_the_counted_ratios():
    for recompute, (most, _) in MOST.items():
        row = re.search(rf"^\| {recompute} \|.*$", PAGE, flags=re.MULTILINE)[0]
        before, after = (float(x) for x in re.findall(r"\d\.\d\d", row))
        options = Options()
        operations, _ = count_elementwise.chosen_operations(options, LLAMA_1_3B)
        moved = count_layer(options, LLAMA_1_3B, operations, recompute).moved
        least = least_elements(LLAMA_1_3B, recompute) * 2 * options.tokens
        assert after == pytest.approx(moved.bytes / least, abs=0.006)
        assert after <= most < before
