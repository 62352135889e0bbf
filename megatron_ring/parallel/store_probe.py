"""The checks of MASTER_ADDR and MASTER_PORT before a process joins the others.

torch's own client tries a name that does not resolve until its timeout of half an hour, and waits
without end for a program that accepts connections but is not torch's store.
"""

import contextlib
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from megatron_ring.parallel.environment import RendezvousAddress

_SECONDS_TO_RESOLVE = 30  # the name of a host or pod that has just started may come late
_SECONDS_TO_ANSWER = 60  # torch's store answers in a thread of its own, whatever rank 0 does
_SECONDS_BETWEEN_TRIES = 0.25


class WrongAddress(RuntimeError):
    """The address of the rendezvous cannot be used; the message follows the number of the rank."""


def check_resolvable(address: RendezvousAddress) -> None:
    """Wait until the host of ``address`` resolves; raises WrongAddress if it does not."""
    deadline = time.monotonic() + _SECONDS_TO_RESOLVE
    while True:
        try:
            socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM)
            return
        # UnicodeError: a label of the name is empty or has more than 63 characters.
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline or isinstance(error, UnicodeError):
                raise WrongAddress(
                    f"cannot resolve MASTER_ADDR {address.host[:255]!r}: "
                    f"{getattr(error, 'strerror', None) or error}. Set MASTER_ADDR to a name or an "
                    "address of the host of rank 0 that every host can resolve: the variable, "
                    "deepspeed --master_addr, or torchrun --master-addr."
                ) from error
        time.sleep(_SECONDS_BETWEEN_TRIES)


def check_store(address: RendezvousAddress, world_size: int, timeout: timedelta) -> None:
    """Wait until torch's store listens at ``address`` and check that it answers; not on rank 0.

    ``timeout``: of the wait until something listens there. Raises WrongAddress if nothing does, or
    a program that does not answer, and torch's RuntimeError if the store refuses this process.
    """
    if not _wait_until_listening(address, timeout):
        raise WrongAddress(
            f"found no process listening at MASTER_ADDR {address.host}, MASTER_PORT {address.port} "
            f"within {timeout.total_seconds():g} s. Check that rank 0 was started, that its host "
            "is MASTER_ADDR, and that no firewall is between the hosts."
        )
    errors: list[Exception] = []

    def connect() -> None:
        try:
            dist.TCPStore(
                address.host, int(address.port), world_size, False, timeout, wait_for_workers=False
            )
        except Exception as error:
            errors.append(error)

    # torch's client tries again where the answer is wrong, and cannot be interrupted while it
    # waits for one, so it runs in a thread.
    client = threading.Thread(target=connect, name="store probe", daemon=True)
    client.start()
    client.join(_SECONDS_TO_ANSWER)
    if client.is_alive():
        raise WrongAddress(
            f"reached a program at {address.host}, port {address.port}, but no answer of rank 0 "
            f"within {_SECONDS_TO_ANSWER} s: another program uses the port, perhaps another run, "
            "or rank 0 has ended. If it has not, set another port: MASTER_PORT, deepspeed "
            "--master_port, or torchrun --master-port."
        )
    for error in errors:
        raise error


def _wait_until_listening(address: RendezvousAddress, timeout: timedelta) -> bool:
    deadline = time.monotonic() + timeout.total_seconds()
    while (left := deadline - time.monotonic()) > 0:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address.host, int(address.port)), timeout=left),
        ):
            return True
        time.sleep(_SECONDS_BETWEEN_TRIES)
    return False
