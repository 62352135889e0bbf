"""What the launcher says of this process. The one file that reads ``os.environ``.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and LOCAL_RANK; ``srun`` sets SLURM's names; alone, a process is
the whole world. A batch script carries SLURM's names too, but only within a step of srun do they count processes.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """global_rank, world_size: among all processes. local_rank, local_size: among those of this machine.

    threads: how many this process should compute with on a CPU: OMP_NUM_THREADS where that is set, else its share of
    the cores, so that ranks on one machine do not fight for them.
    """

    global_rank: int
    local_rank: int
    world_size: int
    local_size: int
    threads: int

    @staticmethod
    def read() -> "Environment":
        world_size = _integer("WORLD_SIZE", "SLURM_NTASKS", default=1)
        # deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size = _integer("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", default=world_size)
        return Environment(
            global_rank=_integer("RANK", "SLURM_PROCID", default=0),
            local_rank=_integer("LOCAL_RANK", "SLURM_LOCALID", default=0),
            world_size=world_size,
            local_size=local_size,
            threads=_integer("OMP_NUM_THREADS", default=max(1, len(os.sched_getaffinity(0)) // local_size)),
        )

    def complete(self) -> None:
        """Give torch's rendezvous what the launcher left out, so that a bare ``python`` is a world of one."""
        os.environ.setdefault("RANK", str(self.global_rank))
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        os.environ.setdefault("WORLD_SIZE", str(self.world_size))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")


def _integer(*names: str, default: int) -> int:
    in_step = "SLURM_STEP_ID" in os.environ
    given = (name for name in names if name in os.environ and (in_step or not name.startswith("SLURM_")))
    # OMP_NUM_THREADS may list a number for each nesting level; the outermost comes first.
    return next((int(os.environ[name].split(",")[0]) for name in given), default)
