"""The address of this host at which the other processes of a run can reach it."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

import psutil

from megatron_ring.parallel import environment
from megatron_ring.parallel.process_id import boot_id, namespace_id

LOOPBACK = "127.0.0.1"
_DISCARD_PORT = 9  # connecting a datagram socket needs a port, even if nothing is sent


def network_identity() -> str:
    """Identify the network namespace of this process.

    Processes with the same identity share one loopback. Containers with networks of their own
    differ, even on the same host.
    """
    return _identity("net")


def pid_identity() -> str:
    """Identify the process id namespace of this process.

    A pid refers to the same process only within one namespace.
    """
    return _identity("pid")


def _identity(namespace: str) -> str:
    boot = boot_id()
    within_boot = namespace_id(namespace)
    return f"{boot} {within_boot}" if boot and within_boot else socket.gethostname()


def listen(on_one_host: bool, backlog: int) -> socket.socket:
    """Listen on a free port of the one address that the other processes use, and on no other.

    The address is loopback if all processes of the run are on one host. Otherwise it is the first
    of ``candidates`` on which listening succeeds; if there is none, it is loopback, where other
    hosts cannot connect.
    """
    for address in () if on_one_host else candidates():
        with contextlib.suppress(OSError):
            return _listen_on(address, backlog)
    return _listen_on(LOOPBACK, backlog)


def _listen_on(address: str, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=backlog)


def candidates() -> Iterator[str]:
    """Yield the addresses at which other hosts may reach this one, the most likely first.

    The order is: the interfaces named by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, the address
    that the host's own name resolves to (gloo's default), the address from which this host reaches
    MASTER_ADDR, and all its other interfaces. Loopback is excluded.
    """
    return (address for address in dict.fromkeys(_candidates()) if _is_usable(address))


def _candidates() -> Iterator[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = {
        name: [entry.address for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }
    for name in environment.socket_interfaces(list(interfaces)):
        yield from interfaces[name]
    yield from _resolve(socket.gethostname())
    for address in _resolve(environment.master_address()):
        yield from _source_address(address)
    for name, status in psutil.net_if_stats().items():
        if status.isup:
            yield from interfaces.get(name, [])


def _resolve(host: str) -> list[str]:
    """Return the addresses of a host name; empty if it cannot be resolved."""
    try:
        results = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in results]


def _source_address(destination: str) -> list[str]:
    """Return the address from which this host would send to ``destination``; sends nothing."""
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((destination, _DISCARD_PORT))
            return [probe.getsockname()[0]]
    except OSError:
        return []


def _is_usable(address: str) -> bool:
    """Return whether another host could connect to it: neither loopback nor link-local."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a link-local address with its interface, as in fe80::1%eth0
        return False
    is_link_local = parsed.version == 6 and parsed.is_link_local
    return not (parsed.is_loopback or parsed.is_unspecified or is_link_local)
