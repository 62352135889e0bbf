"""wandb, TensorBoard and csv files contain the same numbers as the metrics file."""

import csv
import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from tests.programs import free_port, start_rank, working_folder

STEPS = 4
SMALL = f"""\
model: {{num_layers: 1, hidden_size: 32, num_attention_heads: 2}}
parallel: {{context_parallel: striped}}
data: {{data_path: [text/tokens], seq_length: 64, split: [0.7, 0.15, 0.15]}}
training: {{train_iters: {STEPS}, lr_warmup_iters: 1, eval_interval: 2, eval_iters: 1, dtype: fp32}}
logging:
  {{metrics_file: metrics.jsonl, wandb_project: tiny, tensorboard_dir: boards, csv_dir: tables}}
"""

Figures = dict[tuple[str, int], float]
"""(name, step) -> value, by the names in monitors: train/loss, validation/bits_per_byte."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder of two ranks that have trained, validated and tested with every monitor."""
    folder = working_folder(tmp_path_factory.mktemp("work"), SMALL)
    port = free_port()
    ranks = [
        start_rank(rank, port, folder, [], WANDB_MODE="offline", WANDB_SILENT="true")
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(outputs)
    return folder


def of_metrics_file(folder: Path) -> Figures:
    figures = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        figures |= {
            (_monitor_name(key), step): value for key, value in record.items() if _is_number(value)
        }
    return figures


def _monitor_name(key: str) -> str:
    part, _, figure = key.partition("_")
    return f"{part}/{figure}" if part in ("validation", "test") else f"train/{key}"


def _is_number(value: object) -> bool:
    """Return False for null (not finite) and for lists (of hops), which monitors cannot show."""
    return isinstance(value, int | float)


def of_wandb(folder: Path) -> Figures:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    figures = {}
    for record in map(Record.FromString, _wandb_records(file.read_bytes())):
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        figures |= {(name, row["_step"]): value for name, value in row.items()}
    return figures


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a wandb file, for which wandb has no Python reader.

    The file is 7 bytes of wandb's own, then a LevelDB log in blocks of 32 KiB. A record is in one
    piece or in several, each after a checksum (4 bytes), its length (2) and its kind (1).
    """
    block_bytes = 1 << 15
    header_bytes = 7
    full_record = 1
    last_piece = 4
    position = header_bytes
    record = b""
    while position < len(content):
        left_in_block = block_bytes - position % block_bytes
        if left_in_block < header_bytes:
            position += left_in_block  # a header never spans two blocks
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        position += header_bytes
        record += content[position : position + length]
        position += length
        if kind in (full_record, last_piece):
            yield record
            record = b""


def of_tensorboard(folder: Path) -> Figures:
    (board,) = {file.parent for file in (folder / "boards").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(board), size_guidance={"scalars": 0})
    events.Reload()
    return {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }


def of_csv(folder: Path) -> Figures:
    """Read csv files, whose names have _ for the / after the split."""
    figures = {}
    for file in (folder / "tables").rglob("*.csv"):
        with file.open() as rows:
            _, *events = csv.reader(rows)
        figures |= {
            (file.stem.replace("_", "/", 1), int(step)): float(value) for step, value in events
        }
    return figures


def test_the_metrics_file_has_every_step_and_evaluation(folder):
    names = {
        name: {step for of, step in of_metrics_file(folder) if of == name}
        for name, _ in of_metrics_file(folder)
    }
    for name in ("loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds"):
        assert names[f"train/{name}"] == {1, 2, 3, 4}
    for name in ("loss", "bits_per_byte"):
        assert names[f"validation/{name}"] == {0, 2, 4}
        assert names[f"test/{name}"] == {4}


@pytest.mark.parametrize(
    ("of_monitor", "stored_as"), [(of_wandb, float), (of_tensorboard, np.float32), (of_csv, float)]
)
def test_a_monitor_has_the_numbers_of_the_metrics_file(
    of_monitor: Callable[[Path], Figures], stored_as: type, folder
):
    actual = of_monitor(folder)
    expected = of_metrics_file(folder)
    assert {key: actual.get(key, math.nan) for key in expected} == {
        key: stored_as(v) for key, v in expected.items()
    }
    # wandb also stores times.
    own = {key for key in actual if key[0].startswith(("train/", "validation/", "test/"))}
    assert own == expected.keys()
