"""Rings of real processes with a fault in one of them, and how each rank exits."""

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
from megatron_ring.monitoring.watchdog import ring_watchdog
from megatron_ring.parallel.collectives import ProcessGroups
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.grid import Grid
from megatron_ring.parallel.progress import Direction, ProgressSnapshot, ProgressTracker

RANKS = 3
STEPS = 3
TIMEOUT = 6
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
SHARD_LENGTH = 8


@dataclass(frozen=True)
class Fault:
    """A fault of rank 1 in the given hop: a signal or a sleep in seconds, by default nothing."""

    step: int = 2
    layer: int = 1
    direction: Direction = Direction.BACKWARD
    hop: int = 2
    signal: int = 0
    sleep: float = 0

    def inject(self, progress: ProgressSnapshot, folder: Path) -> None:
        """Act in the fault's hop, after creating the file ``struck`` in ``folder``."""
        if progress[:4] != (self.step, self.layer, self.direction, self.hop):
            return
        (folder / "struck").touch()
        if self.signal:
            os.kill(os.getpid(), self.signal)
        time.sleep(self.sleep)


@dataclass(frozen=True)
class Exit:
    """How a rank exited.

    exit_code: None if it did not exit by itself. losses: of its completed steps.
    """

    exit_code: int | None
    losses: list[float]
    stderr: str


class FaultyKernel:
    """The reference kernel, which injects the fault before its hop."""

    def __init__(self, fault: Fault, progress: ProgressTracker, folder: Path):
        self.fault = fault
        self.progress = progress
        self.folder = folder

    def forward(self, *inputs) -> None:
        self.fault.inject(self.progress.read(), self.folder)
        reference.forward(*inputs)

    def backward(self, *inputs) -> None:
        self.fault.inject(self.progress.read(), self.folder)
        reference.backward(*inputs)


class Ring:
    """Three processes that train in a ring, the second with a ``fault``; they run in parallel."""

    def __init__(self, folder: Path, fault: Fault = Fault(), ring_timeout: int = TIMEOUT):
        folder.mkdir()
        multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", __name__])
        start = multiprocessing.get_context("forkserver").Process
        self.folder = folder
        self.exits_alone = [rank != 1 or fault.signal != signal.SIGSTOP for rank in range(RANKS)]
        self.processes = [
            start(target=_rank, args=(rank, folder, fault, ring_timeout)) for rank in range(RANKS)
        ]
        for process in self.processes:
            process.start()

    def suspend(self, seconds: float) -> None:
        """Suspend all ranks for ``seconds`` once rank 1 has reached its fault."""
        deadline = time.monotonic() + 100
        while not (self.folder / "struck").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for number, pause in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0)):
            for process in self.processes:
                os.kill(process.pid, number)
            time.sleep(pause)

    def wait(self, seconds: float = 150) -> list[Exit]:
        """Wait at most ``seconds`` for the ranks that exit by themselves, then kill the rest.

        Returns how each rank exited.
        """
        deadline = time.monotonic() + seconds
        for process, exits_alone in zip(self.processes, self.exits_alone):
            if exits_alone:
                process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return [
            Exit(code, self._losses(rank), self._stderr(rank)) for rank, code in enumerate(codes)
        ]

    def _losses(self, rank: int) -> list[float]:
        return json.loads((self.folder / f"{rank}.losses").read_text() or "[]")

    def _stderr(self, rank: int) -> str:
        return (self.folder / f"{rank}.stderr").read_text()


def _rank(rank: int, folder: Path, fault: Fault, ring_timeout: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.dup2(os.open(folder / f"{rank}.stderr", os.O_CREAT | os.O_WRONLY), 2)
    (folder / f"{rank}.losses").touch()
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(minutes=5), RANKS, rank
    )
    progress = ProgressTracker()
    groups = ProcessGroups.build(Grid(ring=RANKS), rank, ring_timeout)
    own_fault = fault if rank == 1 else Fault(step=0)
    KERNELS["faulty"] = FaultyKernel(own_fault, progress, folder)
    with ring_watchdog(progress, groups, ring_timeout, Consensus.build()):
        (folder / f"{rank}.losses").write_text(json.dumps(_train(rank, progress, groups)))
        dist.barrier()
    dist.destroy_process_group()


def _train(rank: int, progress: ProgressTracker, groups: ProcessGroups) -> list[float]:
    """Train by gradient descent with full recompute, attention included.

    Returns the losses of this rank's tokens.
    """
    layout = Layout("striped", SHARD_LENGTH * RANKS, RANKS)
    attention = ContextParallelAttention(layout, "faulty", groups, progress)
    memory = MemoryConfig(recompute="full", recompute_attention=True)
    layers = build(Layers, MODEL, layout.seq_length, attention, seed=1, memory=memory)
    progress.track_layers(layers)
    x_BlE = torch.randn(
        1, SHARD_LENGTH, MODEL.hidden_size, generator=torch.Generator().manual_seed(rank)
    )
    losses = []
    for _ in progress.track_steps(range(1, STEPS + 1)):
        loss = layers.run(x_BlE, layout.positions(rank), None).sin().sum()
        loss.backward()
        with torch.no_grad():
            for parameter in layers.parameters():
                dist.all_reduce(parameter.grad)
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses
