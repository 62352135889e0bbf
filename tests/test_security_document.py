"""docs/security.md names files, flags and limits that are there, and every tool."""

import fnmatch
import re
from dataclasses import fields
from pathlib import Path

from megatron_ring.config import CheckpointConfig, Config, DataConfig, LoggingConfig, ParallelConfig
from megatron_ring.errors import flag
from megatron_ring.monitoring import intercom
from megatron_ring.untrusted import CONFIG_BYTES, METADATA_BYTES, TOKENIZER_BYTES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/security.md").read_text()
QUOTED = set(re.findall(r"`([^`\n]+)`", TEXT))
COMMANDS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


def test_every_tool_is_listed():
    commands = [path.name for path in COMMANDS if "__main__" in path.read_text()]
    patterns = {word.split()[0] for word in QUOTED}
    unlisted = [
        command
        for command in commands
        if not any(fnmatch.fnmatch(command, pattern) for pattern in patterns)
    ]
    assert unlisted == []


def test_files_of_the_tree_that_are_named_exist():
    named = [word for word in QUOTED if re.fullmatch(r"[\w/]+/\w+\.(?:py|sbatch)", word)]
    assert len(named) > 4
    assert [
        path
        for path in named
        if not ((ROOT / path).exists() or (ROOT / "megatron_ring" / path).exists())
    ] == []


def test_flags_that_are_named_exist():
    sections = Config, CheckpointConfig, DataConfig, LoggingConfig, ParallelConfig
    known = {flag(each.name) for section in sections for each in fields(section)}
    commands = "".join(path.read_text() for path in COMMANDS)
    for named in {
        word.split()[0]
        for word in QUOTED
        if word.startswith("--") and not word.startswith("--rdzv")
    }:
        assert named in known or named[2:].replace("-", "_") in commands, named


def test_limits_are_those_of_the_program():
    assert f"at most {intercom._CONNECTIONS} connections" in TEXT
    assert f"at most {intercom._BYTES_OF_A_MESSAGE} bytes and five seconds" in TEXT.replace(
        "\n", " "
    )
    assert (intercom._SECONDS_FOR_A_REQUEST, intercom.SECONDS_TO_ANSWER) == (5, 3)
    sizes = {
        "`--config`": CONFIG_BYTES,
        "beside the store": METADATA_BYTES,
        "`--tokenizer-model`": TOKENIZER_BYTES,
    }
    assert f"bounded, {CONFIG_BYTES // 1024} KiB" in TEXT
    assert all(
        f"bounded, {size >> 20} MiB" in TEXT for name, size in sizes.items() if size >= 1 << 20
    )
