"""What the launcher says of this process. The one file that reads ``os.environ``.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` sets SLURM's names; alone, a process is
the whole world.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    global_rank: int
    local_rank: int
    world_size: int

    @staticmethod
    def read() -> "Environment":
        return Environment(
            global_rank=_integer("RANK", "SLURM_PROCID", default=0),
            local_rank=_integer("LOCAL_RANK", "SLURM_LOCALID", default=0),
            world_size=_integer("WORLD_SIZE", "SLURM_NTASKS", default=1),
        )

    def complete(self) -> None:
        """Give torch's rendezvous what the launcher left out, so that a bare ``python`` is a world of one."""
        os.environ.setdefault("RANK", str(self.global_rank))
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        os.environ.setdefault("WORLD_SIZE", str(self.world_size))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")


def _integer(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)
