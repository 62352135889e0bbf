"""Rings of real processes in which something happens to one: what each rank said, and how it ended."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ring.config import MemoryConfig, ModelConfig
from megatron_ring.context_parallel.attention import ContextParallelAttention
from megatron_ring.context_parallel.layout import Layout
from megatron_ring.kernels.attention import KERNELS, reference
from megatron_ring.model.gpt import Layers
from megatron_ring.model.initialization import build
from megatron_ring.monitoring.watchdog import watched
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.progress import Direction, Place, ProgressTracker

RANKS = 3
STEPS = 3
TIMEOUT = 6
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
LENGTH = 8  # of one rank


@dataclass(frozen=True)
class Fault:
    """What rank 1 does to itself in the given hop: a signal, or seconds of sleep. By default nothing."""

    step: int = 2
    layer: int = 1
    direction: Direction = Direction.BACKWARD
    hop: int = 2
    signal: int = 0
    sleep: float = 0

    def at(self, place: Place, folder: Path) -> None:
        """Act if this is the place; ``folder`` gets the file ``struck`` before."""
        if place[:4] != (self.step, self.layer, self.direction, self.hop):
            return
        (folder / "struck").touch()
        if self.signal:
            os.kill(os.getpid(), self.signal)
        time.sleep(self.sleep)


@dataclass(frozen=True)
class Ended:
    """exit_code: None, it did not end by itself. losses: of the steps that it has done. said: on stderr."""

    exit_code: int | None
    losses: list[float]
    said: str


class Faulty:
    """The reference kernel, which looks where it is."""

    def __init__(self, fault: Fault, place: ProgressTracker, folder: Path):
        self.fault, self.place, self.folder = fault, place, folder

    def forward(self, *inputs) -> None:
        self.fault.at(self.place.read(), self.folder)
        reference.forward(*inputs)

    def backward(self, *inputs) -> None:
        self.fault.at(self.place.read(), self.folder)
        reference.backward(*inputs)


class Ring:
    """Three processes that train a little in a ring, the second of which has a ``fault``; they run on their own."""

    def __init__(self, folder: Path, fault: Fault = Fault(), ring_timeout: int = TIMEOUT):
        folder.mkdir()
        multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", __name__])
        start = multiprocessing.get_context("forkserver").Process
        self.folder = folder
        self.ends = [rank != 1 or fault.signal != signal.SIGSTOP for rank in range(RANKS)]
        self.processes = [
            start(target=_rank, args=(rank, folder, fault, ring_timeout)) for rank in range(RANKS)
        ]
        for process in self.processes:
            process.start()

    def suspend(self, seconds: float) -> None:
        """Once rank 1 is at its fault, suspend all ranks for ``seconds``."""
        deadline = time.monotonic() + 100
        while not (self.folder / "struck").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for number, pause in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0)):
            for process in self.processes:
                os.kill(process.pid, number)
            time.sleep(pause)

    def ended(self, seconds: float = 150) -> list[Ended]:
        """By rank, as soon as those that can end have, or when ``seconds`` are over; then none is left."""
        deadline = time.monotonic() + seconds
        for process, ends in zip(self.processes, self.ends):
            if ends:
                process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return [
            Ended(code, self._losses(rank), self._said(rank)) for rank, code in enumerate(codes)
        ]

    def _losses(self, rank: int) -> list[float]:
        return json.loads((self.folder / f"{rank}.losses").read_text() or "[]")

    def _said(self, rank: int) -> str:
        return (self.folder / f"{rank}.said").read_text()


def _rank(rank: int, folder: Path, fault: Fault, ring_timeout: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.dup2(os.open(folder / f"{rank}.said", os.O_CREAT | os.O_WRONLY), 2)
    (folder / f"{rank}.losses").touch()
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(minutes=5), RANKS, rank
    )
    place, groups = ProgressTracker(), ProcessGroups.build(Grid(ring=RANKS), rank, ring_timeout)
    own_fault = fault if rank == 1 else Fault(step=0)
    KERNELS["faulty"] = Faulty(own_fault, place, folder)
    with watched(place, groups, ring_timeout, Consensus.build()):
        (folder / f"{rank}.losses").write_text(json.dumps(_train(rank, place, groups)))
        dist.barrier()
    dist.destroy_process_group()


def _train(rank: int, place: ProgressTracker, groups: ProcessGroups) -> list[float]:
    """Losses of this rank's tokens, by plain descent, every block computed again and its ring too."""
    layout = Layout("striped", LENGTH * RANKS, RANKS)
    attention = ContextParallelAttention(layout, "faulty", groups, place)
    memory = MemoryConfig(recompute="full", recompute_attention=True)
    layers = build(Layers, MODEL, layout.seq_length, attention, seed=1, memory=memory)
    place.follow(layers)
    x_BlE = torch.randn(1, LENGTH, MODEL.hidden_size, generator=torch.Generator().manual_seed(rank))
    losses = []
    for _ in place.steps(range(1, STEPS + 1)):
        loss = layers.run(x_BlE, layout.positions(rank), None).sin().sum()
        loss.backward()
        with torch.no_grad():
            for parameter in layers.parameters():
                dist.all_reduce(parameter.grad)
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses
