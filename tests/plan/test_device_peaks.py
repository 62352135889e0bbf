"""The rate of a device by its exact name: dense matmuls in half precision, from its data sheet."""

import re

import pytest
import torch

from megatron_ring.plan import device_peaks
from megatron_ring.plan.device_peaks import peak_flops

KNOWN = [
    ("NVIDIA A100-SXM4-40GB", 312),
    ("A100-SXM4-80GB", 312),
    ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA A800-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835.5),
    ("NVIDIA H800", 989.4),
    ("NVIDIA H800 PCIe", 756),
    ("NVIDIA H20", 148),
    ("NVIDIA H200", 989.4),
    ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA GH200 480GB", 989.4),
    ("NVIDIA B100", 1750),
    ("NVIDIA B200", 2250),
    ("NVIDIA GB200", 2500),
    ("NVIDIA A10", 125),
    ("NVIDIA A10G", 70),
    ("NVIDIA A30", 165),
    ("NVIDIA A40", 149.7),
    ("NVIDIA L4", 121),
    ("NVIDIA L40", 181.05),
    ("NVIDIA L40S", 362.05),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 3090", 71),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 5090", 209.5),
    ("AMD Instinct MI300X", 1307.4),
    ("AMD Instinct MI250X", 191.5),
]


@pytest.mark.parametrize(("name", "teraflops"), KNOWN)
def test_a_device_has_the_rate_of_its_own_data_sheet(name, teraflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    for dtype in (torch.bfloat16, torch.float16):
        rate, source = peak_flops("cuda", dtype)
        assert rate == pytest.approx(teraflops * 1e12)
        assert source.endswith("data sheet")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA RTX A1000", torch.bfloat16),
        ("NVIDIA RTX A1000 Laptop GPU", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16),
        ("NVIDIA A1000", torch.bfloat16),
        ("NVIDIA A16", torch.bfloat16),
        ("NVIDIA H1000", torch.bfloat16),
        ("NVIDIA H100 80GB HBM3", torch.float32),
        ("Tesla V100-SXM2-16GB", torch.bfloat16),
        ("A device of next year", torch.float16),
    ],
)
def test_another_name_or_type_has_no_rate_and_a_reason(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    rate, reason = peak_flops("cuda", dtype)
    assert rate is None
    assert name in reason
    assert "no utilization" in reason


def test_a_device_without_bfloat16_has_a_rate_in_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-32GB")
    assert peak_flops("cuda", torch.float16)[0] == 125e12


def test_a_name_matches_one_device():
    for name, _ in KNOWN:
        matching = [
            peak
            for peak in device_peaks._PEAKS
            if re.fullmatch(peak.name, name.removeprefix("NVIDIA "))
        ]
        assert len(matching) == 1


def test_a_cpu_is_measured():
    rate, source = peak_flops("cpu", torch.float32)
    assert rate > 0
    assert "measured" in source
