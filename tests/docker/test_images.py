"""The images, built for real on this machine's distribution in place of their bases, and the small recipe run in them.

What is seen of docker/Dockerfile here is that its steps run, and that pip leaves the base's torch alone.
"""

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.docker import host
from tests.docker.builder import ROOT, Builder, output
from tests.programs import free_port

pytestmark = pytest.mark.docker

SHORT = ["--train-iters", "20", "--eval-iters", "2"]
HERE = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
WORK = "/opt/megatron_ring"


DEBIAN, CPU, STAND_IN, CUDA = (
    f"localhost/{name}" for name in ("debian", "cpu", "stand-in", "cuda")
)


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Iterator[Builder]:
    """It has one image, DEBIAN."""
    folder = tmp_path_factory.mktemp("docker")
    with Builder(folder, host.pip_arguments(folder)) as builder:
        builder.pack(host.debian(folder), DEBIAN)
        yield builder


@pytest.fixture(scope="module")
def cpu(builder) -> str:
    builder.build("docker/Dockerfile.cpu", CPU, base=DEBIAN)
    return CPU


@pytest.fixture(scope="module")
def cuda(builder) -> str:
    builder.build("tests/docker/Dockerfile.stand-in", STAND_IN, base=DEBIAN)
    builder.build("docker/Dockerfile", CUDA, base=STAND_IN)
    return CUDA


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder that any user of a container may write to, as the image's own."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o777)
    return tmp_path / "runs"


def losses(runs: Path) -> list[float]:
    records = map(json.loads, (runs / "tiny-cpu" / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_the_cpu_image_trains_the_small_recipe_on_two_ranks_as_a_user_without_rights(
    builder, cpu, runs
):
    deepspeed, *recipe = builder.settings(cpu)["Cmd"]
    command = [deepspeed, "--master_port", free_port(), *recipe, *SHORT]
    said = output(builder.start(cpu, command, HERE, {runs: f"{WORK}/runs"}))
    assert "self-test        2 ranks agree" in said
    assert len(losses(runs)) == 20
    assert losses(runs)[-1] < losses(runs)[0] - 1
    assert (runs / "tiny-cpu" / "latest").read_text().strip() == "step-00000020"
    assert {path.stat().st_uid for path in runs.rglob("*")} == {1000}


def test_the_two_nodes_of_the_compose_file_train_one_sequence(builder, cpu, runs, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    here = HERE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [start(builder, cpu, service, tmp_path, here) for service in services.values()]
    first, second = map(output, nodes)
    assert "2 processes = 1 pipe x 1 data x 2 context" in first
    assert "loss plot" not in second
    assert len(losses(runs)) == 20
    assert losses(runs)[-1] < losses(runs)[0] - 1


def start(
    builder: Builder, image: str, service: dict, volumes: Path, environment: dict[str, str]
) -> subprocess.Popen:
    """A service of the compose file, its volumes folders of ``volumes``, on this machine's network."""
    command = shlex.split(service["command"].replace("${ARGS:-}", shlex.join(SHORT)))
    mounted = dict(volume.split(":") for volume in service["volumes"])
    folders = {volumes / name: place for name, place in mounted.items()}
    return builder.start(image, command, service["environment"] | environment, folders)


def test_any_user_of_its_group_may_run_the_cpu_image_and_write(builder, cpu):
    look = "import getpass, matplotlib, os; open('here', 'w'), open('/cache/there', 'w'); print(os.getuid())"
    assert output(builder.start(cpu, ["python", "-c", look], user="4321:1000")).strip() == "4321"


def test_other_users_may_write_nowhere_in_the_image(builder, cpu):
    look = "import os; print([place for place in ('.', 'data', 'runs', '/cache') if os.access(place, os.W_OK)])"
    assert output(builder.start(cpu, ["python", "-c", look], user="4321:4321")).strip() == "[]"


def test_nothing_of_this_machines_pip_stays_in_the_image(builder, cpu):
    assert output(builder.start(cpu, ["sh", "-c", "pip config list; ls /run/secrets"])) == ""
    said = json.dumps(builder.settings(cpu))
    assert not [
        word
        for words in host.pip_settings().values()
        for word in words
        if "/" in word and word in said
    ]


def test_what_the_base_of_the_gpu_image_has_for_its_torch_stays(builder, cuda):
    names = "torch", "numpy", "PyYAML", "deepspeed"
    look = f"from importlib.metadata import version; print(*map(version, {names}))"
    ours = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    torch, *others = output(builder.start(cuda, ["python", "-c", look])).split()
    assert torch.startswith("2.13.0")
    assert others == ["2.3.5", "6.0.2", ours["deepspeed"]]


def test_the_gpu_image_starts_the_program_and_has_the_libraries_of_rdma(builder, cuda):
    plan = ["python", "pretrain_gpt.py", "--config", "configs/llama-1b-128k.yaml", "--dry-run"]
    assert "8 processes" in output(builder.start(cuda, plan))
    libraries = "import ctypes; ctypes.CDLL('libibverbs.so.1'); ctypes.CDLL('librdmacm.so.1')"
    output(builder.start(cuda, ["python", "-c", libraries]))
    assert builder.settings(cuda)["User"] == "1000:1000"
