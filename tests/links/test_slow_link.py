"""slow_link.py: the environment of its two ranks, how they end, and that it cleans up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.benchmarks import commands

pytestmark = pytest.mark.links

SLOW_LINK = commands.command("slow_link")
WRITES_ENVIRONMENT = """\
import json, os, subprocess
show = ["tc", "-json", "qdisc", "show", "dev", "ring0"]
rules = json.loads(subprocess.run(show, capture_output=True, check=True).stdout)
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"
written = [os.environ[name] for name in names], [rule["kind"] for rule in rules]
open(os.environ["RANK"], "w").write(json.dumps(written))
"""
WRITES_PID_AND_SLEEPS = """\
import os, time
with open(os.environ["RANK"], "w") as file:
    file.write(str(os.getpid()))
time.sleep(1000)
"""


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a program in the test's folder; assert at the end that no namespace is left."""
    launchers = []

    def start(*command: str) -> subprocess.Popen:
        command = [*SLOW_LINK, *command]
        launcher = subprocess.Popen(
            command, cwd=tmp_path, env=commands.ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        launchers.append(launcher)
        return launcher

    yield start
    for launcher in launchers:
        launcher.communicate(timeout=60)
        namespaces = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True, check=True
        ).stdout
        assert f"slow-link-{launcher.pid}-" not in namespaces


@pytest.mark.parametrize(
    ("flags", "rule"), [([], "noqueue"), (["--mbit", "50"], "tbf")], ids=["unlimited", "limited"]
)
def test_each_end_has_one_rank_and_the_limit(flags, rule, launch, tmp_path):
    assert launch(*flags, sys.executable, "-c", WRITES_ENVIRONMENT).wait(timeout=60) == 0
    written = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert written == [[[rank, rank, "2", "10.0.0.1", "ring0"], [rule]] for rank in "01"]


def test_a_rank_that_fails_ends_the_other_and_sets_the_exit_code(launch):
    rank_one_fails = (
        "import os, sys, time; time.sleep(0 if os.environ['RANK'] == '1' else 1000); sys.exit(7)"
    )
    assert launch(sys.executable, "-c", rank_one_fails).wait(timeout=60) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_ranks(number, launch, tmp_path):
    launcher = launch(sys.executable, "-c", WRITES_PID_AND_SLEEPS)
    while len(os.listdir(tmp_path)) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) != 0
    for rank in "01":
        pid = int((tmp_path / rank).read_text())
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [(["--mbit", "0", "true"], ["mbit 0.0", "above 0", "--mbit"]), ([], ["program"])],
)
def test_illegal_arguments_are_refused(arguments, parts, launch):
    launcher = launch(*arguments)
    stderr = launcher.communicate(timeout=60)[1]
    assert stderr.startswith("ConfigError: ")
    assert stderr.count("\n") == 1
    assert [part for part in parts if part not in stderr] == []
    assert launcher.returncode == 2


def test_ranks_of_two_hosts_reach_each_other_only_at_the_address_of_the_link(launch, tmp_path):
    program = Path(__file__).with_name("intercom_over_link.py")
    assert launch(sys.executable, str(program)).wait(timeout=100) == 0
    results = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    expected = {"on loopback": False, "answers": True, "unreachable but not ended": True}
    assert results == [{"address": address} | expected for address in ("10.0.0.1", "10.0.0.2")]
