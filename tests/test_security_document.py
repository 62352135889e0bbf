"""The files, flags, tools and limits in docs/security.md match the code."""

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
PROGRAMS = [*(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


def test_every_program_is_listed():
    programs = {path.name for path in PROGRAMS if "__main__" in path.read_text()}
    patterns = {word.split()[0] for word in QUOTED}
    missing = [
        program
        for program in sorted(programs)
        if not any(fnmatch.fnmatch(program, pattern) for pattern in patterns)
    ]
    assert missing == []


def test_named_files_exist():
    named = [word for word in QUOTED if re.fullmatch(r"[\w/]+/\w+\.(?:py|sbatch)", word)]
    assert len(named) > 4
    missing = [
        path
        for path in named
        if not (ROOT / path).exists() and not (ROOT / "megatron_ring" / path).exists()
    ]
    assert missing == []


def test_named_flags_exist():
    sections = Config, CheckpointConfig, DataConfig, LoggingConfig, ParallelConfig
    known = {flag(option.name) for section in sections for option in fields(section)}
    known |= set(re.findall(r"--[a-z-]+", (ROOT / "README.md").read_text()))
    sources = "".join(path.read_text() for path in PROGRAMS)
    named = {word.split()[0] for word in QUOTED if word.startswith("--")}
    for name in named:
        is_of_torchrun = name.startswith("--rdzv")
        is_of_a_program = name in sources or name[2:].replace("-", "_") in sources
        assert is_of_torchrun or name in known or is_of_a_program, name


def test_stated_limits_match_the_code():
    text = TEXT.replace("\n", " ")
    assert f"at most {intercom._MAX_CONNECTIONS} connections" in text
    assert f"at most {intercom._MAX_MESSAGE_BYTES} bytes and five seconds" in text
    assert (intercom._REQUEST_TIMEOUT, intercom.RESPONSE_TIMEOUT) == (5, 3)
    assert f"bounded, {CONFIG_BYTES // 1024} KiB" in text
    for size in (METADATA_BYTES, TOKENIZER_BYTES):
        assert f"bounded, {size >> 20} MiB" in text
