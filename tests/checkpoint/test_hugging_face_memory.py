"""Conversions raise a process's memory high-water mark by at most 1.2 times the model's size."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ring.checkpoint.hugging_face.exporting import ExportOptions, export_checkpoint
from megatron_ring.config import ModelConfig
from tests.checkpoint.constant_weights import write

ROOT = Path(__file__).parents[2]
SIZES = {"num_layers": 5, "hidden_size": 1024, "num_attention_heads": 8}
MODELS = {
    "qwen2": ModelConfig(**SIZES, add_qkv_bias=True),
    # The family whose tensors are transposed and joined from several.
    "gpt2": ModelConfig(
        **SIZES,
        normalization="LayerNorm",
        activation="gelu",
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
    ),
}
# The mark is reset to the memory in use after libraries are loaded.
MEASURED = """
import sys
from pathlib import Path
from tools.convert_checkpoint import main

def high_water_mark():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

Path("/proc/self/clear_refs").write_text("5")
before = high_water_mark()
main(sys.argv[1:])
print(high_water_mark() - before)
"""


def rise(*arguments: str | Path) -> int:
    """Run a conversion in a process and return by how many bytes its memory rises."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    completed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    return int(completed.stdout.splitlines()[-1])


@pytest.mark.whole
@pytest.mark.parametrize("family", ["qwen2", pytest.param("gpt2", marks=pytest.mark.exhaustive)])
def test_conversions_need_little_more_memory_than_the_model(family, tmp_path):
    ours = write(tmp_path / "ours", MODELS[family])
    model_bytes = sum(part.stat().st_size for part in ours.glob("part-*"))
    assert model_bytes > 2e8
    export_checkpoint(ours, tmp_path / "theirs", ExportOptions())
    limit = 1.2 * model_bytes
    assert rise("import", tmp_path / "theirs", tmp_path / "imported") < limit
    assert rise("export", ours, tmp_path / "exported") < limit
    assert rise("export", ours, tmp_path / "narrow", "--dtype", "bf16") < limit
