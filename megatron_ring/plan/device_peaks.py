"""Peak FLOP/s of devices, from data sheets by the exact device name; unknown names have none.

Rates are of dense matmuls with accumulation in float32, without structured sparsity: half of the
figure where a data sheet states it with sparsity. Names match exactly: an RTX A1000 is not an A100,
and an H100 PCIe is not an H100 SXM. MIG slices and laptop versions have names of their own.
"""

import re
import time
from typing import NamedTuple

import torch


class _Peak(NamedTuple):
    """Peak rates in TFLOP/s of one device.

    name: a pattern for the whole name that torch reports, without "NVIDIA ".
    bf16: 0 where the device has no bfloat16 matmuls. fp16: 0 means as bf16.
    """

    name: str
    bf16: float
    sheet: str
    fp16: float = 0.0


_PEAKS = (
    # Data center
    _Peak(r"A100-SXM4-(40|80)GB|A100-PCIE-(40|80)GB|A100 80GB PCIe", 312, "A100"),
    _Peak(r"A800-SXM4-(40|80)GB|A800-PCIE-80GB|A800 80GB PCIe|A800 40GB Active", 312, "A800"),
    _Peak(r"H100 80GB HBM3", 989.4, "H100 SXM"),
    _Peak(r"H100 PCIe", 756, "H100 PCIe"),
    _Peak(r"H100 NVL", 835.5, "H100 NVL"),
    _Peak(r"H800", 989.4, "H800 SXM"),
    _Peak(r"H800 PCIe", 756, "H800 PCIe"),
    _Peak(r"H20(-3e)?", 148, "H20"),
    _Peak(r"H200", 989.4, "H200 SXM"),
    _Peak(r"H200 NVL", 835.5, "H200 NVL"),
    _Peak(r"GH200 (120GB|480GB|144G HBM3e)", 989.4, "GH200"),
    _Peak(r"B100", 1750, "HGX B100"),
    _Peak(r"B200", 2250, "HGX B200"),
    _Peak(r"GB200", 2500, "GB200 NVL72"),
    _Peak(r"A2", 18, "A2"),
    _Peak(r"A10", 125, "A10"),
    _Peak(r"A10G", 70, "A10G"),
    _Peak(r"A30", 165, "A30"),
    _Peak(r"A40", 149.7, "A40"),
    _Peak(r"L4", 121, "L4"),
    _Peak(r"L20", 119.5, "L20"),
    _Peak(r"L40", 181.05, "L40"),
    _Peak(r"L40S", 362.05, "L40S"),
    _Peak(r"Tesla V100-SXM[23]-(16|32)GB(-LS)?", 0, "V100 SXM", fp16=125),
    _Peak(r"Tesla V100-PCIE-(16|32)GB", 0, "V100 PCIe", fp16=112),
    _Peak(r"Tesla V100S-PCIE-32GB", 0, "V100S PCIe", fp16=130),
    _Peak(r"Tesla T4", 0, "T4", fp16=65),
    # Workstation and GeForce, from the architectures' white papers (FP32 accumulate)
    _Peak(r"RTX A6000", 154.8, "RTX A6000"),
    _Peak(r"RTX 6000 Ada Generation", 364.2, "RTX 6000 Ada"),
    _Peak(r"GeForce RTX 3090", 71, "GA102 white paper, RTX 3090"),
    _Peak(r"GeForce RTX 3090 Ti", 80, "GA102 white paper, RTX 3090 Ti"),
    _Peak(r"GeForce RTX 4090", 165.2, "Ada white paper, RTX 4090"),
    _Peak(r"GeForce RTX 5090", 209.5, "RTX Blackwell white paper, RTX 5090"),
    # AMD. torch reports each of the two dies of an MI250 or MI250X, which has half of the rate.
    _Peak(r"AMD Instinct MI210", 181, "MI210"),
    _Peak(r"AMD Instinct MI250", 362.1 / 2, "MI250, one of two dies"),
    _Peak(r"AMD Instinct MI250X", 383 / 2, "MI250X, one of two dies"),
    _Peak(r"AMD Instinct MI300A", 980.6, "MI300A"),
    _Peak(r"AMD Instinct MI300X", 1307.4, "MI300X"),
    _Peak(r"AMD Instinct MI325X", 1307.4, "MI325X"),
)


def peak_flops(device: str, dtype: torch.dtype) -> tuple[float | None, str]:
    """Return the peak FLOP/s of one process and the source of the number.

    For a GPU of unknown name or another ``dtype``: None and the reason. A CPU is measured.
    """
    if device != "cuda":
        return _measured_matmul_rate(device, dtype), "measured on a 1024 x 1024 matmul"
    name = torch.cuda.get_device_name()
    dtype_name = str(dtype).removeprefix("torch.")
    short_name = name.removeprefix("NVIDIA ")
    peak = next((peak for peak in _PEAKS if re.fullmatch(peak.name, short_name)), None)
    rate = 0.0
    if peak:
        rates = {torch.bfloat16: peak.bf16, torch.float16: peak.fp16 or peak.bf16}
        rate = rates.get(dtype, 0.0)
    if not rate:
        return None, f"no data sheet rate for {name} in {dtype_name}, so no utilization is shown"
    return rate * 1e12, f"{peak.sheet} data sheet"


def _measured_matmul_rate(
    device: str, dtype: torch.dtype, size: int = 1024, repeats: int = 5
) -> float:
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))

    def seconds() -> float:
        start = time.perf_counter()
        (a @ b).sum().item()
        return time.perf_counter() - start

    return 2 * size**3 / min(seconds() for _ in range(repeats))
