"""Shared by tests of the whole program: a working folder, ports, and ranks without a launcher."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from megatron_ring.parallel import environment
from tests import forked
from tests.forked import Forked

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "pretrain_gpt.py"


def working_folder(folder: Path, config: str) -> Path:
    """Prepare ``folder``, with ``config`` as small.yaml and a token store at text/tokens."""
    (folder / "small.yaml").write_text(config)
    (folder / "pages").mkdir()
    for page in range(20):
        (folder / "pages" / f"{page}.txt").write_text(
            "\n".join(f"line {i} of page {page}" for i in range(40))
        )
    prepare = [
        ROOT / "tools" / "prepare_data.py",
        "--input",
        "pages",
        "--vocab-size",
        "300",
    ]
    prepared = forked.run([*prepare, "--output-prefix", "text/tokens"], folder)
    assert prepared.returncode == 0, prepared.stderr
    return folder


def free_port() -> str:
    """Return a free port as a string, for flags and environment variables."""
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
    """Start ``program`` as one of two ranks with their rendezvous at ``port``, without a launcher.

    ``config`` is the file of --config, "" for a program without that flag. ``variables`` are added
    to its environment, and may override ``WORLD_SIZE``.
    """
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [str(program), *(["--config", config] if config else []), *flags]
    return Forked(command, folder, os.environ | world | variables, stderr)
