"""What tests of the whole program share: a folder to work in, ports, and ranks started without a launcher."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_ring.parallel import environment
from tests.forked import Forked

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "pretrain_gpt.py"


def working_folder(folder: Path, config: str) -> Path:
    """``folder`` with ``config`` as small.yaml and a prepared store, text/tokens."""
    (folder / "small.yaml").write_text(config)
    (folder / "pages").mkdir()
    for page in range(20):
        (folder / "pages" / f"{page}.txt").write_text(
            "\n".join(f"line {i} of page {page}" for i in range(40))
        )
    prepare = [
        sys.executable,
        ROOT / "tools" / "prepare_data.py",
        "--input",
        "pages",
        "--vocab-size",
        "300",
    ]
    subprocess.run([*prepare, "--output-prefix", "text/tokens"], cwd=folder, check=True)
    return folder


def free_port() -> str:
    """As flags and environments say it."""
    return str(environment.free_port())


def start_rank(
    rank: int,
    port: str,
    folder: Path,
    flags: Iterable[str],
    program: Path = PROGRAM,
    stderr: int = subprocess.STDOUT,
    config: str = "small.yaml",
    **variables: str,
) -> Forked:
    """``program`` as one of two ranks that meet at ``port``, without a launcher.

    ``variables`` are more of its environment, or another ``WORLD_SIZE``.
    """
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [str(program), "--config", config, *flags]
    return Forked(command, folder, os.environ | world | variables, stderr)
