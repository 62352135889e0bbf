"""Ranks agree on a GPU for each of them, and all end with one error if one has none."""

import os
import re
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from megatron_ring.errors import ConfigError
from megatron_ring.parallel import entry_point, rendezvous, store_probe
from megatron_ring.parallel.environment import Environment, RendezvousAddress
from tests.programs import free_port, start_rank

GPU_PROGRAM = Path(__file__).with_name("gpu_program.py")
MINUTE = timedelta(minutes=1)


class View(NamedTuple):
    """What a rank sees: its local rank, the ranks of its host, and the UUIDs of its GPUs."""

    local_rank: int
    local_size: int
    gpus: list[str]


def host(ranks: int, gpus: list[str]) -> list[View]:
    """Return the ranks of a host, all of which see all of its GPUs."""
    return [View(rank, ranks, gpus) for rank in range(ranks)]


@pytest.fixture
def assign(monkeypatch):
    """A function that returns each rank's GPU index or error message, in rank order."""
    seen = threading.local()
    monkeypatch.setattr(rendezvous, "visible_gpus", lambda: seen.gpus)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)

    def assign(views: list[View]) -> list[int | str]:
        port = int(free_port())

        def of_rank(rank: int) -> int | str:
            view = views[rank]
            seen.gpus = view.gpus
            store = dist.TCPStore(
                "127.0.0.1", port, len(views), rank == 0, MINUTE, wait_for_workers=False
            )
            environment = Environment(rank, view.local_rank, len(views), view.local_size, 1)
            try:
                return rendezvous.assign_gpu(environment, "cuda" if view.gpus else "cpu", store)
            except ConfigError as error:
                return str(error)

        with ThreadPoolExecutor(len(views)) as threads:
            return list(threads.map(of_rank, range(len(views))))

    return assign


TWO, FOUR = ["a", "b"], ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("views", "indices"),
    [
        (host(2, TWO), [0, 1]),
        (host(2, FOUR), [0, 1]),
        (host(2, TWO) + host(2, ["c", "d"]), [0, 1, 0, 1]),
        # srun --gpus-per-task=1 shows each of its ranks another GPU.
        ([View(rank, 3, [gpu]) for rank, gpu in enumerate("abc")], [0, 0, 0]),
        (host(3, []), [0, 0, 0]),
        (host(1, ["a"]), [0]),
    ],
    ids=["all", "some", "two hosts", "one for each task", "on CPUs", "alone"],
)
def test_each_rank_has_a_gpu_of_its_own(views, indices, assign):
    assert assign(views) == indices


@pytest.mark.parametrize(
    ("views", "numbers"),
    [
        (host(2, ["a"]), ["2 ranks", "1 GPU,", "--num_gpus 1", "--nproc-per-node 1"]),
        (host(3, TWO), ["3 ranks", "2 GPUs", "--num_gpus 2", "--ntasks-per-node 2"]),
        (host(2, TWO) + host(2, ["c"]), ["2 ranks", "1 GPU,", "at most 1"]),
        ([View(0, 2, ["a"]), View(1, 2, ["a"])], ["2 ranks", "1 GPU,"]),
        ([View(0, 2, TWO), View(0, 2, TWO)], ["2 ranks", "2 visible GPUs", "LOCAL_RANK"]),
    ],
    ids=["two on one", "three on two", "second host", "bound to the same", "same local rank"],
)
def test_a_rank_without_a_gpu_is_one_error_on_every_rank(views, numbers, assign):
    [message] = set(assign(views))
    assert all(number in message for number in numbers)
    assert "NCCL_MULTI_RANK_GPU_ENABLE=1" in message


@pytest.mark.parametrize(
    ("views", "indices"),
    [
        ([View(0, 3, ["a"])] * 3, [0, 0, 0]),
        (host(3, ["a"]), [0, 0, 0]),
        (host(4, TWO), [0, 1, 0, 1]),
    ],
    ids=["local rank 0 for all", "own local ranks", "two GPUs"],
)
def test_ranks_share_a_gpu_where_nccl_may(views, indices, assign, monkeypatch):
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert assign(views) == indices
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")
    [message] = set(assign(views))
    assert f"{len(views)} ranks" in message


def test_ranks_on_cpus_beside_ranks_on_gpus_are_one_error_on_every_rank(assign):
    [message] = set(assign([*host(2, TWO), *host(1, [])]))
    assert "2 of 3 ranks" in message
    assert "CUDA_VISIBLE_DEVICES" in message


