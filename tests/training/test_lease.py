"""A run whose --save another run has taken over neither publishes nor deletes anything there."""

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


def lose_it_while_saving(rank: int, world_size: int, folder: Path, prefix: Path) -> None:
    for async_save in (False, True):
        saved = folder / f"async-{async_save}"
        saving = {"save": str(saved), "load": str(saved), "async_save": async_save}
        run = tiny.Run(tiny.config(checkpoint=saving), prefix, rank, world_size)
        held = lease.take(saved, Owner.here(), seconds=1000) if rank == 0 else None
        run.saver = checkpointing.Saver(run.setup, run.consensus, None, held)
        run.steps(1)
        assert run.save().name == "step-00000001"
        run.steps(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensors, "write_part", taken_over_afterwards(rank, saved))
            with pytest.raises(CheckpointError, match="no longer holds"):
                run.save()
        theirs = saved / names.partial_name(2) / "theirs"
        for _ in range(2):
            assert theirs.read_text() == "of the other run"
            assert (saved / names.LATEST).read_text().strip() == "step-00000001"
            assert not names.final_path(saved, 2).exists()
            with pytest.raises(CheckpointError, match="no longer holds"):
                run.save()


def taken_over_afterwards(rank: int, saved: Path):
    """Write a part as always, and have another run begin the same checkpoint before this one is published."""
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


def test_a_save_whose_lease_is_lost_is_one_error_on_all_ranks_and_touches_nothing_of_the_other_run(
    tmp_path,
):
    run_ranks(2, lose_it_while_saving, tmp_path, tiny.write_store(tmp_path))
