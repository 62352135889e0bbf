import os

import pytest

from megatron_ring.parallel.environment import Environment

# What each launcher says to rank 5 of 8 on the second of two machines.
LAUNCHERS = {
    "torchrun": {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
    "deepspeed": {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"},
    "srun": {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_NTASKS_PER_NODE": "4",
    },
}


@pytest.fixture
def environ(monkeypatch) -> dict[str, str]:
    """An environment of its own for each test, empty at first, on a machine of sixteen cores."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    return os.environ


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_understood(launcher, environ):
    environ.update(LAUNCHERS[launcher])
    assert Environment.read() == Environment(global_rank=5, local_rank=1, world_size=8, local_size=4, threads=4)


def test_alone_a_process_is_the_whole_world_and_has_all_cores(environ):
    assert Environment.read() == Environment(global_rank=0, local_rank=0, world_size=1, local_size=1, threads=16)


def test_torchrun_within_slurm_is_believed(environ):
    environ.update(LAUNCHERS["torchrun"] | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"})
    assert Environment.read().global_rank == 5
    assert Environment.read().world_size == 8


def test_ranks_of_one_machine_share_its_cores_but_each_has_one(environ):
    environ.update({"RANK": "0", "WORLD_SIZE": "64"})
    assert Environment.read().threads == 1


def test_threads_that_are_asked_for_are_given(environ):
    environ["OMP_NUM_THREADS"] = "3"
    assert Environment.read().threads == 3


def test_what_the_launcher_left_out_is_completed(environ):
    environ.update(LAUNCHERS["srun"] | {"MASTER_ADDR": "node1"})
    Environment.read().complete()
    told = {name: environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert told == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_what_the_launcher_said_is_kept(environ):
    environ.update(LAUNCHERS["torchrun"] | {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"})
    before = dict(environ)
    Environment.read().complete()
    assert environ == before


def test_a_batch_script_that_carries_slurms_names_is_still_alone(environ):
    environ.update({name: value for name, value in LAUNCHERS["srun"].items() if name != "SLURM_STEP_ID"})
    assert Environment.read().world_size == 1


def test_the_outermost_number_of_threads_counts(environ):
    environ.update({"OMP_NUM_THREADS": "4,2"})
    assert Environment.read().threads == 4
