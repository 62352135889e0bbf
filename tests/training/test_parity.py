"""Parity with one process in cases that the matrix (test_matrix.py) leaves out.

These are documents under every layout with windows and sinks at once, sample lengths that no number
of ranks divides (three steps each), ranks without labels (three), and bf16 (twelve).
"""

from pathlib import Path

import pytest
import torch

from megatron_ring.data.document_boundaries import IGNORE_INDEX
from tests.distributed import run_ranks
from tests.training import tiny

STEPS = 12
STEPS_OF_PACKED = 3  # there are 13 cases, each on 2, 3 and 4 processes

# Documents of 1 to 100 tokens in samples of 48; a window in every layer but the second; a learned
# sink for each head.
PACKED = {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True}
PACKED_MODELS = {
    "grouped": {},
    "equal heads": {"num_query_groups": 4},
    "windows and sinks": {
        "window_size": 7,
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
    },
}


def train_all(
    rank: int, world_size: int, prefix: Path, cases: dict, steps: int
) -> dict[str, list[tuple[float, float]]]:
    return {
        name: tiny.Run(tiny.config(**sections), prefix, rank, world_size).steps(steps)
        for name, sections in cases.items()
    }


def train_on_one_process(rank: int, world_size: int, prefix: Path) -> list[tuple[float, float]]:
    config = tiny.config(parallel={"context_parallel": "none"}, training={"zero_stage": 0})
    return tiny.Run(config, prefix, rank, world_size).steps(STEPS)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    return tiny.write_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def one_process(prefix) -> torch.Tensor:
    """Return (steps, 2): loss and gradient norm."""
    return torch.tensor(run_ranks(1, train_on_one_process, prefix)[0], dtype=torch.float64)


def test_one_process_reduces_the_loss(one_process):
    assert one_process[-1, 0] < 0.75 * one_process[0, 0]


def packed(model: dict, **parallel) -> dict:
    return {"model": model, "data": PACKED, "parallel": parallel}


def ragged(**parallel) -> dict:
    """Return samples of 47 tokens, packed, which neither 2, 3 nor 4 ranks share evenly."""
    # The table of positions has no row for padding tokens after the end.
    model = {"position_embedding_type": "learned_absolute"}
    return {"model": model, "data": PACKED | {"seq_length": 47}, "parallel": parallel}


def packed_cases() -> dict[str, dict]:
    """Every layout, with and without windows and sinks.

    In the backward pass equal heads send queries around the ring, grouped ones keys and values.
    """
    layouts = {"ring": {}, "striped": {}, "striped by 2": {"stripe_size": 2}, "zigzag": {}}
    return {
        f"{name}, {kind}": packed(model, context_parallel=name.split()[0], **extra)
        for name, extra in layouts.items()
        for kind, model in PACKED_MODELS.items()
    } | {"striped, ragged": ragged(context_parallel="striped")}


def train_packed_on_one_process(
    rank: int, world_size: int, prefix: Path
) -> dict[str, list[tuple[float, float]]]:
    alone = {"context_parallel": "none", "attention_kernel": "reference"}
    cases = {kind: packed(model, **alone) for kind, model in PACKED_MODELS.items()} | {
        "ragged": ragged(**alone)
    }
    return train_all(rank, world_size, prefix, cases, STEPS_OF_PACKED)


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory) -> Path:
    return tiny.write_short_documents(tmp_path_factory.mktemp("short"))


@pytest.fixture(scope="module")
def packed_alone(short_documents) -> dict[str, torch.Tensor]:
    found = run_ranks(1, train_packed_on_one_process, short_documents)[0]
    return {kind: torch.tensor(steps, dtype=torch.float64) for kind, steps in found.items()}


@pytest.mark.parametrize(
    "world_size",
    [
        3,
        pytest.param(2, marks=pytest.mark.exhaustive),
        pytest.param(4, marks=pytest.mark.exhaustive),
    ],
)
def test_packed_documents_train_as_on_one_process(world_size, packed_alone, short_documents):
    cases = packed_cases()
    for of_rank in run_ranks(world_size, train_all, short_documents, cases, STEPS_OF_PACKED):
        for name, found in of_rank.items():
            expected = packed_alone[name.split(", ")[1]]
            found = torch.tensor(found, dtype=torch.float64)
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def train_half_unlabelled(
    rank: int, world_size: int, prefix: Path, layout: str
) -> list[tuple[float, float]]:
    """Train on labels only in the first half of each sample: some contiguous shards have none."""
    run = tiny.Run(tiny.config(parallel={"context_parallel": layout}), prefix, rank, world_size)
    results = []
    for _ in range(3):
        (batch,) = run.loader.next_step()
        batch.targets_Bl[:, batch.positions >= tiny.SEQ // 2] = IGNORE_INDEX
        result = run.engine.train_step([batch], learning_rate=1e-2)
        assert result.tokens == len(batch.tokens_Bl) * tiny.SEQ // 2
        results.append((result.loss, result.grad_norm))
    return results


def test_ranks_without_a_label_change_nothing(prefix):
    alone = torch.tensor(
        run_ranks(1, train_half_unlabelled, prefix, "none")[0], dtype=torch.float64
    )
    for found in run_ranks(4, train_half_unlabelled, prefix, "ring"):
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), alone, rtol=1e-5, atol=0
        )


TENSOR = {"tensor_model_parallel_size": 2}
PIPE = {"pipeline_model_parallel_size": 2}
MICRO = {"micro_batch_size": 2}
BF16 = {
    **{f"ring, ZeRO {stage}": {"training": {"zero_stage": stage}} for stage in (0, 1, 2, 3)},
    **{
        f"tensor, ZeRO {stage}": {"parallel": TENSOR, "training": {"zero_stage": stage}}
        for stage in (1, 2, 3)
    },
    "tensor, tokens shared": {"parallel": TENSOR | {"sequence_parallel": True}},
    "ulysses": {"parallel": {"ulysses_degree": 2}},
    **{
        f"pipe, ZeRO {stage}": {"parallel": PIPE, "training": {"zero_stage": stage, **MICRO}}
        for stage in (0, 1)
    },
}


def in_bf16(sections: dict) -> dict:
    return sections | {"training": {"dtype": "bf16", **sections.get("training", {})}}


@pytest.mark.parametrize("case", BF16)
def test_bf16_follows_fp32(case, bf16, one_process):
    # Weights are kept in fp32 and rounded for use, so the loss has the error of rounding the
    # weights once. The norm has a larger one, but less than the share of a rank or a stage.
    torch.testing.assert_close(bf16[case][:, 0], one_process[:, 0], rtol=1e-3, atol=0)
    torch.testing.assert_close(bf16[case][:, 1], one_process[:, 1], rtol=5e-2, atol=0)


@pytest.fixture(scope="module")
def bf16(prefix) -> dict[str, torch.Tensor]:
    """Return (steps, 2) of each case, on two ranks: loss and gradient norm."""
    cases = {name: in_bf16(sections) for name, sections in BF16.items()}
    found = run_ranks(2, train_all, prefix, cases, STEPS)[0]
    return {name: torch.tensor(steps, dtype=torch.float64) for name, steps in found.items()}
