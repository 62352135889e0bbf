"""At which address of this host the other processes of a run can reach it."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_ring.parallel import environment

LOOPBACK = "127.0.0.1"
_DISCARD_PORT = 9  # a datagram socket that is connected but never sends needs some port


def network_identity() -> str:
    """A name of the network this process is in: processes with equal names share one loopback.

    Containers with networks of their own differ, although they run on one host.
    """
    return _identity("net")


def pid_identity() -> str:
    """A name of this process's set of process ids: a pid means the same process only within it."""
    return _identity("pid")


def _identity(namespace: str) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(f'/proc/self/ns/{namespace}')}"
    except OSError:  # not Linux
        return socket.gethostname()


def listen(on_one_host: bool, backlog: int) -> socket.socket:
    """Listen at a free port of the one address that the other processes use, and at no other.

    That is loopback if all processes of the run are on one host. Otherwise it is the first of
    ``candidates`` at which one can listen. If there is none, it is loopback, where other hosts
    cannot connect.
    """
    for address in () if on_one_host else candidates():
        with contextlib.suppress(OSError):
            return _listen_at(address, backlog)
    return _listen_at(LOOPBACK, backlog)


def _listen_at(address: str, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=backlog)


def candidates() -> Iterator[str]:
    """Addresses of this host at which other hosts may reach it, the most likely first.

    In this order: the interfaces that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name, the address
    that the host's own name resolves to (which gloo takes by default), the address from which this
    host reaches MASTER_ADDR, and all its other interfaces. Loopback is not among them.
    """
    return (address for address in dict.fromkeys(_candidates()) if _is_usable(address))


def _candidates() -> Iterator[str]:
    interfaces = {
        name: [each.address for each in found if each.family in (socket.AF_INET, socket.AF_INET6)]
        for name, found in psutil.net_if_addrs().items()
    }
    for name in environment.socket_interfaces(list(interfaces)):
        yield from interfaces[name]
    yield from _resolved(socket.gethostname())
    for address in _resolved(environment.master_address()):
        yield from _source_towards(address)
    for name, of_interface in psutil.net_if_stats().items():
        if of_interface.isup:
            yield from interfaces.get(name, [])


def _resolved(host: str) -> list[str]:
    """The addresses of a host name; none if it cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in found]


def _source_towards(address: str) -> list[str]:
    """The address that this host would send from. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as unused:
            unused.connect((address, _DISCARD_PORT))
            return [unused.getsockname()[0]]
    except OSError:
        return []


def _is_usable(address: str) -> bool:
    """Whether another host could connect to it: not loopback, and valid on more than one link."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a link-local address with its interface, as in fe80::1%eth0
        return False
    return not (
        parsed.is_loopback
        or parsed.is_unspecified
        or (parsed.version == 6 and parsed.is_link_local)
    )
