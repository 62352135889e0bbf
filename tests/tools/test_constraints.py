"""constraints.txt, which pins what `make` and the images install, and the tool that writes it."""

import runpy
import tomllib
from pathlib import Path
from types import SimpleNamespace

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
TOOL = SimpleNamespace(**runpy.run_path(str(ROOT / "tools/constraints.py")))
PINS = TOOL.pins((ROOT / "constraints.txt").read_text())


def test_the_file_is_as_the_tool_writes_it():
    assert TOOL.text(PINS) == (ROOT / "constraints.txt").read_text()
    assert all(str(Version(version)) == version for version in PINS.values())


def test_every_requirement_of_a_developer_has_a_pin_that_satisfies_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        lines += extra
    for requirement in map(Requirement, lines):
        is_exact = any(bound.operator == "==" for bound in requirement.specifier)
        if requirement.name not in ("torch", "megatron_ring") and not is_exact:
            assert PINS[TOOL.canonical_name(requirement.name)] in requirement.specifier


def test_torch_and_packages_of_its_cuda_build_have_no_line():
    assert not [name for name in PINS if name == "torch" or name.startswith(("nvidia", "cuda"))]


def test_the_pin_of_triton_is_left_out_if_torch_requires_its_own():
    pinned = {"numpy": "2.4.6", "triton": "3.9.0"}
    without_triton = {"numpy": "2.4.6"}
    of_cuda_build = ["filelock", "triton==3.7.1; platform_system == 'Linux'"]
    assert TOOL.usable(pinned, of_cuda_build) == without_triton
    assert TOOL.usable(pinned, []) == without_triton, "torch is not installed yet"
    assert TOOL.usable(pinned, ["filelock", "tritonclient"]) == pinned


def test_other_versions_and_packages_without_a_line_are_reported():
    found = TOOL.differences({"a": "1", "b": "2", "absent": "3"}, {"a": "1", "b": "2.1", "c": "4"})
    assert [line.split()[:2] for line in found] == [["b", "2.1"], ["c", "4"]]


def test_names_are_compared_as_pip_does():
    assert TOOL.pins("# all\nBackports.zstd==1.8.0  # why\n\nliger_kernel==0.8.5\n") == {
        "backports-zstd": "1.8.0",
        "liger-kernel": "0.8.5",
    }
