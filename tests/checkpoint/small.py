"""Small checkpoints, written as training does but without an engine. Does not import torch."""

from pathlib import Path
from typing import Any

from megatron_ring.checkpoint import names, store
from megatron_ring.config import Config


def state(step: int) -> store.RunState:
    return store.RunState(step=step, consumed_samples=4 * step, vocab_size=61, seq_length=48)


def write(folder: Path, step: int, config: Config | None = None, **options: Any) -> Path:
    """Write a checkpoint of one file. ``options``: for store.commit."""
    store.prepare(folder, step)
    (folder / names.partial_name(step) / "rank-0.pt").write_bytes(b"weights of step %d" % step)
    records = store.flush_and_checksum(folder, step, store.written(folder, step))
    return store.commit(folder, state(step), config or Config(), records, **options)
