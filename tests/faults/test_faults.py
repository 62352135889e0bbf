"""Faults during a run: the message, the exit code, and that the same command continues afterwards.

Two ranks over gloo get the fault in a given step or save. Started again without it, the run ends
with the losses of an undisturbed run, bit for bit, and has every step once in its metrics file.
"""

import contextlib
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_ring.data.samples import SampleStream, split_documents
from megatron_ring.data.tokens import TokenStore
from tests.faults.struck import Fault
from tests.programs import PROGRAM, ROOT, free_port, start_rank, working_folder

pytestmark = pytest.mark.whole

STRUCK = ROOT / "tests" / "faults" / "struck.py"
STEPS = 12
SMALL = f"""\
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 2}}
parallel: {{context_parallel: striped, ring_timeout: 10}}
data: {{data_path: [text/tokens], seq_length: 64, split: [0.8, 0.2]}}
training: {{train_iters: {STEPS}, lr_warmup_iters: 1, eval_interval: 6, eval_iters: 1, dtype: fp32}}
checkpoint: {{save: saved, load: saved, save_interval: 3}}
logging: {{metrics_file: metrics.jsonl}}
"""
BAD_OPTIONS = 2
BAD_DATA = 3
BAD_CHECKPOINT = 4
STOPPED = 75
STALLED = 76
KILLED = -signal.SIGKILL

RANK = r"rank {} \(\S+, pid \d+\)"
# What the second rank sent before its end may let the first continue for a hop or two.
WAITING = r"\d+ s for rank 1 in step 8, layer [01], {}, hop [12] of 2"
PATTERNS = {
    "first": RANK.format(0),
    "second": RANK.format(1),
    "forward": WAITING.format("forward"),
    "backward": WAITING.format("backward"),
}


@dataclass(frozen=True)
class Case:
    """A fault and what follows.

    codes: the exit codes of both ranks. err: a pattern for the whole stderr of rank 0. out: a line
    of its stdout, or none.
    """

    fault: Fault
    codes: tuple[int, int]
    err: str = ""
    out: str = ""
    flags: tuple[str, ...] = ()


CASES = {
    "a rank is killed in a hop, forward": Case(
        Fault("is killed", step=8, hop=1),
        (STALLED, KILLED),
        err="RingStalled: {first} .*{forward}; {second} .*dead.*",
    ),
    "a rank is killed in a hop, backward": Case(
        Fault("is killed", step=8, hop=2, direction="BACKWARD", layer=1),
        (STALLED, KILLED),
        err="RingStalled: {first} .*{backward}; {second} .*dead.*",
    ),
    "a rank is stopped": Case(
        Fault("is stopped", step=8),
        (STALLED, KILLED),
        err="RingStalled: {first} .*{forward}; {second} .*stopped.*",
    ),
    "the disk of a rank is full": Case(
        Fault("has a full disk", step=5),
        (BAD_CHECKPOINT, BAD_CHECKPOINT),
        err=r"CheckpointError on rank 0: .*step 6 to saved: part-00001\.safetensors: .*"
        r"File too large.*--save.*step-00000003.*",
    ),
    "a rank gets SIGTERM in a save": Case(
        Fault("gets SIGTERM", step=6, hop=0),
        (STOPPED, STOPPED),
        out="stopped          after step 7, on a signal; --load saved continues from there",
    ),
    "a rank gets SIGTERM in an asynchronous save": Case(
        Fault("gets SIGTERM", step=6, hop=0),
        (STOPPED, STOPPED),
        out="stopped          after step 7, on a signal; --load saved continues from there",
        flags=("--async-save",),
    ),
    "the data file is truncated": Case(
        Fault("truncates the data", step=5),
        (BAD_DATA, BAD_DATA),
        err=r"DataError on rank 0: .*text/tokens\.bin .*100 bytes.* \d+ .*"
        r"--data-path.*--output-prefix.*",
    ),
    "the data file is overwritten": Case(
        Fault("overwrites the data", step=5),
        (BAD_DATA, BAD_DATA),
        err=r"DataError on rank 0: .*65535.* document \d+ .*byte \d+ of text/tokens\.bin.* 300 ids"
        r".*",
    ),
}


@dataclass(frozen=True)
class RankResult:
    """The exit code and the output of one rank."""

    code: int
    out: str
    err: str


