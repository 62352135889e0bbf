"""A program for tests: two ranks in separate networks use the intercom, then their link is cut."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import torch.distributed as dist

from megatron_ring.monitoring.intercom import Intercom, NoResponse
from megatron_ring.parallel.consensus import Consensus
from megatron_ring.parallel.progress import ProgressTracker
from megatron_ring.preflight.reachability import check_reach


def _is_open(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 2).close()
    except ConnectionRefusedError:
        return False
    return True


def main() -> None:
    """Write this rank's address, answers, and loopback state to a file named by its rank."""
    dist.init_process_group("gloo")
    consensus = Consensus.build()
    check_reach(consensus)
    intercom = Intercom(consensus, ProgressTracker().read, lambda rank: None)
    other = 1 - consensus.rank
    result = {
        "address": intercom.own.address,
        "on loopback": _is_open("127.0.0.1", intercom.own.port),
    }
    result["answers"] = not isinstance(intercom.ask(other), NoResponse)
    dist.barrier()
    subprocess.run(["ip", "link", "set", "ring0", "down"], check=True)
    answer = intercom.ask(other)
    result["unreachable but not ended"] = isinstance(answer, NoResponse) and not answer.has_ended
    Path(f"{consensus.rank}.new").write_text(json.dumps(result))
    Path(f"{consensus.rank}.new").replace(str(consensus.rank))
    # Keep running until the other rank has asked: it could tell that this process has ended.
    while not Path(str(other)).exists():
        time.sleep(0.05)
    os._exit(0)  # the groups cannot be destroyed without the link


if __name__ == "__main__":
    main()
