"""At which address a process listens: never at all, and at one that the other hosts can reach."""

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
    """A function that gives this host a name, interfaces, and variables of the environment."""

    def named(name: str, master: str = "nothing", **variables: str) -> list[str]:
        def resolve(name: str, *_, **__) -> list[tuple]:
            if name not in NAMES:
                raise socket.gaierror(-2, "Name or service not known")
            return [(0, 0, 0, "", (NAMES[name], 0))]

        found = {
            interface: [SimpleNamespace(family=socket.AF_INET, address=address)]
            for interface, address in OWN.items()
        }
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
        monkeypatch.setattr(
            psutil,
            "net_if_stats",
            lambda: {name: SimpleNamespace(isup=name != "down0") for name in OWN},
        )
        monkeypatch.setattr(socket, "gethostname", lambda: name)
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(
            addresses, "_source_towards", lambda address: [address] if address == "10.0.0.1" else []
        )
        monkeypatch.setattr(environment.os, "environ", {"MASTER_ADDR": master} | variables)
        return list(candidates())

    return named


def test_the_interface_of_gloo_comes_first_and_then_that_of_nccl(host):
    assert host("named", GLOO_SOCKET_IFNAME="ib0")[:2] == ["10.1.0.7", "10.0.0.7"]
    assert host("named", NCCL_SOCKET_IFNAME="ib")[:2] == ["10.1.0.7", "10.0.0.7"]


def test_then_the_address_of_the_hosts_name(host):
    assert host("named")[0] == "10.0.0.7"
    assert host("six")[0] == "fd00::7"


@pytest.mark.parametrize("name", ["debian", "resolves to nothing", "\udcff" * 70])
def test_a_name_that_is_loopback_or_nothing_is_passed_over(name, host):
    assert host(name, master="master")[0] == "10.0.0.1"
    assert host(name)[0] == "192.168.1.7"


def test_loopback_and_interfaces_that_are_down_are_no_candidates(host):
    assert host("debian", GLOO_SOCKET_IFNAME="lo") == ["192.168.1.7", "10.1.0.7"]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.0.1.1", "::1", "0.0.0.0", "::", "fe80::1", "fe80::1%eth0", "no address"],
)
def test_other_hosts_cannot_use(address):
    assert not addresses._is_usable(address)


@pytest.mark.parametrize(
    ("on_one_host", "found", "address"),
    [
        (True, ["127.0.0.2"], "127.0.0.1"),
        (False, ["203.0.113.9", "127.0.0.2", "127.0.0.3"], "127.0.0.2"),
        (False, [], "127.0.0.1"),
    ],
    ids=["one host", "the first that is this host's", "none"],
)
def test_it_listens_at_one_address(on_one_host, found, address, monkeypatch):
    monkeypatch.setattr(addresses, "candidates", lambda: iter(found))
    with listen(on_one_host, backlog=1) as listening:
        assert listening.getsockname()[0] == address


def test_nothing_is_sent_to_find_the_address_towards_another():
    assert addresses._source_towards("127.0.0.1") == ["127.0.0.1"]
    assert addresses._source_towards("::1") in ([], ["::1"])


def test_processes_of_one_network_name_it_alike():
    assert addresses.network_identity() == addresses.network_identity()
    assert addresses.network_identity() != addresses.pid_identity()
