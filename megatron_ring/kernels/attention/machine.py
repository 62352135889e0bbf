"""The machine's GPU and libraries, which decide which attention kernels can run and are fast."""

import functools
import importlib.util
from dataclasses import dataclass

import torch

from megatron_ring.kernels.selection import Unsupported, installed_version


@dataclass(frozen=True)
class Machine:
    """A GPU and the libraries installed beside it.

    gpu: its name, "" without one. capability: its compute capability.
    cudnn: torch's cuDNN version, 91002 for 9.10.2, 0 where torch is built without cuDNN.
    flash_2, flash_4: the versions of flash-attn and flash-attn-4, "" without them. flash_3: whether
        flash-attn 3 is installed, which states no version.
    """

    gpu: str = ""
    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0
    flash_2: str = ""
    flash_3: bool = False
    triton: bool = False
    flash_4: str = ""

    @staticmethod
    @functools.cache
    def here() -> "Machine":
        """Inspect the machine of this process; cached, because hops need it too."""
        gpu = torch.cuda.is_available()
        return Machine(
            gpu=torch.cuda.get_device_name() if gpu else "",
            capability=torch.cuda.get_device_capability() if gpu else (0, 0),
            cudnn=torch.backends.cudnn.version() or 0,
            flash_2=installed_version("flash-attn"),
            flash_3=bool(importlib.util.find_spec("flash_attn_3")),
            triton=bool(importlib.util.find_spec("triton")),
            flash_4=installed_version("flash-attn-4"),
        )

    @property
    def has_small_shared_memory(self) -> bool:
        """Whether a program has 99 KiB, as on consumer and Ada GPUs, instead of 163 or 227 KiB.

        CUDA C++ Programming Guide, technical specifications by compute capability.
        """
        return self.capability in ((8, 6), (8, 9)) or self.capability[0] == 12

    def device_name(self, device_type: str) -> str:
        """Return the GPU's name on CUDA, else the device type."""
        return (self.gpu if device_type == "cuda" else "") or device_type

    def requires_capability(self, capability: tuple[int, int]) -> Unsupported | None:
        """Return why a kernel that requires this compute capability cannot run, None if it can."""
        if self.capability >= capability:
            return None
        actual = "this one has {}.{}".format(*self.capability) if self.gpu else "there is none"
        required = "it requires a GPU of compute capability {}.{}".format(*capability)
        return Unsupported(f"{required}, and {actual}", "Set --attention-kernel sdpa, or auto")
