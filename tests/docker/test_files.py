"""What can be seen of the images without building one: what linters say, what they are given, what they agree on."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docker/Dockerfile", ROOT / "docker/Dockerfile.cpu"
CONSTRAINTS = runpy.run_path(str(ROOT / "tools/constraints.py"))
PINS = CONSTRAINTS["pins"]((ROOT / "constraints.txt").read_text())
IGNORE = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]
COMPOSE = ROOT / "docker/compose.yaml"

# By path: another package may well be named docker.
BASE, REQUIREMENTS = (
    runpy.run_path(str(ROOT / "docker" / name)) for name in ("base.py", "requirements.py")
)


def lint(program: str, *arguments: str | Path) -> None:
    """Run a linter, one of the packages of [dev]."""
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        pytest.skip(f"{program} is not installed; pip install -e '.[dev]' does that")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_has_nothing_to_say():
    lint(
        "hadolint",
        "--config",
        ROOT / "docker/hadolint.yaml",
        *IMAGES,
        ROOT / "tests/docker/Dockerfile.stand-in",
    )


def test_shellcheck_has_nothing_to_say_of_any_script():
    tracked = subprocess.run(
        ["git", "ls-files", "*.sh", "*.sbatch", ".ci/run"], cwd=ROOT, capture_output=True, text=True
    )
    scripts = [ROOT / path for path in tracked.stdout.split()]
    assert ROOT / "tools/slurm/pretrain.sbatch" in scripts
    lint("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts)


def test_the_compose_file_is_one():
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_a_build_is_given_the_program_and_nothing_else():
    assert IGNORE[0] == "*"
    given = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}
    assert all((ROOT / path).exists() for path in given)
    assert not given & {".git", ".venv", "data", "runs", "tests"}


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_given(image):
    copied = [
        path
        for line in re.findall(r"^COPY (.*)", image.read_text(), re.MULTILINE)
        for path in line.split()[:-1]
    ]
    assert len(copied) > 3
    for path in set(copied) - {"."}:
        assert (ROOT / path).is_file()
        assert f"!{Path(path).parts[0]}" in IGNORE


def test_the_images_agree_on_who_runs_and_where_they_write():
    gpu, cpu = (path.read_text() for path in IMAGES)
    for kind in "WORKDIR", "USER", "ENV HF_HOME", "ARG UID", "ARG GID":
        (block,) = re.findall(rf"^{kind}(?:.*\\\n)*.*", gpu, re.MULTILINE)
        assert block in cpu


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_no_folder_of_an_image_is_for_everybody_to_write_to(image):
    text = image.read_text()
    modes = re.findall(r"(?:--mode[= ]|--chmod=|chmod )(\S+)", text)
    assert modes, "folders are made with a mode"
    for mode in modes:
        assert re.fullmatch(r"[0-7]+", mode), mode
        assert not int(mode, 8) & 0o002, mode


def test_every_requirement_of_the_images_has_a_pin_that_satisfies_it():
    wanted = list(map(Requirement, REQUIREMENTS["requirements"](ROOT / "pyproject.toml")))
    assert {"torch", "deepspeed", "wandb", "pyarrow"} <= {
        requirement.name for requirement in wanted
    }
    for requirement in wanted:
        if requirement.name != "torch":  # which the base or an argument has
            assert PINS[CONSTRAINTS["_spelled"](requirement.name)] in requirement.specifier


def test_what_is_compiled_for_the_bases_gpus_is_kept_and_what_it_lacks_is_pinned():
    base = {"flash-attn": "2.7.4", "numpy": "2.1", "torch": "2.12.0a0+5aff.nv26.05", "tqdm": "4.67"}
    assert BASE["kept"](base) == ["flash-attn==2.7.4", "numpy==2.1", "torch==2.12.0a0+5aff.nv26.05"]
    pins = ["# pins", "deepspeed==0.19.8", "Flash_Attn==2", "tqdm==4.70"]
    assert BASE["missing"](pins, base) == ["deepspeed==0.19.8"]


def test_the_nodes_of_the_compose_file_are_one_world():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    worlds = [service["environment"] for service in services.values()]
    assert [world["RANK"] for world in worlds] == [str(rank) for rank in range(len(services))]
    assert {world["WORLD_SIZE"] for world in worlds} == {str(len(services))}
    assert {world["MASTER_ADDR"] for world in worlds} == {next(iter(services))}
    alike = [
        {key: value for key, value in service.items() if key != "environment"}
        for service in services.values()
    ]
    assert all(service == alike[0] for service in alike)
    build = alike[0]["build"]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).is_file()
