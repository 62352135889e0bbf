"""Checks of the image files that need no build: linters, build contexts, pins and agreements."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
IMAGES = [ROOT / "docker/Dockerfile", ROOT / "docker/Dockerfile.cpu"]
COMPOSE = ROOT / "docker/compose.yaml"
CONSTRAINTS = runpy.run_path(str(ROOT / "tools/constraints.py"))
PINS = CONSTRAINTS["pins"]((ROOT / "constraints.txt").read_text())
IGNORE = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]
# Run by path, because an installed package may be named docker.
BASE = runpy.run_path(str(ROOT / "docker/base.py"))
REQUIREMENTS = runpy.run_path(str(ROOT / "docker/requirements.py"))


def lint(program: str, *arguments: str | Path) -> None:
    """Run a linter that [dev] installs; skip the test if it is missing."""
    path = Path(sys.executable).with_name(program)
    if not path.exists():
        pytest.skip(f"{program} is not installed; pip install -e '.[dev]' installs it")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_accepts_the_dockerfiles():
    config = ROOT / "docker/hadolint.yaml"
    lint("hadolint", "--config", config, *IMAGES, ROOT / "tests/docker/Dockerfile.stand-in")


def test_shellcheck_accepts_all_scripts():
    tracked = subprocess.run(
        ["git", "ls-files", "*.sh", "*.sbatch", ".ci/run"], cwd=ROOT, capture_output=True, text=True
    )
    scripts = [ROOT / path for path in tracked.stdout.split()]
    assert ROOT / "tools/slurm/pretrain.sbatch" in scripts
    lint("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *scripts)


def test_the_compose_file_fits_its_schema():
    lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_a_build_context_has_only_what_the_program_needs():
    assert IGNORE[0] == "*"
    included = {line.removeprefix("!") for line in IGNORE if line.startswith("!")}
    assert all((ROOT / path).exists() for path in included)
    assert not included & {".git", ".venv", "data", "runs", "tests"}


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_what_an_image_copies_exists_and_is_in_the_build_context(image):
    copied = []
    for arguments in re.findall(r"^COPY (.*)", image.read_text(), re.MULTILINE):
        *sources, _ = arguments.split()
        copied += sources
    assert len(copied) > 3
    for path in set(copied) - {"."}:
        assert (ROOT / path).is_file()
        assert f"!{Path(path).parts[0]}" in IGNORE


def test_both_images_have_the_same_user_and_writable_folders():
    gpu, cpu = (path.read_text() for path in IMAGES)
    for kind in ("WORKDIR", "USER", "ENV HF_HOME", "ARG UID", "ARG GID"):
        (block,) = re.findall(rf"^{kind}(?:.*\\\n)*.*", gpu, re.MULTILINE)
        assert block in cpu


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_no_folder_of_an_image_is_writable_by_others(image):
    modes = re.findall(r"(?:--mode[= ]|--chmod=|chmod )(\S+)", image.read_text())
    assert modes, "folders are created with a mode"
    for mode in modes:
        assert re.fullmatch(r"[0-7]+", mode), mode
        assert not int(mode, 8) & 0o002, mode


def test_every_requirement_of_the_images_has_a_pin_that_satisfies_it():
    lines = REQUIREMENTS["requirements"](ROOT / "pyproject.toml")
    required = [Requirement(line) for line in lines]
    names = {requirement.name for requirement in required}
    assert {"torch", "deepspeed", "wandb", "pyarrow"} <= names
    for requirement in required:
        if requirement.name != "torch":  # comes from the base image or from a build argument
            pin = PINS[CONSTRAINTS["canonical_name"](requirement.name)]
            assert pin in requirement.specifier


def test_packages_compiled_for_the_base_image_are_kept_and_missing_ones_are_pinned():
    base = {"flash-attn": "2.7.4", "numpy": "2.1", "torch": "2.12.0a0+5aff.nv26.05", "tqdm": "4.67"}
    kept = ["flash-attn==2.7.4", "numpy==2.1", "torch==2.12.0a0+5aff.nv26.05"]
    assert BASE["compiled_pins"](base) == kept
    pins = ["# pins", "deepspeed==0.19.8", "Flash_Attn==2", "tqdm==4.70"]
    assert BASE["pins_of_missing"](pins, base) == ["deepspeed==0.19.8"]


def test_the_nodes_of_the_compose_file_form_one_world():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    environments = [service["environment"] for service in services.values()]
    ranks = [environment["RANK"] for environment in environments]
    assert ranks == [str(rank) for rank in range(len(services))]
    for environment in environments:
        assert environment["WORLD_SIZE"] == str(len(services))
        assert environment["MASTER_ADDR"] == next(iter(services))
    others = [
        {key: value for key, value in service.items() if key != "environment"}
        for service in services.values()
    ]
    assert all(other == others[0] for other in others)
    build = others[0]["build"]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).is_file()
