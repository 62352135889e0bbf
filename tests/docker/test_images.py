"""Images built on this machine's distribution instead of their bases, and the small recipe in them.

For docker/Dockerfile this shows that its steps run and that pip keeps the base's torch.
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
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
WORK = "/opt/megatron_ring"

DEBIAN = "localhost/debian"
CPU = "localhost/cpu"
STAND_IN = "localhost/stand-in"
CUDA = "localhost/cuda"


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Iterator[Builder]:
    """Yield a builder with one image, DEBIAN."""
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
    """Return a folder that any user of a container may write to, like the image's own."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o777)
    return tmp_path / "runs"


def losses(runs: Path) -> list[float]:
    lines = (runs / "tiny-cpu" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if "loss" in record]


def test_the_cpu_image_trains_the_small_recipe_on_two_ranks_without_root(builder, cpu, runs):
    deepspeed, *recipe = builder.settings(cpu)["Cmd"]
    command = [deepspeed, "--master_port", free_port(), *recipe, *SHORT]
    stdout = output(builder.start(cpu, command, ON_LOOPBACK, {runs: f"{WORK}/runs"}))
    assert "self-test        2 ranks agree" in stdout
    assert len(losses(runs)) == 20
    assert losses(runs)[-1] < losses(runs)[0] - 1
    assert (runs / "tiny-cpu" / "latest").read_text().strip() == "step-00000020"
    assert {path.stat().st_uid for path in runs.rglob("*")} == {1000}


def test_the_two_nodes_of_the_compose_file_train_on_one_sequence(builder, cpu, runs, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    environment = ON_LOOPBACK | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [start(builder, cpu, service, tmp_path, environment) for service in services.values()]
    first, second = map(output, nodes)
    assert "2 processes = 1 pipe x 1 data x 2 context" in first
    assert "loss plot" not in second
    assert len(losses(runs)) == 20
    assert losses(runs)[-1] < losses(runs)[0] - 1


def start(
    builder: Builder, image: str, service: dict, volumes: Path, environment: dict[str, str]
) -> subprocess.Popen:
    """Start a service of the compose file, with its volumes as folders below ``volumes``.

    The variables of ``environment`` override those of the service.
    """
    command = shlex.split(service["command"].replace("${ARGS:-}", shlex.join(SHORT)))
    mounts = dict(volume.split(":") for volume in service["volumes"])
    folders = {volumes / name: target for name, target in mounts.items()}
    return builder.start(image, command, service["environment"] | environment, folders)


def run_python(builder: Builder, image: str, code: str, user: str = "") -> str:
    return output(builder.start(image, ["python", "-c", code], user=user))


def test_any_user_of_the_images_group_may_run_it_and_write(builder, cpu):
    code = (
        "import getpass, matplotlib, os; "
        "open('here', 'w'), open('/cache/there', 'w'); print(os.getuid())"
    )
    assert run_python(builder, cpu, code, user="4321:1000").strip() == "4321"


def test_other_users_may_write_nowhere_in_the_image(builder, cpu):
    code = (
        "import os; folders = ('.', 'data', 'runs', '/cache'); "
        "print([folder for folder in folders if os.access(folder, os.W_OK)])"
    )
    assert run_python(builder, cpu, code, user="4321:4321").strip() == "[]"


def test_no_pip_configuration_of_this_machine_remains_in_the_image(builder, cpu):
    assert output(builder.start(cpu, ["sh", "-c", "pip config list; ls /run/secrets"])) == ""
    image = json.dumps(builder.settings(cpu))
    words = [word for words in host.pip_settings().values() for word in words]
    assert not [word for word in words if "/" in word and word in image]


def test_packages_that_the_base_compiled_for_its_torch_are_kept(builder, cuda):
    names = ("torch", "numpy", "PyYAML", "deepspeed")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    torch, *others = run_python(builder, cuda, code).split()
    assert torch.startswith("2.13.0")
    assert others == ["2.3.5", "6.0.2", pins["deepspeed"]]


def test_the_gpu_image_starts_the_program_and_has_the_rdma_libraries(builder, cuda):
    plan = ["python", "pretrain_gpt.py", "--config", "configs/llama-1b-128k.yaml", "--dry-run"]
    assert "8 processes" in output(builder.start(cuda, plan))
    load = "import ctypes; ctypes.CDLL('libibverbs.so.1'); ctypes.CDLL('librdmacm.so.1')"
    run_python(builder, cuda, load)
    assert builder.settings(cuda)["User"] == "1000:1000"
