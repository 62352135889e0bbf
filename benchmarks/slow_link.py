"""Run a program as two ranks at the two ends of a link of their own, which can be made slow.

    python -m benchmarks.slow_link python -m benchmarks.bench_overlap
    python -m benchmarks.slow_link --mbit 200 python pretrain_gpt.py --config configs/tiny-cpu.yaml

Each end is a network namespace, as if it were a machine with one network card, ring0. ``--mbit`` is what either end
sends at most, in megabits a second, by tc's token bucket; both directions have it at once. A limit on bandwidth alone:
messages are not delayed. The program is started as torchrun would, and gloo is told to use the link.

Needs Linux, root, ip and tc. The namespaces are removed however the program ends, Ctrl-C and SIGTERM included.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from megatron_ring.errors import ConfigError, reporting_errors

CARD = "ring0"
ADDRESSES = ("10.0.0.1", "10.0.0.2")
MTU = "65000"  # about loopback's: what each packet takes of the CPU is taken from the ranks


def main() -> None:
    asked = _parser().parse_args()
    _check(asked)
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # as an exception, to clean up
    with _link(asked.mbit) as ends, _ranks(asked.command, ends) as ranks:
        sys.exit(_first_failure(ranks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mbit",
        type=float,
        help="megabits a second that either end sends at most; else as it comes",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="PROGRAM", help="with its flags"
    )
    return parser


def _check(asked: argparse.Namespace) -> None:
    wrong = []
    if asked.mbit is not None and not asked.mbit > 0:
        wrong.append(f"mbit {asked.mbit} must be above 0. Set --mbit.")
    if not asked.command:
        wrong.append("no program is named. Write it, with its flags, behind those of slow_link.py.")
    if missing := [program for program in ("ip", "tc") if not shutil.which(program)]:
        wrong.append(
            f"{' and '.join(missing)} not found: install iproute2, and have /usr/sbin in PATH."
        )
    if os.geteuid() != 0:
        wrong.append("only root can make network namespaces. Run it as root.")
    if wrong:
        raise ConfigError(wrong)


@contextlib.contextmanager
def _link(mbit: float | None) -> Iterator[list[str]]:
    """The names of two namespaces that a pair of network cards joins; gone when it is left."""
    ends = [f"slow-link-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for end in ends:
            _run("ip", "netns", "add", end)
        _run(
            "ip",
            "link",
            "add",
            CARD,
            "netns",
            ends[0],
            "type",
            "veth",
            "peer",
            "name",
            CARD,
            "netns",
            ends[1],
        )
        for end, address in zip(ends, ADDRESSES):
            _run("ip", "-n", end, "address", "add", f"{address}/24", "dev", CARD)
            for card in ("lo", CARD):
                _run("ip", "-n", end, "link", "set", card, "mtu", MTU, "up")
            _run("ip", "netns", "exec", end, *limited(mbit))
        yield ends
    finally:
        for end in ends:  # which has not come to be, where making it failed
            subprocess.run(["ip", "netns", "delete", end], stderr=subprocess.DEVNULL, check=False)


def limited(mbit: float | None, card: str = CARD) -> list[str]:
    """The command that limits what this end sends, whatever it was limited to before; None: not at all.

    With a smaller bucket tc's clock is too coarse for more than some 500 Mbit/s. A queue of 20 ms drops few packets.
    """
    rule = (
        ["tbf", "rate", f"{mbit:.3f}mbit", "burst", "256kb", "latency", "20ms"]
        if mbit
        else ["noqueue"]
    )
    return ["tc", "qdisc", "replace", "dev", card, "root", *rule]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextlib.contextmanager
def _ranks(command: list[str], ends: list[str]) -> Iterator[list[subprocess.Popen]]:
    """The program at either end; whatever still runs of it is ended when this is left."""
    world = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
    }
    world |= {"GLOO_SOCKET_IFNAME": CARD}
    ranks = []
    try:
        for rank, end in enumerate(ends):
            environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(["ip", "netns", "exec", end, *command], env=environment))
        yield ranks
    finally:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(timeout=30)  # it may have a step to finish
            rank.kill()
            rank.wait()


def _first_failure(ranks: list[subprocess.Popen]) -> int:
    """Waits until all have ended or one has failed: its exit code, or 0."""
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        time.sleep(0.1)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    with reporting_errors():
        main()
