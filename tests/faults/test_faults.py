"""Each fault that a run may meet: what is said and by whom, the exit code, and that the same command goes on after it.

A run of two ranks over gloo meets it in a step or in a save that the case names. Started again without it, the run
ends with the losses of one that nothing has happened to, to the last bit, and has every step once in its metrics file.
"""

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
STALLED, STOPPED, BAD_OPTIONS, BAD_DATA, BAD_CHECKPOINT = 76, 75, 2, 3, 4
KILLED = -signal.SIGKILL

RANK = r"rank {} \(\S+, pid \d+\)"
# What the second has sent before its end may take the first a hop or two further.
WAITING = r"\d+ s for rank 1 in step 8, layer [01], {}, hop [12] of 2"
WORDS = {"first": RANK.format(0), "second": RANK.format(1)}
WORDS |= {direction: WAITING.format(direction) for direction in ("forward", "backward")}


@dataclass(frozen=True)
class Case:
    """codes: the exit codes of both ranks. err: all that rank 0 says on stderr; out: a line of its, or none."""

    fault: Fault
    codes: tuple[int, int]
    err: str = ""
    out: str = ""
    flags: tuple[str, ...] = ()


CASES = {
    "a rank is killed in a hop, forward": Case(
        Fault("is killed", step=8, hop=1),
        (STALLED, KILLED),
        err="RingStalled: {first} has waited {forward}; {second} does not live: .*",
    ),
    "a rank is killed in a hop, backward": Case(
        Fault("is killed", step=8, hop=2, direction="BACKWARD", layer=1),
        (STALLED, KILLED),
        err="RingStalled: {first} has waited {backward}; {second} does not live: .*",
    ),
    "a rank is stopped": Case(
        Fault("is stopped", step=8),
        (STALLED, KILLED),
        err="RingStalled: {first} has waited {forward}; {second} is stopped by a signal",
    ),
    "the disk of a rank is full": Case(
        Fault("has a full disk", step=5),
        (BAD_CHECKPOINT, BAD_CHECKPOINT),
        err=r"CheckpointError on rank 0: cannot write the checkpoint of step 6 to saved: part-00001\.safetensors: .*"
        r"File too large.*\. Free some space, or set --save to another disk\.\nstep-00000003 stays the newest\.",
    ),
    "a rank is told to end in a save": Case(
        Fault("is told to end", step=6, hop=0),
        (STOPPED, STOPPED),
        out="stopped          after step 7, on a signal; --load saved continues from there",
    ),
    "a rank is told to end in a save aside": Case(
        Fault("is told to end", step=6, hop=0),
        (STOPPED, STOPPED),
        out="stopped          after step 7, on a signal; --load saved continues from there",
        flags=("--async-save",),
    ),
    "the data file is cut": Case(
        Fault("cuts the data", step=5),
        (BAD_DATA, BAD_DATA),
        err=r"DataError on rank 0: token store text/tokens: text/tokens\.bin has 100 bytes, and had \d+ when it was "
        r"opened: .*--data-path.*--output-prefix.*",
    ),
    "the data file is overwritten": Case(
        Fault("spoils the data", step=5),
        (BAD_DATA, BAD_DATA),
        err="DataError on rank 0: the tokenizer does not fit the data: token store text/tokens has id 65535, in "
        r"document \d+ at byte \d+ of text/tokens\.bin, and the tokenizer has 300 ids, 0 to 299\. .*",
    ),
}


@dataclass(frozen=True)
class Ended:
    """One rank: its exit code, and what it said."""

    code: int
    out: str
    err: str


