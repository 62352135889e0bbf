"""What ``auto`` chooses on every generation of GPUs, without one, and the reasons that it gives."""

import functools

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import Mask, hop_key_ranges
from megatron_ring.kernels.attention import choice, choose, flash, preferences, stripe_widths
from megatron_ring.kernels.attention.key_ranges import KeyRanges
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import WIDEST, MaskKind, Measured
from megatron_ring.kernels.attention.registry import Feature

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ONE_DOCUMENT = []
DOCUMENTS = [Feature.DOCUMENTS]
WINDOW = [Feature.WINDOW]

# As torch names them, with its cuDNN and Triton.
gpu = functools.partial(Machine, cudnn=91501, triton=True)
H100 = gpu("NVIDIA H100 80GB HBM3", (9, 0))
H100_PCIE = gpu("NVIDIA H100 PCIe", (9, 0))
H200 = gpu("NVIDIA H200", (9, 0))
GH200 = gpu("NVIDIA GH200 480GB", (9, 0))
H800 = gpu("NVIDIA H800", (9, 0))
A100 = gpu("NVIDIA A100-SXM4-80GB", (8, 0))
A800 = gpu("NVIDIA A800 80GB PCIe", (8, 0))
A10 = gpu("NVIDIA A10", (8, 6))
L40S = gpu("NVIDIA L40S", (8, 9))
B200 = gpu("NVIDIA B200", (10, 0))
B300 = gpu("NVIDIA B300 SXM6 AC", (10, 3))
RTX_5090 = gpu("NVIDIA GeForce RTX 5090", (12, 0))

ON_H100 = "on NVIDIA H100 80GB HBM3"
ON_A100_PUBLISHED = "published figures for A100"
ON_B200_PUBLISHED = "published figures for B200"
ONE_LAUNCH = "triton computes a hop in one launch"
HALF_ONLY = "the other fused kernels support only half precision"

CHOICES = [
    (H100, ONE_DOCUMENT, BF16, 128, "cudnn", "as measured (commit 58ca893, torch 2.11.0+cu130)"),
    (H100, ONE_DOCUMENT, FP16, 128, "cudnn", "as measured (commit 58ca893"),
    (H100, DOCUMENTS, BF16, 128, "triton", "as measured with documents (commit 58ca893"),
    (H100, DOCUMENTS, FP16, 128, "triton", "as measured with documents (commit 58ca893"),
    (H100, WINDOW, BF16, 128, "triton", "documents or a window, as measured with documents ("),
    (H100, [*DOCUMENTS, *WINDOW], BF16, 128, "triton", "as measured with documents ("),
    (H100, ONE_DOCUMENT, BF16, 64, "cudnn", "as measured with a head dim of 128 (commit"),
    (H100, ONE_DOCUMENT, BF16, 256, "cudnn", "as measured with a head dim of 128 (commit"),
    (H100, DOCUMENTS, BF16, 64, "triton", "with documents and a head dim of 128 (commit"),
    (H100, DOCUMENTS, BF16, 256, "triton", "with documents and a head dim of 128 (commit"),
    (H100, ONE_DOCUMENT, FP32, 128, "sdpa", HALF_ONLY),
    (H100, DOCUMENTS, FP32, 128, "sdpa", HALF_ONLY),
    (H100, ONE_DOCUMENT, FP64, 128, "reference", "sdpa does not support float64"),
    (H100, ONE_DOCUMENT, BF16, 20, "reference", "cudnn and flash do not support other head dims"),
    (H100_PCIE, ONE_DOCUMENT, BF16, 128, "cudnn", ON_H100),
    (H200, ONE_DOCUMENT, BF16, 128, "cudnn", ON_H100),
    (H200, DOCUMENTS, BF16, 128, "triton", ON_H100),
    (H200, DOCUMENTS, BF16, 64, "triton", f"and a head dim of 128 {ON_H100}"),
    (GH200, DOCUMENTS, FP16, 128, "triton", ON_H100),
    (H800, WINDOW, BF16, 128, "triton", ON_H100),
    (A100, ONE_DOCUMENT, BF16, 128, "sdpa", ON_A100_PUBLISHED),
    (A100, DOCUMENTS, BF16, 128, "triton", ONE_LAUNCH),
    (A800, DOCUMENTS, FP16, 64, "triton", ONE_LAUNCH),
    (A100, DOCUMENTS, BF16, 256, "triton", ONE_LAUNCH),
    (A100, ONE_DOCUMENT, FP32, 128, "sdpa", HALF_ONLY),
    (A10, WINDOW, BF16, 128, "triton", ONE_LAUNCH),
    (L40S, ONE_DOCUMENT, BF16, 128, "sdpa", ON_A100_PUBLISHED),
    (L40S, DOCUMENTS, BF16, 128, "triton", ONE_LAUNCH),
    (L40S, DOCUMENTS, BF16, 256, "sdpa", "its tiles for head dims above 128"),
    (B200, ONE_DOCUMENT, BF16, 128, "cudnn", ON_B200_PUBLISHED),
    (B300, ONE_DOCUMENT, BF16, 128, "cudnn", ON_B200_PUBLISHED),
    (B200, ONE_DOCUMENT, BF16, 256, "sdpa", "it supports head dims up to 128, not 256"),
    (B200, DOCUMENTS, BF16, 128, "triton", ONE_LAUNCH),
    (RTX_5090, ONE_DOCUMENT, BF16, 128, "sdpa", ON_A100_PUBLISHED),
    (RTX_5090, DOCUMENTS, BF16, 256, "sdpa", "its tiles for head dims above 128"),
]


