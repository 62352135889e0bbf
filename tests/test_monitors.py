"""What wandb, TensorBoard and csv files receive, read back from where they keep it, is what the metrics file has."""

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
logging: {{metrics_file: metrics.jsonl, wandb_project: tiny, tensorboard_dir: boards, csv_dir: tables}}
"""

Figures = dict[tuple[str, int], float]
"""(name, step) -> value, with the names that monitors show: train/loss, validation/bits_per_byte."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where two ranks have trained, validated and tested under every monitor."""
    folder, port = working_folder(tmp_path_factory.mktemp("work"), SMALL), free_port()
    ranks = [
        start_rank(rank, port, folder, [], WANDB_MODE="offline", WANDB_SILENT="true")
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(said)
    return folder


def of_metrics_file(folder: Path) -> Figures:
    figures = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        figures |= {
            (_shown(key), step): value for key, value in record.items() if _is_number(value)
        }
    return figures


def _shown(key: str) -> str:
    part, _, figure = key.partition("_")
    return f"{part}/{figure}" if part in ("validation", "test") else f"train/{key}"


def _is_number(value: object) -> bool:
    """Null is what is not finite, and lists are of single hops: no monitor could draw them."""
    return isinstance(value, int | float)


def of_wandb(folder: Path) -> Figures:
    (kept,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    figures = {}
    for record in map(Record.FromString, _wandb_records(kept.read_bytes())):
        row = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        figures |= {(name, row["_step"]): value for name, value in row.items()}
    return figures


def _wandb_records(kept: bytes) -> Iterator[bytes]:
    """wandb has no reader of its own for Python: 7 bytes of its name, then LevelDB's log, in blocks of 32 KiB.

    A record lies in one piece or in several, each behind a checksum (4 bytes), its length (2) and which of them it is.
    """
    block, header, whole, last = 1 << 15, 7, 1, 4
    at, record = header, b""
    while at < len(kept):
        if block - at % block < header:
            at += block - at % block  # no header is cut in two
            continue
        length, piece = struct.unpack_from("<HB", kept, at + 4)
        record += kept[at + header : at + header + length]
        at += header + length
        if piece in (whole, last):
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
    """A file's name has _ where the figure's has /, the first of them behind its part."""
    figures = {}
    for file in (folder / "tables").rglob("*.csv"):
        with file.open() as rows:
            _, *events = csv.reader(rows)
        figures |= {
            (file.stem.replace("_", "/", 1), int(step)): float(value) for step, value in events
        }
    return figures


def test_the_metrics_file_has_every_step_and_what_was_held_out(folder):
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
    ("of_monitor", "kept_as"), [(of_wandb, float), (of_tensorboard, np.float32), (of_csv, float)]
)
def test_a_monitor_has_what_the_metrics_file_has(
    of_monitor: Callable[[Path], Figures], kept_as: type, folder
):
    found, expected = of_monitor(folder), of_metrics_file(folder)
    assert {key: found.get(key, math.nan) for key in expected} == {
        key: kept_as(v) for key, v in expected.items()
    }
    # Beside them wandb keeps the time.
    own = {key for key in found if key[0].startswith(("train/", "validation/", "test/"))}
    assert own == expected.keys()
