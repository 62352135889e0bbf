"""A run that has lost the lease on --save neither publishes nor deletes anything there."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ring.checkpoint import lease, names, tensors
from megatron_ring.checkpoint.lease import Lease, Owner
from megatron_ring.errors import CheckpointError
from megatron_ring.training import checkpointing
from tests.distributed import run_ranks
from tests.training import tiny


def lose_lease_while_saving(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    for async_save in (False, True):
        saved = folder / f"async-{async_save}"
        saving = {"save": str(saved), "load": str(saved), "async_save": async_save}
        run = tiny.Run(tiny.config(checkpoint=saving), prefix, rank, world_size)
        own_lease = lease.take(saved, Owner.here(), seconds=1000) if rank == 0 else None
        run.saver = checkpointing.Saver(run.setup, run.consensus, None, own_lease)
        run.steps(1)
        assert run.save().name == "step-00000001"
        run.steps(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "write_part", write_then_lose_lease(rank, saved))
            with pytest.raises(CheckpointError, match="no longer holds"):
                run.save()
        other_file = saved / names.partial_name(2) / "theirs"
        for _ in range(2):
            assert other_file.read_text() == "of the other run"
            assert (saved / names.LATEST).read_text().strip() == "step-00000001"
            assert not names.final_path(saved, 2).exists()
            with pytest.raises(CheckpointError, match="no longer holds"):
                run.save()


def write_then_lose_lease(rank: int, saved: Path):
    """Write a part, then let another run begin the same checkpoint before it is published."""
    write_part = tensors.write_part

    def write(partial: Path, *args):
        written = write_part(partial, *args)
        dist.barrier()
        if rank == 0:
            assert Lease.create(saved, 2, Owner.here())
            shutil.rmtree(partial)
            partial.mkdir()
            (partial / "theirs").write_text("of the other run")
        return written

    return write


def test_a_save_without_the_lease_fails_on_all_ranks_and_leaves_the_other_run_alone(
    tmp_path,
):
    run_ranks(2, lose_lease_while_saving, tmp_path, tiny.write_store(tmp_path))