@pytest.mark.parametrize(
    ("machine", "features", "dtype", "head_dim", "kernel", "reason"),
    CHOICES,
    ids=lambda value: value.gpu if isinstance(value, Machine) else None,
)
def test_auto_chooses(machine, features, dtype, head_dim, kernel, reason):
    chosen = choose("auto", "cuda", dtype, head_dim, features, machine)
    assert chosen.name == kernel
    assert reason in chosen.reason


def test_a_deterministic_run_takes_the_fastest_kernel_with_a_fixed_order():
    def kernel(head_dim: int) -> str:
        return choose("auto", "cuda", BF16, head_dim, [Feature.DETERMINISM], H100).name

    assert kernel(128) == "triton"
    assert kernel(256) == "sdpa", "wide heads leave Triton's backward too few registers"


def order(machine: Machine, features=(), dtype=BF16, head_dim=128) -> tuple[str, ...]:
    mask = MaskKind.of(features)
    return preferences.auto_order("cuda", dtype, head_dim, features, mask, machine).names


def test_every_order_has_all_kernels_that_may_support_the_run():
    assert order(H100) == ("cudnn", "triton", "sdpa", "flash", "reference")
    assert order(H100, head_dim=256) == ("cudnn", "sdpa", "triton", "flash", "reference")
    assert order(H100, DOCUMENTS) == ("triton", "sdpa", "cudnn", "flash", "reference")
    assert order(A100) == ("flash", "sdpa", "cudnn", "triton", "reference")
    assert order(A100, DOCUMENTS) == ("triton", "flash", "sdpa", "cudnn", "reference")
    assert order(B200) == ("cudnn", "flash", "sdpa", "triton", "reference")
    assert order(H100, dtype=FP32) == order(A100, dtype=FP64) == ("sdpa", "reference")


@pytest.fixture
def flash_attn_4(monkeypatch):
    """Version 4 is in use on every GPU."""
    version = flash.FlashVersion(4, "flash-attn 4 is installed")
    for module in (choice, flash, preferences):
        monkeypatch.setattr(module, "flash_version", lambda *_: version)


def test_version_4_of_flash_attn_is_first_where_figures_are_published(flash_attn_4):
    """On one document on Blackwell; where others were measured, it comes after them."""
    assert order(B200) == ("flash", "cudnn", "sdpa", "triton", "reference")
    assert choose("auto", "cuda", BF16, 128, [], B200).name == "flash"
    assert choose("auto", "cuda", BF16, 128, DOCUMENTS, B200).name == "triton"
    for features, kernel in ((ONE_DOCUMENT, "cudnn"), (DOCUMENTS, "triton")):
        name, reason = choose("auto", "cuda", BF16, 128, features, H100)
        assert name == kernel
        assert "flash-attn 4 was not measured and comes after what was" in reason


def test_version_2_of_flash_attn_is_first_on_one_document_on_ampere():
    with_flash = gpu(A100.gpu, A100.capability, flash_2="2.8.3")
    assert choose("auto", "cuda", BF16, 128, [], with_flash).name == "flash"
    assert choose("auto", "cuda", BF16, 128, DOCUMENTS, with_flash).name == "triton"


def test_a_measurement_of_this_very_gpu_comes_before_that_of_its_generation(monkeypatch):
    own = Measured("NVIDIA H200", BF16, MaskKind.CAUSAL, {"flash": 1.0, "cudnn": 2.0}, "a test")
    monkeypatch.setattr(preferences, "MEASURED", (*preferences.MEASURED, own))
    with_flash = gpu("NVIDIA H200", (9, 0), flash_2="2.8.3")
    name, reason = choose("auto", "cuda", BF16, 128, [], with_flash)
    assert name == "flash"
    assert "as measured (a test)" in reason
    assert "was not measured" not in reason
    assert ON_H100 in choose("auto", "cuda", FP16, 128, [], with_flash).reason


