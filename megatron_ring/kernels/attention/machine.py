"""What of this machine and its libraries decides which attention kernel can run and is fast."""

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch

from megatron_ring.kernels.attention.support import Unsupported


@dataclass(frozen=True)
class Machine:
    """gpu: its name, "" without one. capability: its compute capability. cudnn: 91002 is 9.10.2; 0 where torch is built
    without it. flash_2: the version of flash-attn, "" without it. flash_3: flash-attn 3 is installed."""

    gpu: str = ""
    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0
    flash_2: str = ""
    flash_3: bool = False
    triton: bool = False

    @staticmethod
    @functools.cache
    def here() -> "Machine":
        """This process's; looked up once, for hops ask too."""
        gpu = torch.cuda.is_available()
        return Machine(
            gpu=torch.cuda.get_device_name() if gpu else "",
            capability=torch.cuda.get_device_capability() if gpu else (0, 0),
            cudnn=torch.backends.cudnn.version() or 0,
            flash_2=_version("flash-attn"),
            flash_3=bool(importlib.util.find_spec("flash_attn_3")),
            triton=bool(importlib.util.find_spec("triton")),
        )

    def named(self, device_type: str) -> str:
        """The GPU's name, or the type of the device."""
        return (self.gpu if device_type == "cuda" else "") or device_type

    def below(self, capability: tuple[int, int]) -> Unsupported | None:
        """Why a kernel that needs a GPU of this compute capability cannot run."""
        if self.capability >= capability:
            return None
        has = "this one has {}.{}".format(*self.capability) if self.gpu else "there is none"
        needs = "it needs a GPU of compute capability {}.{}".format(*capability)
        return Unsupported(f"{needs}, and {has}", "Set --attention-kernel sdpa, or auto")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
