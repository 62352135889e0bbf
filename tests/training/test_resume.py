"""N + N steps are 2N steps, bit for bit; and the tokens read do not depend on how ranks split them."""

import contextlib
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from megatron_ring.checkpoint import store
from megatron_ring.config import Config
from megatron_ring.errors import CheckpointError
from megatron_ring.training import checkpointing
from tests.distributed import RankFailed, run_ranks
from tests.training import tiny

N = 4


DTYPES_AND_STAGES = {
    f"{dtype}-{stage}": {"training": {"dtype": dtype, "zero_stage": stage}}
    for dtype, stage in (("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 1))
}

TENSOR = {"tensor_model_parallel_size": 2}
TENSOR_AND_PIPE = TENSOR | {"pipeline_model_parallel_size": 2}
MICRO = {"micro_batch_size": 2}
OTHER_GRIDS = {
    "tensor-pipe": {"parallel": TENSOR_AND_PIPE, "training": {"zero_stage": 1, **MICRO}},
    "tensor-pipe-untied": {
        "model": {"untie_embeddings_and_output_weights": True},
        "parallel": TENSOR_AND_PIPE | {"sequence_parallel": True},
        "training": {"zero_stage": 0, **MICRO},
    },
    "tensor-pipe-bf16": {"parallel": TENSOR_AND_PIPE, "training": {"zero_stage": 1, "dtype": "bf16", **MICRO}},
    "tensor-ring": {"parallel": TENSOR | {"sequence_parallel": True}, "training": {"zero_stage": 1}},
    "tensor-ring-3": {"parallel": TENSOR, "training": {"zero_stage": 3}},
}


def stop_and_resume(rank: int, world_size: int, folder: Path, prefix: Path, cases: dict[str, dict]) -> None:
    for name, sections in cases.items():
        saving = {"save": str(folder / name), "load": str(folder / name)}
        stop_and_resume_one(tiny.config(**sections, checkpoint=saving), rank, world_size, prefix)


def stop_and_resume_one(config: Config, rank: int, world_size: int, prefix: Path) -> None:
    straight = tiny.Run(config, prefix, rank, world_size)
    before = straight.steps(N)
    path = checkpointing.save(straight.engine, straight.setup, straight.state())
    expected = straight.steps(N)

    resumed = tiny.Run(config, prefix, rank, world_size)
    stored = checkpointing.find(resumed.setup, tiny.VOCAB)
    assert stored.path == path
    resumed.resume(stored.path, stored.state)
    assert resumed.steps(N) == expected, f"the losses and gradient norms after resuming {path}"
    assert expected != before
    resumed_at, straight_at = resumed.parameters(), straight.parameters()
    assert resumed_at.keys() == straight_at.keys()
    assert all(torch.equal(resumed_at[name], straight_at[name]) for name in straight_at)


@pytest.mark.parametrize(("world_size", "cases"), [(2, DTYPES_AND_STAGES), (4, OTHER_GRIDS)], ids=["ring", "others"])
def test_resuming_is_bit_for_bit(world_size, cases, tmp_path):
    run_ranks(world_size, stop_and_resume, tmp_path, tiny.write_store(tmp_path), cases)


def resume_on_another_grid(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    def config(context_parallel_size: int):
        saving = {"save": str(folder / "saved"), "load": str(folder / "saved")}
        parallel = {"context_parallel_size": context_parallel_size}
        return tiny.config(parallel=parallel, training={"micro_batch_size": 1}, checkpoint=saving)

    straight = tiny.Run(config(4), prefix, rank, world_size)
    straight.steps(N)
    checkpointing.save(straight.engine, straight.setup, straight.state())
    expected = torch.tensor(straight.steps(N))
    for context_parallel_size in (2, 1):
        resumed = tiny.Run(config(context_parallel_size), prefix, rank, world_size)
        stored = checkpointing.find(resumed.setup, tiny.VOCAB)
        resumed.resume(stored.path, stored.state)
        torch.testing.assert_close(torch.tensor(resumed.steps(N)), expected, rtol=1e-5, atol=0)


def test_the_number_of_context_ranks_may_change_on_resume(tmp_path):
    run_ranks(4, resume_on_another_grid, tmp_path, tiny.write_store(tmp_path))


def save_on_a_full_disk(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    saving = {"save": str(folder / "saved"), "load": str(folder / "saved")}
    run = tiny.Run(tiny.config(checkpoint=saving), prefix, rank, world_size)
    run.steps(1)
    first = checkpointing.save(run.engine, run.setup, run.state())
    run.steps(1)
    with files_of_at_most(20_000 if rank == 1 else 1 << 40), pytest.raises(CheckpointError) as failure:
        checkpointing.save(run.engine, run.setup, run.state())
    assert "cannot write the checkpoint of step 2" in str(failure.value)
    assert "step-00000001 stays the newest" in str(failure.value)
    assert store.newest(folder / "saved").path == first
    assert sorted(path.name for path in (folder / "saved").iterdir()) == ["latest", "step-00000001"], "no leftovers"
    run.resume(first, store.newest(folder / "saved").state)


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Let this process write no file of more than ``size`` bytes: what a full disk looks like to it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_on_one_rank_is_one_error_on_all_and_keeps_the_checkpoint_before(tmp_path):
    run_ranks(2, save_on_a_full_disk, tmp_path, tiny.write_store(tmp_path))


def save_until_killed(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    run = tiny.Run(kept_twice(folder), prefix, rank, world_size)
    while True:
        run.steps(1)
        checkpointing.save(run.engine, run.setup, run.state())
        if rank == 0 and run.step == 2:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()


def resume_as_if_nothing_had_happened(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    resumed = tiny.Run(kept_twice(folder), prefix, rank, world_size)
    stored = checkpointing.find(resumed.setup, tiny.VOCAB)
    [reason] = stored.skipped
    assert "_model_states.pt has other bytes than" in reason
    resumed.resume(stored.path, stored.state)
    straight = tiny.Run(kept_twice(folder), prefix, rank, world_size)
    straight.steps(stored.state.step)
    assert resumed.steps(N) == straight.steps(N)


def kept_twice(folder: Path) -> Config:
    return tiny.config(checkpoint={"save": str(folder / "saved"), "load": str(folder / "saved"), "keep_last": 2})


def test_a_killed_run_with_a_flipped_byte_in_its_newest_checkpoint_resumes_from_the_one_before(tmp_path):
    prefix = tiny.write_store(tmp_path)
    with pytest.raises(RankFailed):
        run_ranks(2, save_until_killed, tmp_path, prefix)
    weights = store.newest(tmp_path / "saved").path / "mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    run_ranks(2, resume_as_if_nothing_had_happened, tmp_path, prefix)