def test_cudnn_is_last_of_the_fused_kernels_for_documents():
    """Its plans for the shapes of each new pack are not in its times."""
    milliseconds = {"cudnn": 1.0, "sdpa": 3.0, "triton": 2.0}
    entry = Measured("NVIDIA X", BF16, MaskKind.SPARSE, milliseconds, "a test")
    assert entry.order == ("triton", "sdpa", "cudnn", "reference")


def test_without_a_measurement_of_the_device_the_reason_says_so():
    unmeasured = f"no measurement for {A100.gpu} in torch.bfloat16 with a causal mask: "
    assert choose("auto", "cuda", BF16, 128, [], A100).reason.startswith(unmeasured)
    reason = choose("auto", "cpu", FP16, 64).reason
    assert "no measurement for cpu in torch.float16 with a causal mask" in reason


# ---- stripes ----

WIDTHS = [
    ("cudnn", MaskKind.CAUSAL, (WIDEST,)),
    ("sdpa", MaskKind.CAUSAL, (WIDEST,)),
    ("triton", MaskKind.CAUSAL, (WIDEST,)),
    ("flash", MaskKind.CAUSAL, (WIDEST,)),
    ("reference", MaskKind.CAUSAL, ()),
    ("cudnn", MaskKind.SPARSE, ()),
    ("sdpa", MaskKind.SPARSE, ()),
    ("triton", MaskKind.SPARSE, (128,)),
    ("flash", MaskKind.SPARSE, ()),
    ("reference", MaskKind.SPARSE, ()),
]


@pytest.mark.parametrize("machine", [H100, H200, A100, B200], ids=lambda machine: machine.gpu)
@pytest.mark.parametrize(("kernel", "mask", "widths"), WIDTHS)
def test_stripe_widths_on_a_gpu_follow_the_measurements(kernel, mask, widths, machine):
    actual = stripe_widths(kernel, "cuda", mask, machine)
    assert actual.widths == widths
    if kernel in ("flash", "reference"):
        assert f"not measured with {kernel}" in actual.reason
    elif machine is H100:
        assert f"fastest with {kernel} and {mask.value}, as measured" in actual.reason
        assert actual.reason.endswith("(commit 58ca893, torch 2.11.0+cu130)")
    else:
        assert ON_H100 in actual.reason


@pytest.mark.parametrize("mask", MaskKind)
def test_stripe_widths_on_a_cpu_do_not_depend_on_the_mask(mask):
    widths = (2048, 1024, 512, 256, 128)
    assert stripe_widths("sdpa", "cpu", mask) == (widths, "fastest with sdpa")
    assert stripe_widths("reference", "cpu", mask).widths == ()


def _visited_tiles(key_ranges: KeyRanges, queries: int = 128, keys: int = 64) -> int:
    """Count the tiles in which a kernel with such blocks finds anything visible."""
    lo, hi = key_ranges.lo.view(-1, queries), key_ranges.hi.view(-1, queries)
    first = torch.where(hi > lo, lo, torch.iinfo(lo.dtype).max).amin(1)
    last = torch.where(hi > lo, hi, 0).amax(1)
    return int(((last + keys - 1) // keys - first // keys).clamp(min=0).sum())


def _critical_path(layout: Layout, window: int) -> int:
    """Sum the tiles of each hop's slowest rank."""
    ranks, mask = range(layout.ring_size), Mask(window)
    return sum(
        max(
            _visited_tiles(hop_key_ranges(layout, r, (r - hop) % layout.ring_size, mask))
            for r in ranks
        )
        for hop in ranks
    )


@pytest.mark.parametrize("window", [256, 512, 1024, 2048])
def test_stripes_of_128_visit_fewer_tiles_of_a_window_than_others(window):
    """No window was measured; this is the ground for taking the widths of documents.

    Single tokens spread each query tile over eight times as many positions. With the widest stripes
    ranks differ within a hop, which costs more the further a window reaches into other stripes.
    """
    ranks, tokens = 8, 4096

    def tiles(stripe: int) -> int:
        return _critical_path(Layout("striped", ranks * tokens, ranks, stripe), window)

    assert tiles(128) < 0.9 * tiles(1)
    if window >= tokens // 2:
        assert tiles(128) < 0.9 * tiles(tokens // 2)
