import os
import platform
import re
import resource
import socket
import subprocess
import sys

import pytest

from megatron_ring.errors import ConfigError
from megatron_ring.parallel import environment
from megatron_ring.parallel.environment import Environment, first_host, free_port

# What each launcher says to rank 5 of 8 on the second of two machines.
LAUNCHERS = {
    "torchrun": {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
    "deepspeed": {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"},
    "srun": {
        "SLURM_JOB_ID": "20042",
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_GTIDS": "4,5,6,7",
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
    assert Environment.read() == Environment(
        global_rank=5, local_rank=1, world_size=8, local_size=4, threads=4
    )


def test_alone_a_process_is_the_whole_world_and_has_all_cores(environ):
    assert Environment.read() == Environment(
        global_rank=0, local_rank=0, world_size=1, local_size=1, threads=16
    )


def test_torchrun_within_slurm_is_believed(environ):
    """srun starts a torchrun on each node, whatever way it deals them out."""
    environ.update(
        LAUNCHERS["srun"]
        | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_GTIDS": "0,2"}
        | LAUNCHERS["torchrun"]
    )
    assert Environment.read() == Environment(
        global_rank=5, local_rank=1, world_size=8, local_size=4, threads=4
    )
    Environment.read().complete()


def test_ranks_of_one_machine_share_its_cores_but_each_has_one(environ):
    environ.update({"RANK": "0", "WORLD_SIZE": "64"})
    assert Environment.read().threads == 1


def test_threads_that_are_asked_for_are_given(environ):
    environ["OMP_NUM_THREADS"] = "3"
    assert Environment.read().threads == 3


@pytest.mark.parametrize(
    ("launcher", "address", "port"),
    [("deepspeed", "127.0.0.1", "29500"), ("srun", "node07", str(15000 + 5043))],
)
def test_what_the_launcher_left_out_is_completed(launcher, address, port, environ):
    environ.update(LAUNCHERS[launcher])
    Environment.read().complete()
    told = [
        environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ]
    assert told == ["5", "1", "8", address, port]


def test_alone_a_process_takes_any_port_that_is_free(environ):
    Environment.read().complete()
    assert environ["MASTER_PORT"] == "0"


def test_ranks_of_a_step_meet_where_they_are_told_to(environ):
    environ.update(LAUNCHERS["srun"] | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    Environment.read().complete()
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_ranks_that_srun_deals_out_in_turn_are_refused(environ):
    environ.update(LAUNCHERS["srun"] | {"SLURM_GTIDS": "1,3,5,7"})
    with pytest.raises(
        ConfigError, match=r"srun runs ranks 1, 3, 5, 7 on this node.* srun --distribution=block"
    ):
        Environment.read().complete()


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("node1", "node1"),
        ("node[1-2,7]", "node1"),
        ("node[01-03],other", "node01"),
        ("node7,node[1-2]", "node7"),
        ("a-[08,12]-ib,b-[1-2]", "a-08-ib"),
        ("rack[2-3]n[5-6]", "rack2n5"),
    ],
)
def test_the_first_of_many_nodes(node_list, first):
    assert first_host(node_list) == first


def test_what_the_launcher_said_is_kept(environ):
    environ.update(LAUNCHERS["torchrun"] | {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"})
    before = dict(environ)
    Environment.read().complete()
    assert environ == before


def test_a_batch_script_that_carries_slurms_names_is_still_alone(environ):
    environ.update(
        {name: value for name, value in LAUNCHERS["srun"].items() if name != "SLURM_STEP_ID"}
    )
    assert Environment.read().world_size == 1


def test_a_task_of_srun_computes_with_the_cores_it_was_given(environ):
    environ.update(LAUNCHERS["srun"] | {"SLURM_CPUS_PER_TASK": "12"})
    assert Environment.read().threads == 12


def test_the_outermost_number_of_threads_counts(environ):
    environ.update({"OMP_NUM_THREADS": "4,2"})
    assert Environment.read().threads == 4


# What a process of its own has to take from the system while it takes and frees 64 MB again and again.
FAULTS = """
import resource, torch
from megatron_ring.parallel.environment import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
def faults():
    torch.zeros(1 << 26, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
[faults() for _ in range(16)]  # glibc caches seven crumbs of aligned memory before it joins them
print(-faults() + [faults() for _ in range(8)][-1])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like"
)
@pytest.mark.parametrize(
    ("said", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)]
)
def test_freed_memory_is_kept_unless_the_environment_says_how_it_should_be(said, kept):
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in environment._MALLOC_SETTINGS
    }
    run = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=environ | said,
        capture_output=True,
        text=True,
        check=True,
    )
    pages = 8 * (1 << 26) // resource.getpagesize()
    assert (int(run.stdout) < pages / 1000) == kept  # huge pages are 512 of them


def test_somebody_can_listen_at_a_free_port():
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def test_where_every_port_is_taken_that_is_said(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(environment, "_PORTS", range(port, port + 1))
        with pytest.raises(OSError, match=f"every port of {port} to {port} is in use"):
            free_port()


EMPTY = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
]
EMPTY += ["OMP_NUM_THREADS", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_GTIDS", "SLURM_CPUS_PER_TASK"]
EMPTY += ["CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]


def test_empty_variables_count_as_unset(environ):
    alone = Environment.read()
    environ.update(dict.fromkeys(EMPTY, ""))
    assert Environment.read() == alone
    Environment.read().complete()
    environment.fix_order_of_sums()
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert [environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")] == [
        "0",
        "0",
        "1",
        "0",
    ]
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment.socket_interfaces(["eth0", "lo"]) == []


@pytest.mark.parametrize("name", sorted(set(LAUNCHERS["srun"]) - {"SLURM_STEP_NUM_TASKS"}))
def test_an_empty_variable_of_slurm_is_no_traceback(name, environ):
    environ.update(LAUNCHERS["srun"] | {name: ""})
    Environment.read().complete()


def test_empty_variables_of_libraries_are_removed_and_others_are_not(environ):
    environ.update(
        {"DS_ACCELERATOR": "", "DEEPSPEED_TIMEOUT": "", "OMP_NUM_THREADS": "", "RANK": ""}
    )
    kept = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "MASTER_PORT": "1234", "NO_COLOR": ""}
    environ.update(kept)
    environment.remove_empty_variables()
    assert {name: value for name, value in environ.items() if not name.startswith("PYTEST")} == kept


def test_the_package_removes_them_before_it_imports_a_library():
    code = "import megatron_ring.engine.engine, os; print(sorted(n for n, v in os.environ.items() if not v))"
    empty = dict.fromkeys(
        ["DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", "TRITON_CACHE_DIR", "SLURM_STEP_ID"], ""
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | empty, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not set(empty) & set(re.findall(r"\w+", run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "first"}, "RANK"),
        ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
        (LAUNCHERS["srun"] | {"SLURM_GTIDS": "4-7"}, "SLURM_GTIDS"),
    ],
)
def test_variables_that_are_no_numbers_or_out_of_range_are_refused_by_name(
    variables, named, environ
):
    environ.update(variables)
    with pytest.raises(ConfigError, match=rf"^{named} is "):
        Environment.read().complete()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth1,nothing"}, ["eth1"]),
        ({"NCCL_SOCKET_IFNAME": "eth"}, ["eth0", "eth1"]),
        ({"NCCL_SOCKET_IFNAME": "=eth,ib0"}, ["ib0"]),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo,eth1"}, ["eth0", "ib0"]),
        ({"NCCL_SOCKET_IFNAME": "^=eth0"}, ["eth1", "ib0", "lo", "docker0"]),
        ({"NCCL_SOCKET_IFNAME": "ib,eth0", "GLOO_SOCKET_IFNAME": "eth1"}, ["eth1", "eth0", "ib0"]),
    ],
)
def test_the_interfaces_that_gloo_and_nccl_are_given(variables, named, environ):
    environ.update(variables)
    assert environment.socket_interfaces(["eth0", "eth1", "ib0", "lo", "docker0"]) == named