@pytest.mark.parametrize(("world_size", "bound"), [(1, None), (4, torch.device("cuda", 2))])
def test_on_cuda_the_group_of_several_ranks_is_bound_to_the_gpu(world_size, bound, monkeypatch):
    requested = {}
    devices = []
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, world_size)]))
    monkeypatch.setattr(rendezvous, "assign_gpu", lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: requested.update(options)
    )
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": "3"})
    rendezvous.join(Environment(0, 3, world_size, world_size, 1), "cuda", MINUTE)
    assert requested["device_id"] == bound
    assert requested["timeout"] == MINUTE
    assert devices == [2]
    assert os.environ["LOCAL_RANK"] == "2"  # which DeepSpeed takes for the index of the device


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_join_is_one_error_that_it_prints_itself(rank, monkeypatch, capsys):
    address = {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    environment = Environment(rank, rank, 2, 2, 1)
    with socket.create_server(("", 0)) as other_program:
        port = other_program.getsockname()[1]
        if rank:
            other_program.close()  # nothing listens there
        monkeypatch.setattr(os, "environ", address | {"MASTER_PORT": str(port)})
        monkeypatch.setattr(entry_point, "_SECONDS_FOR_MESSAGE", 0)
        with pytest.raises(SystemExit) as leaving, entry_point.report_once(environment):
            rendezvous.join(environment, "cpu", timedelta(seconds=0.5))
    assert leaving.value.code == 2
    [message] = re.findall(r"ConfigError .*", capsys.readouterr().err)
    expected = "--master_port" if rank == 0 else "rank 1 of 2 found no process .*127.0.0.1.* 0.5 s"
    assert re.search(expected, message)
    assert str(port) in message


def test_a_rank_that_reaches_another_program_at_the_port_ends_with_one_error(monkeypatch):
    monkeypatch.setattr(store_probe, "_SECONDS_TO_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent_program:
        port = str(silent_program.getsockname()[1])
        # Never closed: torch's client, still waiting in its thread, would print a stack.
        os.dup(silent_program.fileno())
    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    with pytest.raises(ConfigError, match=rf"rank 1 of 2 .*{port}.*--master_port") as raised:
        rendezvous.join(Environment(1, 1, 2, 2, 1), "cpu", MINUTE)
    assert raised.value.prints_on_every_rank


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64])
def test_a_rank_that_cannot_resolve_the_address_ends_with_one_error(rank, host, monkeypatch):
    monkeypatch.setattr(store_probe, "_SECONDS_TO_RESOLVE", 0)
    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": host, "MASTER_PORT": "29500"})
    with pytest.raises(ConfigError, match=rf"rank {rank} of 2 .*MASTER_ADDR '{host}'") as raised:
        rendezvous.join(Environment(rank, rank, 2, 2, 1), "cpu", MINUTE)
    assert "--master_addr" in str(raised.value)
    assert raised.value.prints_on_every_rank


def test_a_name_that_resolves_late_is_awaited(monkeypatch):
    results = [socket.gaierror(-2, "Name or service not known"), []]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: raise_or_return(results.pop(0)))
    monkeypatch.setattr(store_probe, "_SECONDS_BETWEEN_TRIES", 0)
    store_probe.check_resolvable(RendezvousAddress("pod-0", "29500"))
    assert not results


def raise_or_return(result):
    if isinstance(result, Exception):
        raise result
    return result


LOST = "[/pytorch/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1461."


@pytest.mark.parametrize(
    ("error", "rank", "code", "message"),
    [
        (KeyboardInterrupt(), 0, 130, "Interrupted"),
        (KeyboardInterrupt(), 1, 130, ""),
        (RuntimeError(LOST), 0, 76, "RingStalled on rank 0"),
        (RuntimeError(LOST), 1, 76, "RingStalled on rank 1"),
    ],
)
def test_an_interrupt_and_the_end_of_another_rank_are_one_line(
    error, rank, code, message, monkeypatch, capsys
):
    monkeypatch.setattr(entry_point, "_SECONDS_FOR_MESSAGE", 0)
    environment = Environment(rank, rank, 2, 2, 1)
    with (
        pytest.raises(SystemExit) as leaving,
        entry_point.report_once(environment),
        entry_point.report_ended_ranks(environment),
    ):
        raise error
    assert leaving.value.code == code
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.split("\n")) == (3 if message else 1)


def test_other_errors_keep_their_traceback():
    environment = Environment(0, 0, 2, 2, 1)
    with pytest.raises(RuntimeError), entry_point.report_ended_ranks(environment):
        raise RuntimeError("a bug, without gloo")


def test_an_unknown_interface_is_an_error_with_the_known_ones(monkeypatch):
    reason = "[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: nope0"

    def fail(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(ConfigError, match=r"nope0.*GLOO_SOCKET_IFNAME.*\(.*lo.*\)"):
        rendezvous.join(Environment(0, 0, 1, 1, 1), "cpu", MINUTE)


def run_two_ranks(folder: Path, gpus: tuple[int, int]) -> list[tuple[int, str]]:
    """Return the exit code and the output of each of two ranks of the program."""
    (folder / "small.yaml").write_text("")
    port = free_port()
    ranks = [
        start_rank(
            rank,
            port,
            folder,
            ["--context-parallel", "ring"],
            program=GPU_PROGRAM,
            stderr=subprocess.STDOUT,
            LOCAL_WORLD_SIZE="2",
            STAND_IN_GPUS=str(gpus[rank]),
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs)]


def test_two_ranks_on_a_machine_with_one_gpu_end_with_one_message(tmp_path):
    (first_code, first), (second_code, second) = run_two_ranks(tmp_path, (1, 1))
    assert (first_code, second_code) == (2, 2)
    assert "Traceback" not in first + second
    [message] = re.findall("ConfigError .*", first + second)
    assert "2 ranks run on" in message
    assert "1 GPU" in message
    assert "--num_gpus 1" in message


def test_a_rank_that_sees_no_gpu_ends_both(tmp_path):
    results = run_two_ranks(tmp_path, (1, 0))
    assert [code for code, _ in results] == [2, 2]
    assert "1 of 2 ranks see a GPU" in "".join(output for _, output in results)
