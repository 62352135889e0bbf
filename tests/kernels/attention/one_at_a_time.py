"""Triton's interpreter for rings whose ranks are threads: it replaces parts of its language while it runs a kernel."""

import threading
from dataclasses import dataclass, field
from typing import Any

from megatron_ring.kernels.attention import HopKernel


@dataclass(frozen=True)
class OneAtATime:
    """A kernel that no two threads run together."""

    kernel: HopKernel
    turn: Any = field(default_factory=threading.Lock)

    def forward(self, *arguments) -> None:
        with self.turn:
            self.kernel.forward(*arguments)

    def backward(self, *arguments) -> None:
        with self.turn:
            self.kernel.backward(*arguments)
