"""A checkpoint written before the redesign of the code loads: values, run state and the next steps.

``written_before_redesign/saved`` was written by commit 12b39ab after 3 steps of a model of one
layer and hidden size 8 on a ring of two ranks with ZeRO 1. ``expected.json`` has, from the same
process, the first and last element and the sum of squares of each tensor, and the (loss, gradient
norm) of the 2 steps after the checkpoint.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ring.checkpoint import store
from megatron_ring.checkpoint.state import RunState
from megatron_ring.checkpoint.tensors import KINDS, Tensors
from megatron_ring.data.store_fingerprint import fingerprint
from megatron_ring.data.tokens import TokenStoreWriter
from tests.distributed import run_ranks
from tests.training import tiny

FOLDER = Path(__file__).with_name("written_before_redesign")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
VOCABULARY = 16
LENGTH = 8
MODEL = {
    "num_layers": 1,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "num_query_groups": 1,
}


def write_token_store(prefix: Path) -> Path:
    """Write the tokens that the checkpoint was trained on."""
    with TokenStoreWriter(prefix, np.uint16) as writer:
        for document in range(12):
            tokens = [(i * i + document) % VOCABULARY for i in range(40)]
            writer.add_document(np.array(tokens, np.uint16))
    return prefix


def test_every_byte_matches_its_checksum_and_the_run_state_is_read(tmp_path):
    stored = store.newest(FOLDER / "saved")
    data = fingerprint(write_token_store(tmp_path / "tiny")) | {"prefix": "tiny"}
    assert stored.path.name == "step-00000003"
    assert stored.skipped == ()
    assert stored.state == RunState(
        step=3,
        consumed_samples=12,
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        optimizer_steps=3,
        skipped_steps=1,
        roll_backs=2,
        recent_losses=EXPECTED["losses"],
        end_of_document=0,
        processes="pipe 1, data 1, ring 2, ulysses 1, tensor 1",
        commit="12b39abe6e222424a73706b351ea80a3d99c957c",
        written_at="2026-11-27 22:51:51",
        data=[data],
    )


def test_the_config_is_read():
    config = store.read_config(FOLDER / "saved/step-00000003")
    assert {name: getattr(config.model, name) for name in MODEL} == MODEL
    assert config.data.seq_length == LENGTH
    assert config.training.zero_stage == 1
    assert config.parallel.context_parallel_size == 2


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_moments_have_the_values_that_were_written(kind):
    tensors = Tensors.open(FOLDER / "saved/step-00000003")
    assert tensors.kinds == KINDS
    assert {name: list(shape) for name, shape in tensors.shapes.items()} == {
        name: expected["shape"] for name, expected in EXPECTED["values"].items()
    }
    for name, expected in EXPECTED["values"].items():
        values = tensors.read(name, kind)
        first, last, squares = expected[kind]
        assert values.dtype == torch.float32
        assert values.flatten()[0].item() == first
        assert values.flatten()[-1].item() == last
        assert values.double().square().sum().item() == pytest.approx(squares, rel=1e-12)


def resume(rank: int, world_size: int, folder: Path, prefix: Path) -> list[tuple[float, float]]:
    """Resume on a ring of ``world_size`` ranks; returns (loss, gradient norm) of the next steps."""
    tiny.VOCAB = VOCABULARY
    tiny.SEQ = LENGTH
    config = tiny.config(
        model=MODEL,
        data={"seq_length": LENGTH},
        parallel={"context_parallel_size": world_size},
        training={"zero_stage": 1},
        checkpoint={"load": str(folder), "save": str(folder)},
    )
    run = tiny.Run(config, prefix, rank, world_size)
    run.resume(run.find())
    return run.steps(len(EXPECTED["following_steps"]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_steps_after_resuming_are_those_of_the_run_that_wrote_it(world_size, tmp_path):
    folder = shutil.copytree(FOLDER / "saved", tmp_path / "saved")
    prefix = write_token_store(tmp_path / "tiny")
    for steps in run_ranks(world_size, resume, folder, prefix):
        for found, expected in zip(steps, EXPECTED["following_steps"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
