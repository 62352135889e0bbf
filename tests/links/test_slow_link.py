"""Two ranks at the ends of a link of their own: what they are told, how they end, and that nothing is left behind."""

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
TELLS = """\
import json, os, subprocess
shown = subprocess.run(["tc", "-json", "qdisc", "show", "dev", "ring0"], capture_output=True, check=True).stdout
names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME"
told = [os.environ[name] for name in names], [rule["kind"] for rule in json.loads(shown)]
open(os.environ["RANK"], "w").write(json.dumps(told))
"""
BEGINS = """\
import os, time
with open(os.environ["RANK"], "w") as file:
    file.write(str(os.getpid()))
time.sleep(1000)
"""


@pytest.fixture
def launch(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a program, in a folder of its own; behind the test no namespace of it may be left."""
    started = []

    def start(*command: str) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                [*SLOW_LINK, *command],
                cwd=tmp_path,
                env=commands.ENVIRONMENT,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for launcher in started:
        launcher.communicate(timeout=60)
        left = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True, check=True
        ).stdout
        assert f"slow-link-{launcher.pid}-" not in left


@pytest.mark.parametrize(
    ("flags", "rule"), [([], "noqueue"), (["--mbit", "50"], "tbf")], ids=["as it comes", "limited"]
)
def test_a_rank_at_either_end(flags, rule, launch, tmp_path):
    assert launch(*flags, sys.executable, "-c", TELLS).wait(timeout=60) == 0
    told = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert told == [[[rank, rank, "2", "10.0.0.1", "ring0"], [rule]] for rank in "01"]


def test_a_rank_that_fails_ends_the_other_and_its_code_is_passed_on(launch):
    fails = (
        "import os, sys, time; time.sleep(0 if os.environ['RANK'] == '1' else 1000); sys.exit(7)"
    )
    assert launch(sys.executable, "-c", fails).wait(timeout=60) == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both(number, launch, tmp_path):
    launcher = launch(sys.executable, "-c", BEGINS)
    while len(os.listdir(tmp_path)) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(number)
    assert launcher.wait(timeout=60) != 0
    for rank in "01":
        process = int((tmp_path / rank).read_text())
        assert not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--mbit", "0", "true"], "mbit 0.0 must be above 0. Set --mbit."),
        ([], "no program is named. Write it, with its flags, behind those of slow_link.py."),
    ],
)
def test_what_cannot_be_is_refused(asked, said, launch):
    launcher = launch(*asked)
    assert launcher.communicate(timeout=60)[1] == f"ConfigError: {said}\n"
    assert launcher.returncode == 2


def test_ranks_of_two_hosts_ask_each_other_at_the_address_of_the_link_alone(launch, tmp_path):
    assert (
        launch(sys.executable, str(Path(__file__).with_name("asking_over_link.py"))).wait(
            timeout=100
        )
        == 0
    )
    found = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    expected = {"on loopback": False, "answers": True, "after the cut": True}
    assert found == [{"address": address} | expected for address in ("10.0.0.1", "10.0.0.2")]
