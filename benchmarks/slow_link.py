"""Run a program as two ranks at the ends of a private network link with limited bandwidth.

    python -m benchmarks.slow_link python -m benchmarks.bench_overlap
    python -m benchmarks.slow_link --mbit 200 \\
        python pretrain_gpt.py --config configs/tiny-cpu.yaml

Each end is a network namespace, like a machine with a single network interface, ring0. ``--mbit``
limits what each end sends, in megabits per second, with tc's token bucket; both directions have
that bandwidth at the same time. Only bandwidth is limited: messages are not delayed. The program is
started with the environment that torchrun would set, and gloo is directed to the link.

Needs Linux, root, ip and tc. The namespaces are removed however the program ends, including by
Ctrl-C and SIGTERM.
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

INTERFACE = "ring0"
ADDRESSES = ("10.0.0.1", "10.0.0.2")
MTU = "65000"  # about loopback's: the CPU time of each packet is taken from the ranks


def main() -> None:
    options = _parser().parse_args()
    _check(options)
    # Turn SIGTERM into an exception, so that the namespaces are removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with _link(options.mbit) as ends, _ranks(options.command, ends) as ranks:
        sys.exit(_wait_for_exit_code(ranks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mbit",
        type=float,
        help="megabits per second that each end may send; without it the link is not limited",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="PROGRAM", help="the program and its flags"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.mbit is not None and not options.mbit > 0:
        problems.append(f"mbit {options.mbit} must be above 0. Set --mbit.")
    if not options.command:
        problems.append("no program given. Append it, with its flags, to those of slow_link.")
    if missing := [program for program in ("ip", "tc") if not shutil.which(program)]:
        problems.append(
            f"{' and '.join(missing)} not found. Install iproute2 and add /usr/sbin to PATH."
        )
    if os.geteuid() != 0:
        problems.append("creating network namespaces requires root. Run this program as root.")
    if problems:
        raise ConfigError(problems)


@contextlib.contextmanager
def _link(mbit: float | None) -> Iterator[list[str]]:
    """Yield the names of two linked network namespaces and remove them afterwards."""
    ends = [f"slow-link-{os.getpid()}-{rank}" for rank in range(2)]
    try:
        for end in ends:
            _run("ip", "netns", "add", end)
        first = ["netns", ends[0], "type", "veth"]
        second = ["peer", "name", INTERFACE, "netns", ends[1]]
        _run("ip", "link", "add", INTERFACE, *first, *second)
        for end, address in zip(ends, ADDRESSES):
            _run("ip", "-n", end, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", end, "link", "set", interface, "mtu", MTU, "up")
            _run("ip", "netns", "exec", end, *limit_command(mbit))
        yield ends
    finally:
        # A namespace may not exist, if creating it failed.
        for end in ends:
            subprocess.run(["ip", "netns", "delete", end], stderr=subprocess.DEVNULL, check=False)


def limit_command(mbit: float | None, interface: str = INTERFACE) -> list[str]:
    """Return the command that limits what this end sends; None removes an earlier limit.

    With a smaller bucket, tc's clock is too coarse for more than some 500 Mbit/s. A queue of 20 ms
    drops few packets.
    """
    rule = ["noqueue"]
    if mbit:
        rule = ["tbf", "rate", f"{mbit:.3f}mbit", "burst", "256kb", "latency", "20ms"]
    return ["tc", "qdisc", "replace", "dev", interface, "root", *rule]


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextlib.contextmanager
def _ranks(command: list[str], ends: list[str]) -> Iterator[list[subprocess.Popen]]:
    """Start the program at both ends and terminate what still runs afterwards."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    ranks = []
    try:
        for rank, end in enumerate(ends):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(["ip", "netns", "exec", end, *command], env=environment))
        yield ranks
    finally:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(timeout=30)  # time to finish a step
            rank.kill()
            rank.wait()


def _wait_for_exit_code(ranks: list[subprocess.Popen]) -> int:
    """Wait until all ranks have exited or one has failed; return the failed one's code, or 0."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if None not in codes or any(codes):
            return next((code for code in codes if code), 0)
        time.sleep(0.1)


if __name__ == "__main__":
    with reporting_errors():
        main()
