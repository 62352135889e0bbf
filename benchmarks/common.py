"""What all benchmarks share: dtypes by flag, the device's name, Markdown rows and the JSON file."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def device_name(device: str) -> str:
    """Return the GPU's name for "cuda", else "CPU"."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def commit() -> str:
    """Return the short hash of the checked-out commit, or "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def table_row(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def write_json(path: str, findings: dict[str, Any]) -> None:
    """Write ``findings`` to the file ``path``; do nothing if the path is empty."""
    if path:
        Path(path).write_text(json.dumps(findings, indent=2) + "\n")
