"""Starts a training program: its arguments, and --deterministic.

With --deterministic, a run started again the same way has the same losses, gradient norms and
checkpoints, bit for bit: with the same config, number of processes, kind of devices, library
versions and, on a CPU, number of threads. The attention kernel is chosen accordingly
(settings/run_settings.py). The ring and gloo add in an order that depends on the ranks alone.

NCCL adds along rings or trees that it chooses by message size and the links it finds, not by
timing, so it repeats itself on the same nodes; on others, or in another version, it may choose
differently. ``NCCL_ALGO=Ring`` restricts its choice. None of this has been run on a GPU.
"""

import torch

from megatron_ring.config import Config, parse
from megatron_ring.parallel.entry_point import arguments_of_user, read_files_as_utf8
from megatron_ring.parallel.environment import Environment, fix_reduction_order


def parse_arguments(environment: Environment) -> Config:
    """Parse this process's command line, without the arguments that launchers add.

    A bad flag ends the program with exit code 2 and the nearest flags; a bad file raises
    ConfigError. --deterministic takes effect here, because CUDA and NCCL read its settings when
    they start.
    """
    read_files_as_utf8()
    is_rank_zero = environment.global_rank == 0
    config = parse(arguments_of_user(), console=is_rank_zero)
    if config.training.deterministic:
        make_deterministic(is_rank_zero)
    return config


def make_deterministic(is_rank_zero: bool) -> None:
    """Restrict this process to deterministic operators, before CUDA and process groups start.

    From here on a nondeterministic operator raises, and torch fills the memory it allocates. Prints
    a line on global rank 0.
    """
    fix_reduction_order()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it chooses kernels by measured time
    if is_rank_zero:
        print(
            "deterministic    bitwise reproducible on the same devices and number of processes",
            flush=True,
        )