def run(
    folder: Path,
    flags: Sequence[str] = (),
    of_rank_1: Sequence[str] = (),
    fault: Fault | None = None,
) -> list[Ended]:
    """Both ranks of the program, one of which has a ``fault``, from start to end."""
    port, program = free_port(), STRUCK if fault else PROGRAM
    variables = fault.environment() if fault else {}
    ranks = [
        start_rank(rank, port, folder, [*flags, *own], program, subprocess.PIPE, **variables)
        for rank, own in enumerate(((), of_rank_1))
    ]
    try:
        return [_ended(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def _ended(rank: subprocess.Popen) -> Ended:
    """Long before it would give up waiting for another."""
    if rank.poll() is None and psutil.Process(rank.pid).status() == psutil.STATUS_STOPPED:
        rank.kill()  # as the scheduler does, once the first has ended
    out, err = rank.communicate(timeout=240)
    return Ended(rank.returncode, out, err)


def losses(folder: Path) -> list[dict]:
    """The metrics file without what depends on the clock."""
    timeless = (
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "validation_loss",
        "validation_bits_per_byte",
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in timeless if key in record} for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run to which nothing has happened."""
    folder = working_folder(tmp_path_factory.mktemp("undisturbed"), SMALL)
    found = run(folder)
    assert [(rank.code, rank.err) for rank in found] == [(0, ""), (0, "")]
    assert [record["step"] for record in losses(folder) if "loss" in record] == [
        *range(1, STEPS + 1)
    ]
    return folder


@pytest.fixture
def folder(undisturbed, tmp_path) -> Path:
    """One with the same data and the same config."""
    shutil.copy(undisturbed / "small.yaml", tmp_path)
    shutil.copytree(undisturbed / "text", tmp_path / "text")
    return tmp_path


def ends_as_if_nothing_had_happened(
    folder: Path, undisturbed: Path, flags: Sequence[str] = ()
) -> list[Ended]:
    """Start the same command again, now without a fault."""
    found = run(folder, flags)
    assert [rank.code for rank in found] == [0, 0], found
    assert losses(folder) == losses(undisturbed)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fault_in_a_run(case, folder, undisturbed):
    first, second = run(folder, case.flags, fault=case.fault)
    assert (first.code, second.code) == case.codes, first.err + second.err
    assert re.fullmatch(case.err.format(**WORDS), first.err.strip(), re.S)
    assert not case.out or case.out in first.out.splitlines()
    assert second.err == ""
    shutil.copytree(
        undisturbed / "text", folder / "text", dirs_exist_ok=True
    )  # what mends spoilt data
    again, _ = ends_as_if_nothing_had_happened(folder, undisturbed, case.flags)
    assert "\nresuming         saved/step-0000000" in again.out


def test_data_that_one_rank_alone_reads_and_cannot(folder, undisturbed):
    """A sample's last target, which no other rank has as a token of its own."""
    store = TokenStore(folder / "text" / "tokens")
    training, _ = split_documents(store.lengths, (0.8, 0.2), 64)
    (*_, piece) = SampleStream(store, training, 64, seed=1234, vocab_size=300).text(7).pieces
    file = folder / "text" / "tokens.bin"
    content = bytearray(file.read_bytes())
    end = content.index(piece.tobytes()) + piece.nbytes
    content[end - 2 : end] = b"\xff\xff"
    file.write_bytes(content)

    first, second = run(folder)
    assert (first.code, second.code) == (BAD_DATA, BAD_DATA), first.err + second.err
    foreign = r"DataError on rank 0: on rank 1 \(.*\): .* has id 65535, in document \d+ at byte "
    assert re.match(foreign, first.err.strip())
    assert second.err == ""
    assert losses(folder)[-1]["step"] == 7
    shutil.copytree(undisturbed / "text", folder / "text", dirs_exist_ok=True)
    # The run began on the damaged store, so the repaired one is other data.
    ends_as_if_nothing_had_happened(folder, undisturbed, ["--allow-other-data"])


def test_a_lost_file_of_the_newest_checkpoint(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    (folder / "saved" / f"step-{STEPS:08d}" / "part-00001.safetensors").unlink()
    first, second = ends_as_if_nothing_had_happened(folder, undisturbed)
    passed_over = re.findall(r"^saved/step-00000012 is passed over: .*$", first.out, re.M)
    assert len(passed_over) == 1
    assert "part-00001.safetensors" in passed_over[0]
    assert "resuming         saved/step-00000009, 9 steps done" in first.out
    assert first.err + second.err + second.out == ""


def test_one_rank_with_another_config(folder, undisturbed):
    first, second = run(folder, of_rank_1=["--lr", "0.5"])
    assert (first.code, second.code) == (BAD_OPTIONS, BAD_OPTIONS), first.err + second.err
    differs = r"ConfigError on rank 0: lr is not the same on all ranks: 0\.001 on rank 0 \(\S+\); 0\.5 on rank 1 .*"
    assert re.fullmatch(differs, first.err.strip())
    assert second.err + second.out == ""
    assert not (folder / "metrics.jsonl").exists(), "nothing was begun"
    ends_as_if_nothing_had_happened(folder, undisturbed)
