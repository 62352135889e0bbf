"""What the README says of the tree, the commands and the exit codes is so."""

import re
from pathlib import Path

from megatron_ring import errors
from megatron_ring.config import Config, load_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_two_commands_stand_within_the_first_twenty_lines():
    beginning = "\n".join(README.splitlines()[:20])
    assert "make train" in beginning
    assert "make test" in beginning


def test_every_make_target_that_is_named_exists():
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", README)) <= set(TARGETS)


def test_every_file_and_folder_that_is_named_exists():
    named = re.findall(r"`([\w./-]+/[\w.-]*|[\w-]+\.(?:py|md))`", README)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == [".bin/.idx"]


def test_every_flag_that_is_named_is_one():
    text = re.sub(r"tools/\S+\.py[^\n`]*", "", README).replace("--num_gpus", "")
    fields = {
        field
        for section in vars(Config()).values()
        if hasattr(section, "problems")
        for field in vars(section)
    }
    known = {f"--{field.replace('_', '-')}" for field in fields | set(vars(Config()))} | {"--help"}
    assert set(re.findall(r"--[a-z][a-z_-]+", text)) <= known


def test_the_exit_codes_are_those_of_the_errors():
    told = dict(re.findall(r"^\| (\d+) \| (\w+):", README, flags=re.MULTILINE))
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    ]
    assert told == {
        str(kind.exit_code): kind.__name__ for kind in kinds if getattr(kind, "exit_code", 1) != 1
    }


def test_every_config_that_is_named_loads():
    for path in re.findall(r"configs/[\w.-]+\.yaml", README):
        assert isinstance(load_yaml(ROOT / path), Config)
