"""The same bits from run to run, for ``--deterministic``: what is asked of torch, and what of it is promised.

A run started again as it was has the same losses, norms and checkpoints, bit for bit: with the same config, processes,
kind of devices and versions of libraries and, on a CPU, as many threads. The attention kernel is chosen by it too
(setup.py). The ring and gloo add up in an order that follows from the ranks alone.

NCCL adds up along rings or trees that it picks by the size of a message and the links it finds, not by the clock, so it
repeats itself on the same nodes; on others, or in another version, it may pick otherwise. ``NCCL_ALGO=Ring`` leaves it
less to pick. Nothing of this has run on a GPU.
"""

import re

import torch

from megatron_ring.errors import ConfigError
from megatron_ring.parallel.environment import fix_order_of_sums

# So torch begins what it raises, a RuntimeError without a class of its own (Context::alertNotDeterministic).
_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


def begin(is_rank_zero: bool) -> None:
    """Bind this process to what repeats itself, before CUDA and process groups start; ``is_rank_zero``: and say so.

    From here on an operator that does not repeat itself raises, and torch fills the memory that it hands out.
    """
    fix_order_of_sums()
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it picks by the clock
    if is_rank_zero:
        print(
            "deterministic    the same bits from run to run, on the same devices and as many of them",
            flush=True,
        )


def refusal(error: RuntimeError) -> ConfigError | None:
    """What to tell the user where ``error`` is torch's, for an operator that only knows how not to repeat itself."""
    refused = _REFUSED.match(str(error))
    if not refused:
        return None
    return ConfigError(
        f"deterministic cannot be had: torch has no form of its operator {refused[1]} that adds up in the same order "
        "every time on this device. Leave --deterministic out."
    )
