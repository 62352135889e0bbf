"""Write what the attention kernels support, and which ``auto`` chooses, as the program reads it.

python -m benchmarks.support_matrix --output docs/support.md
"""

import functools
import itertools
from pathlib import Path

import torch
import tyro

from benchmarks.common import table_row
from megatron_ring.context_parallel.layout import auto_stripe_size
from megatron_ring.errors import reporting_errors
from megatron_ring.kernels.attention import choose, stripe_widths
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.kernels.attention.registry import COLUMNS, SUPPORT, Feature
from megatron_ring.kernels.selection import Cell, Unsupported

_gpu = functools.partial(Machine, cudnn=91501, triton=True)
DEVICES = {
    "H100 80GB HBM3": ("cuda", _gpu("NVIDIA H100 80GB HBM3", (9, 0))),
    "H100 PCIe or NVL, H800, H200, GH200": ("cuda", _gpu("NVIDIA H200", (9, 0))),
    "A100, A800": ("cuda", _gpu("NVIDIA A100-SXM4-80GB", (8, 0))),
    "A10, A40, RTX 30, L4, L40S, RTX 40": ("cuda", _gpu("NVIDIA L40S", (8, 9))),
    "B200, GB200, B300": ("cuda", _gpu("NVIDIA B200", (10, 0))),
    "RTX 50, RTX PRO Blackwell": ("cuda", _gpu("NVIDIA GeForce RTX 5090", (12, 0))),
    "CPU": ("cpu", Machine()),
}
"""The device type and a machine for each row of the table of choices."""

_INTRODUCTION = """# What each attention kernel supports

Written by `benchmarks/support_matrix.py` from `megatron_ring/kernels/attention/registry.py`. The
program reads this table before a run starts: if the run needs a feature that its kernel does not
support, it ends with exit code 5 and the message below the table.

| cell | meaning |
| --- | --- |
| tested | a parity test with a float64 oracle on this type of device |
| measured on H100 | as float64, or one process in training, on an NVIDIA H100 80GB HBM3 (58ca893) |
| interpreted | a parity test in Triton's interpreter, also compiled, never run on such a device |
| unproven | its calls match the library's signatures, never run on such a device |
| refused | see the note with this number |

A run that relies on an interpreted or unproven cell prints a warning, and so does one on a GPU of
another generation that relies on a cell measured on an H100. If a package, version or compute
capability that a kernel requires is missing, the message names it.
"""

_CHOICES = """## What `--attention-kernel auto` and `--stripe-size auto` choose

With the torch wheel for CUDA, which includes cuDNN and Triton, and without flash-attn. After the
kernel: its stripes for 65,536 tokens on 8 ring ranks, where the widest are 4,096 tokens. The
console line `attention` names the measurement or the rule that decided, and the line `layout` that
of the stripes.
"""

_GROUNDS = """- **Measured**: H100 80GB HBM3, bf16 and fp16, heads of 128
  (`megatron_ring/kernels/attention/measured.py`). Other GPUs of compute capability 9.0 and other
  head dims take the same order, but for heads above 128 and one document Triton comes last, because
  its backward kernels have too few registers for them. flash-attn comes after what was measured, in
  every version, until it is measured: `--attention-kernel flash` requests it.
- **Other generations, one document**: published figures. On compute capability 10: version 4 of
  flash-attn, if installed, then cuDNN, flash-attn 2, sdpa and Triton. Elsewhere: flash-attn, then
  sdpa, cuDNN and Triton.
- **Other generations, documents or a window**: Triton, which computes a hop in one launch, then
  flash-attn and sdpa.
- **fp32**: sdpa, the only fused kernel for it. Head dims that are no multiple of 8: reference.
- **Determinism**: cuDNN is passed over, because it has no fixed order.
- **Windows in some layers only** (`--window-attn-skip-freq`): as for one document if the layers
  without a window have more than 8.8 times the visible pairs of the others, else as for a window.
  On the H100 the wrong kernel costs 8.8 times as much per pair of documents as per pair of one
  document.
- **Stripes**: as measured on the H100 in bf16, on every GPU. A window was not measured: it takes
  those of documents, because the ranks of a ring visit fewer tiles of it with stripes of 128 than
  with single tokens or, unless it is short, the widest stripes
  ([decision 5](decisions/0005-wide-stripes-alternate-direction-each-round.md)). Documents keep
  single tokens where a sample has fewer than 32 rounds of stripes, and a length that 2 x ring size
  does not divide has no widest stripes. On a CPU two rounds of stripes fit into a window.
"""


def main(output: Path = Path("docs/support.md")) -> None:
    """Write the matrix as Markdown.

    Args:
        output: The file to write.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(matrix())
    print(f"wrote {output}")


def matrix() -> str:
    """Format the page: introduction, table, and a note with reason and alternative per refusal."""
    refusals: list[Unsupported] = []
    header = ["feature", *(f"{kernel} on {device}" for kernel, device in COLUMNS)]
    rows = [header, ["---"] * len(header)]
    for feature, cells in SUPPORT.items():
        rows.append([feature.value, *(_word(cell, refusals) for cell in cells.values())])
    table = [table_row(row) for row in rows]
    notes = [f"{n}. {refused.reason}. {refused.instead}." for n, refused in enumerate(refusals, 1)]
    return "\n".join([_INTRODUCTION, *table, "", *notes, "", _CHOICES, *choices(), "", _GROUNDS])


def choices() -> list[str]:
    """Format the table of what ``auto`` chooses on each device, by mask, dtype and head dim."""
    cases = {
        "bf16 or fp16, heads of 64 or 128": (torch.bfloat16, 128),
        "bf16 or fp16, heads of 256": (torch.bfloat16, 256),
        "fp32": (torch.float32, 128),
    }
    rows = [["device", "mask", *cases], ["---"] * (2 + len(cases))]
    masks = {"one document": [], "documents or a window": [Feature.DOCUMENTS]}
    for (name, (device_type, machine)), (mask, features) in itertools.product(
        DEVICES.items(), masks.items()
    ):
        cells = [
            _choice(device_type, machine, features, dtype, head_dim)
            for dtype, head_dim in cases.values()
        ]
        rows.append([name, mask, *cells])
    return [table_row(row) for row in rows]


def _choice(
    device_type: str, machine: Machine, features: list[Feature], dtype: torch.dtype, head_dim: int
) -> str:
    """Return the kernel and its stripes: "cudnn, widest"."""
    kernel = choose("auto", device_type, dtype, head_dim, features, machine).name
    mask = MaskKind.of(features)
    widths = stripe_widths(kernel, device_type, mask, machine).widths
    tokens, ring_size = 65536, 8
    stripe = auto_stripe_size(tokens, ring_size, widths, packed=mask is MaskKind.SPARSE)
    if stripe == tokens // (2 * ring_size):
        return f"{kernel}, widest"
    return f"{kernel}, {'single tokens' if stripe == 1 else f'stripes of {stripe:,}'}"


def _word(cell: Cell, refusals: list[Unsupported]) -> str:
    """Return the word for a cell; add a refusal to ``refusals`` and append its number."""
    if not isinstance(cell, Unsupported):
        return cell.value
    if cell not in refusals:
        refusals.append(cell)
    return f"refused ({refusals.index(cell) + 1})"


if __name__ == "__main__":
    with reporting_errors():
        tyro.cli(main)