def run(
    folder: Path,
    flags: Sequence[str] = (),
    of_rank_1: Sequence[str] = (),
    fault: Fault | None = None,
) -> list[RankResult]:
    """Run both ranks of the program to the end, one of them with ``fault``."""
    port = free_port()
    program = STRUCK if fault else PROGRAM
    variables = fault.environment() if fault else {}
    ranks = [
        start_rank(rank, port, folder, [*flags, *own], program, subprocess.PIPE, **variables)
        for rank, own in enumerate(((), of_rank_1))
    ]
    try:
        return [_wait_for(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def _wait_for(rank: subprocess.Popen) -> RankResult:
    """Wait for less time than a collective would."""
    # The rank may end between two calls.
    with contextlib.suppress(psutil.NoSuchProcess):
        if psutil.Process(rank.pid).status() == psutil.STATUS_STOPPED:
            rank.kill()  # as a scheduler does once the first rank has ended
    out, err = rank.communicate(timeout=240)
    return RankResult(rank.returncode, out, err)


def losses(folder: Path) -> list[dict]:
    """Return the metrics file without what depends on time."""
    compared = (
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "validation_loss",
        "validation_bits_per_byte",
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in compared if key in record} for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Return the folder of a run without a fault."""
    folder = working_folder(tmp_path_factory.mktemp("undisturbed"), SMALL)
    results = run(folder)
    assert [(rank.code, rank.err) for rank in results] == [(0, ""), (0, "")]
    assert [record["step"] for record in losses(folder) if "loss" in record] == [
        *range(1, STEPS + 1)
    ]
    return folder


@pytest.fixture
def folder(undisturbed, tmp_path) -> Path:
    """Return a folder with the same data and the same config."""
    shutil.copy(undisturbed / "small.yaml", tmp_path)
    shutil.copytree(undisturbed / "text", tmp_path / "text")
    return tmp_path


def assert_restart_equals_undisturbed(
    folder: Path, undisturbed: Path, flags: Sequence[str] = ()
) -> list[RankResult]:
    """Start the same command again, now without a fault."""
    results = run(folder, flags)
    assert [rank.code for rank in results] == [0, 0], results
    assert losses(folder) == losses(undisturbed)
    return results


# tests/test_stalled_run.py stops a rank too.
EXHAUSTIVE = {"a rank is stopped"}
EACH_CASE = [
    pytest.param(case, marks=[pytest.mark.exhaustive] if name in EXHAUSTIVE else [], id=name)
    for name, case in CASES.items()
]


@pytest.mark.parametrize("case", EACH_CASE)
def test_a_fault_has_its_message_and_code_and_a_restart_continues(case, folder, undisturbed):
    first, second = run(folder, case.flags, fault=case.fault)
    assert (first.code, second.code) == case.codes, first.err + second.err
    assert re.fullmatch(case.err.format(**PATTERNS), first.err.strip(), re.S)
    assert not case.out or case.out in first.out.splitlines()
    assert second.err == ""
    # Repair the data.
    shutil.copytree(undisturbed / "text", folder / "text", dirs_exist_ok=True)
    again, _ = assert_restart_equals_undisturbed(folder, undisturbed, case.flags)
    assert "\nresuming         saved/step-0000000" in again.out


def test_bad_data_that_only_one_rank_reads_ends_all_ranks(folder, undisturbed):
    """The last target of a sample is not a token of any other rank."""
    store = TokenStore(folder / "text" / "tokens")
    training, _ = split_documents(store.lengths, (0.8, 0.2), 64)
    (*_, piece) = SampleStream(store, training, 64, seed=1234, vocab_size=300).view(7).pieces
    file = folder / "text" / "tokens.bin"
    content = bytearray(file.read_bytes())
    end = content.index(piece.tobytes()) + piece.nbytes
    content[end - 2 : end] = b"\xff\xff"
    file.write_bytes(content)

    first, second = run(folder)
    assert (first.code, second.code) == (BAD_DATA, BAD_DATA), first.err + second.err
    message = r"DataError on rank 0: on rank 1 \(.*\): .*65535.* document \d+ .*byte "
    assert re.match(message, first.err.strip())
    assert second.err == ""
    assert losses(folder)[-1]["step"] == 7
    shutil.copytree(undisturbed / "text", folder / "text", dirs_exist_ok=True)
    # The run began on the damaged store, so the repaired one is other data.
    assert_restart_equals_undisturbed(folder, undisturbed, ["--allow-other-data"])


def test_a_newest_checkpoint_without_one_file_is_skipped_and_named(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    (folder / "saved" / f"step-{STEPS:08d}" / "part-00001.safetensors").unlink()
    first, second = assert_restart_equals_undisturbed(folder, undisturbed)
    skipped = re.findall(r"^saved/step-00000012 .*$", first.out, re.M)
    assert len(skipped) == 1
    assert "part-00001.safetensors" in skipped[0]
    assert "resuming         saved/step-00000009, 9 steps done" in first.out
    assert first.err + second.err + second.out == ""


def test_a_rank_with_another_option_ends_all_ranks_before_the_first_step(folder, undisturbed):
    first, second = run(folder, of_rank_1=["--lr", "0.5"])
    assert (first.code, second.code) == (BAD_OPTIONS, BAD_OPTIONS), first.err + second.err
    message = r"ConfigError on rank 0: lr .*0\.001 on rank 0 \(\S+\).* 0\.5 on rank 1 .*--lr.*"
    assert re.fullmatch(message, first.err.strip())
    assert second.err + second.out == ""
    assert not (folder / "metrics.jsonl").exists(), "no step was run"
    assert_restart_equals_undisturbed(folder, undisturbed)
