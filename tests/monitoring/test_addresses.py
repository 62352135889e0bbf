"""A process listens on one address, at which the other hosts can reach it."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from megatron_ring.monitoring import addresses
from megatron_ring.monitoring.addresses import candidates, listen
from megatron_ring.parallel import environment

NAMES = {"named": "10.0.0.7", "master": "10.0.0.1", "debian": "127.0.1.1", "six": "fd00::7"}
OWN = {"lo": "127.0.0.1", "eth0": "192.168.1.7", "ib0": "10.1.0.7", "down0": "10.9.0.7"}


@pytest.fixture
def host(monkeypatch):
    """A function that sets this host's name, interfaces and environment, and lists candidates."""

    def configure(name: str, master: str = "nothing", **variables: str) -> list[str]:
        def resolve(name: str, *_, **__) -> list[tuple]:
            if name not in NAMES:
                raise socket.gaierror(-2, "Name or service not known")
            return [(0, 0, 0, "", (NAMES[name], 0))]

        interfaces = {
            interface: [SimpleNamespace(family=socket.AF_INET, address=address)]
            for interface, address in OWN.items()
        }
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
        monkeypatch.setattr(
            psutil,
            "net_if_stats",
            lambda: {name: SimpleNamespace(isup=name != "down0") for name in OWN},
        )
        monkeypatch.setattr(socket, "gethostname", lambda: name)
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(
            addresses, "_source_address", lambda address: [address] if address == "10.0.0.1" else []
        )
        monkeypatch.setattr(environment.os, "environ", {"MASTER_ADDR": master} | variables)
        return list(candidates())

    return configure


def test_the_interfaces_named_for_gloo_and_nccl_come_first(host):
    assert host("named", GLOO_SOCKET_IFNAME="ib0")[:2] == ["10.1.0.7", "10.0.0.7"]
    assert host("named", NCCL_SOCKET_IFNAME="ib")[:2] == ["10.1.0.7", "10.0.0.7"]


def test_the_address_of_the_host_name_comes_next(host):
    assert host("named")[0] == "10.0.0.7"
    assert host("six")[0] == "fd00::7"


@pytest.mark.parametrize("name", ["debian", "unresolvable", "\udcff" * 70])
def test_a_host_name_that_is_loopback_or_unresolvable_is_skipped(name, host):
    assert host(name, master="master")[0] == "10.0.0.1"
    assert host(name)[0] == "192.168.1.7"


def test_loopback_and_interfaces_that_are_down_are_excluded(host):
    assert host("debian", GLOO_SOCKET_IFNAME="lo") == ["192.168.1.7", "10.1.0.7"]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.0.1.1", "::1", "0.0.0.0", "::", "fe80::1", "fe80::1%eth0", "no address"],
)
def test_addresses_that_other_hosts_cannot_use(address):
    assert not addresses._is_usable(address)


@pytest.mark.parametrize(
    ("on_one_host", "available", "address"),
    [
        (True, ["127.0.0.2"], "127.0.0.1"),
        (False, ["203.0.113.9", "127.0.0.2", "127.0.0.3"], "127.0.0.2"),
        (False, [], "127.0.0.1"),
    ],
    ids=["one host", "first usable", "none"],
)
def test_it_listens_on_one_address(on_one_host, available, address, monkeypatch):
    monkeypatch.setattr(addresses, "candidates", lambda: iter(available))
    with listen(on_one_host, backlog=1) as listening:
        assert listening.getsockname()[0] == address


def test_the_source_address_of_loopback_is_loopback():
    assert addresses._source_address("127.0.0.1") == ["127.0.0.1"]
    assert addresses._source_address("::1") in ([], ["::1"])


def test_the_network_identity_is_stable_and_not_the_pid_identity():
    assert addresses.network_identity() == addresses.network_identity()
    assert addresses.network_identity() != addresses.pid_identity()
