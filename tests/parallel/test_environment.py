"""The launcher's environment variables: how ranks, ports, threads and defaults follow from them."""

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

# The variables that each launcher sets for rank 5 of 8 on the second of two machines.
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
    """An empty environment for each test, on a machine of sixteen cores."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    return os.environ


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_are_read_from_every_launcher(launcher, environ):
    environ.update(LAUNCHERS[launcher])
    assert Environment.read() == Environment(
        global_rank=5, local_rank=1, world_size=8, local_size=4, threads=4
    )


def test_without_a_launcher_the_world_size_is_one_and_all_cores_are_used(environ):
    assert Environment.read() == Environment(
        global_rank=0, local_rank=0, world_size=1, local_size=1, threads=16
    )


def test_variables_of_torchrun_within_slurm_take_precedence(environ):
    """srun starts one torchrun on each node, in any distribution."""
    environ.update(
        LAUNCHERS["srun"]
        | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_GTIDS": "0,2"}
        | LAUNCHERS["torchrun"]
    )
    assert Environment.read() == Environment(
        global_rank=5, local_rank=1, world_size=8, local_size=4, threads=4
    )
    Environment.read().complete()


def test_ranks_of_one_machine_share_its_cores_but_have_at_least_one_thread(environ):
    environ.update({"RANK": "0", "WORLD_SIZE": "64"})
    assert Environment.read().threads == 1


def test_omp_num_threads_sets_the_threads(environ):
    environ["OMP_NUM_THREADS"] = "3"
    assert Environment.read().threads == 3


@pytest.mark.parametrize(
    ("launcher", "address", "port"),
    [("deepspeed", "127.0.0.1", "29500"), ("srun", "node07", str(15000 + 5043))],
)
def test_variables_that_the_launcher_left_out_are_set(launcher, address, port, environ):
    environ.update(LAUNCHERS[launcher])
    Environment.read().complete()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environ[name] for name in names] == ["5", "1", "8", address, port]


def test_a_single_process_takes_any_free_port(environ):
    Environment.read().complete()
    assert environ["MASTER_PORT"] == "0"


def test_master_addr_and_port_set_the_rendezvous_of_a_step(environ):
    environ.update(LAUNCHERS["srun"] | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    Environment.read().complete()
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_ranks_that_srun_distributes_cyclically_are_refused(environ):
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
def test_the_first_host_of_a_node_list(node_list, first):
    assert first_host(node_list) == first


def test_variables_that_the_launcher_set_are_kept(environ):
    environ.update(LAUNCHERS["torchrun"] | {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"})
    before = dict(environ)
    Environment.read().complete()
    assert environ == before


def test_outside_of_a_step_slurms_variables_do_not_count_processes(environ):
    environ.update(
        {name: value for name, value in LAUNCHERS["srun"].items() if name != "SLURM_STEP_ID"}
    )
    assert Environment.read().world_size == 1


def test_cpus_per_task_of_srun_set_the_threads(environ):
    environ.update(LAUNCHERS["srun"] | {"SLURM_CPUS_PER_TASK": "12"})
    assert Environment.read().threads == 12


def test_the_outermost_of_nested_thread_counts_is_used(environ):
    environ.update({"OMP_NUM_THREADS": "4,2"})
    assert Environment.read().threads == 4


# Prints the page faults of a process while it allocates and frees 64 MB repeatedly.
FAULTS = """
import resource, torch
from megatron_ring.parallel.environment import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
def faults():
    torch.zeros(1 << 26, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
[faults() for _ in range(16)]  # glibc caches seven remainders of aligned memory before it merges
print(-faults() + [faults() for _ in range(8)][-1])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries have no such parameters"
)
@pytest.mark.parametrize(
    ("variables", "is_reused"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)]
)
def test_freed_memory_is_reused_unless_the_environment_configures_malloc(variables, is_reused):
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in environment._MALLOC_SETTINGS
    }
    run = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    pages = 8 * (1 << 26) // resource.getpagesize()
    assert (int(run.stdout) < pages / 1000) == is_reused  # a huge page is 512 pages


def test_a_free_port_can_be_listened_at():
    with socket.create_server(("127.0.0.1", free_port())):
        pass


def test_an_error_is_raised_if_no_port_is_free(monkeypatch):
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
    without_variables = Environment.read()
    environ.update(dict.fromkeys(EMPTY, ""))
    assert Environment.read() == without_variables
    Environment.read().complete()
    environment.fix_reduction_order()
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    assert [environ[name] for name in names] == ["0", "0", "1", "0"]
    assert environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment.socket_interfaces(["eth0", "lo"]) == []


@pytest.mark.parametrize("name", sorted(set(LAUNCHERS["srun"]) - {"SLURM_STEP_NUM_TASKS"}))
def test_an_empty_variable_of_slurm_raises_nothing(name, environ):
    environ.update(LAUNCHERS["srun"] | {name: ""})
    Environment.read().complete()


def test_only_empty_variables_of_libraries_are_removed(environ):
    environ.update(
        {"DS_ACCELERATOR": "", "DEEPSPEED_TIMEOUT": "", "OMP_NUM_THREADS": "", "RANK": ""}
    )
    kept = {"CUDA_VISIBLE_DEVICES": "", "PATH": "", "MASTER_PORT": "1234", "NO_COLOR": ""}
    environ.update(kept)
    environment.remove_empty_variables()
    assert {name: value for name, value in environ.items() if not name.startswith("PYTEST")} == kept


def test_the_package_removes_them_before_it_imports_a_library():
    code = (
        "import megatron_ring.engine.engine, os\n"
        "print(sorted(n for n, v in os.environ.items() if not v))"
    )
    empty = dict.fromkeys(
        ["DS_ACCELERATOR", "DEEPSPEED_TIMEOUT", "TRITON_CACHE_DIR", "SLURM_STEP_ID"], ""
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | empty, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not set(empty) & set(re.findall(r"\w+", run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"RANK": "first"}, "RANK"),
        ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "99999999"}, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "many"}, "OMP_NUM_THREADS"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"MASTER_PORT": "0", "WORLD_SIZE": "2"}, "MASTER_PORT"),
        (LAUNCHERS["srun"] | {"SLURM_GTIDS": "4-7"}, "SLURM_GTIDS"),
    ],
)
def test_variables_that_are_not_numbers_or_out_of_range_are_refused_by_name(
    variables, refused, environ
):
    environ.update(variables)
    with pytest.raises(ConfigError, match=rf"^{refused} is "):
        Environment.read().complete()


@pytest.mark.parametrize(
    ("variables", "interfaces"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth1,nothing"}, ["eth1"]),
        ({"NCCL_SOCKET_IFNAME": "eth"}, ["eth0", "eth1"]),
        ({"NCCL_SOCKET_IFNAME": "=eth,ib0"}, ["ib0"]),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo,eth1"}, ["eth0", "ib0"]),
        ({"NCCL_SOCKET_IFNAME": "^=eth0"}, ["eth1", "ib0", "lo", "docker0"]),
        ({"NCCL_SOCKET_IFNAME": "ib,eth0", "GLOO_SOCKET_IFNAME": "eth1"}, ["eth1", "eth0", "ib0"]),
    ],
)
def test_interfaces_are_selected_as_gloo_and_nccl_do(variables, interfaces, environ):
    environ.update(variables)
    assert environment.socket_interfaces(["eth0", "eth1", "ib0", "lo", "docker0"]) == interfaces
