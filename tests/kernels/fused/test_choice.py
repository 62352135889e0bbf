"""Who computes what, and what is said of it. Liger-Kernel is installed where tests run; the others are stood in for."""

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.fused import liger
from megatron_ring.kernels.fused.choice import choose, missing
from megatron_ring.kernels.fused.operations import TORCH
from megatron_ring.kernels.fused.support import COLUMNS, LIBRARIES, OFFERS, PREFERENCE, Operation
from tests.kernels.fused.stand_ins import APEX, FLASH_ATTN, stood_in

LLAMA = [
    Operation.RMS_NORM,
    Operation.ROPE,
    Operation.SWIGLU,
    Operation.CROSS_ENTROPY,
    Operation.ADAMW,
]
VERSIONS = {"flash-attn": "2.8.3", "apex": "0.1"}


@pytest.fixture
def installed(monkeypatch):
    """``installed(*names)``: these libraries are there and no others."""

    def install(*names: str) -> None:
        def version(distribution: str) -> str:
            if distribution not in found:
                raise importlib.metadata.PackageNotFoundError(distribution)
            return found[distribution]

        found = {LIBRARIES[name].distribution: VERSIONS.get(name, "0.8.5") for name in names}
        for name, modules in {"flash-attn": FLASH_ATTN, "apex": APEX}.items():
            if name in names:
                stood_in(monkeypatch, modules, LIBRARIES[name].module)
        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


def libraries(
    asked: str, wanted=LLAMA, device="cuda", dtype=torch.bfloat16, **options
) -> list[str]:
    return [settled.library for settled in choose(asked, device, dtype, wanted, **options).settled]


def refused(asked: str, wanted=LLAMA, device="cuda", dtype=torch.bfloat16) -> str:
    with pytest.raises(KernelUnavailable) as error:
        choose(asked, device, dtype, wanted)
    (said,) = error.value.problems
    return said


def test_auto_on_a_cpu_is_torch_and_says_why():
    chosen = choose("auto", "cpu", torch.bfloat16, LLAMA)
    assert chosen.operations == TORCH
    assert chosen.in_words() == [
        "torch for RMSNorm, RoPE, SwiGLU, cross entropy, AdamW: liger, flash-attn, apex: for cuda alone, and this "
        "device is a cpu"
    ]


def test_torch_asked_for_is_torch_everywhere():
    for device in ("cpu", "cuda"):
        assert choose("torch", device, torch.float64, LLAMA).in_words() == [
            "torch for RMSNorm, RoPE, SwiGLU, cross entropy, AdamW: asked for"
        ]


def test_auto_on_cuda_is_the_first_that_is_installed(installed):
    installed("liger", "flash-attn")
    chosen = choose("auto", "cuda", torch.bfloat16, LLAMA)
    assert chosen.operations.norm is liger.norm
    assert chosen.operations.cross_entropy is liger.cross_entropy
    assert chosen.in_words()[0] == (
        "liger for RMSNorm, RoPE, SwiGLU, cross entropy: installed, and whether it is the fastest nobody has measured; "
        "tested in Triton's interpreter, and never run on such a device"
    )
    installed("flash-attn")
    assert libraries("auto") == ["flash-attn"] * 4 + ["torch"]
    installed()
    assert libraries("auto") == ["torch"] * 5


def test_what_was_asked_for_computes_what_it_can_and_torch_the_rest(installed):
    installed("liger")
    first, second = choose("liger", "cuda", torch.bfloat16, LLAMA).in_words()
    assert first.startswith("liger for RMSNorm, RoPE, SwiGLU, cross entropy: asked for; tested in")
    assert second == "torch for AdamW: liger: it has none"


def test_a_split_vocabulary_is_torchs(installed):
    installed("liger", "flash-attn")
    (said,) = choose("auto", "cuda", torch.bfloat16, [Operation.SPLIT_CROSS_ENTROPY]).in_words()
    assert said.startswith(
        "torch for cross entropy of a split vocabulary: liger, flash-attn: it meets the other ranks"
    )


def test_sums_that_are_to_be_the_same_in_every_run_are_not_timed(installed):
    installed("flash-attn")
    assert libraries("auto", deterministic=True) == [
        "torch",
        "flash-attn",
        "flash-attn",
        "flash-attn",
        "torch",
    ]


def test_apex_in_float32_has_norms_and_rope(installed):
    installed("apex")
    assert libraries("apex", dtype=torch.float32) == ["apex", "apex", "torch", "torch", "torch"]


def test_a_library_that_can_do_nothing_of_it_is_refused_with_every_reason(installed):
    installed("apex")
    said = refused("apex")
    assert said.startswith(
        "fused_operations apex is not to be had: RMSNorm: smaller types are rounded before the"
    )
    for operation in ("RoPE", "SwiGLU", "cross entropy", "AdamW"):
        assert f"; {operation}: " in said
    assert said.endswith("Set --fused-operations auto or torch.")


def test_float64_is_torchs_alone(installed):
    installed("liger")
    assert "RMSNorm: it computes in float32" in refused("liger", dtype=torch.float64)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_missing_says_how_to_get_it(name, installed):
    installed()
    assert refused(name) == (
        f"fused_operations {name} is not to be had: not installed ({LIBRARIES[name].install}). "
        "Set --fused-operations auto or torch."
    )


def test_on_a_cpu_no_library_is_looked_for():
    assert refused("liger", device="cpu") == (
        "fused_operations liger is not to be had: for cuda alone, and this device is a cpu. "
        "Set --fused-operations auto or torch."
    )


def test_a_library_that_is_too_old_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: "0.8.3")
    assert missing(LIBRARIES["liger"]) == (
        "liger-kernel 0.8.3 is older than 0.8.5 (pip install 'liger-kernel>=0.8.5')"
    )


def test_the_apex_that_pip_finds_is_not_taken_for_nvidias(installed, monkeypatch):
    installed("apex")
    for name in [*APEX, "apex.normalization", "apex.transformer", LIBRARIES["apex"].module]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    assert "it cannot be imported" in missing(LIBRARIES["apex"])
    assert "is another project" in missing(LIBRARIES["apex"])


def test_the_table_is_whole():
    assert set(PREFERENCE) == set(COLUMNS) == {"torch", *LIBRARIES}
    for operation, offers in OFFERS.items():
        assert offers["torch"].dtypes > {torch.float32, torch.bfloat16, torch.float16}, operation
        for offer in offers.values():
            assert bool(offer.proof) == bool(offer.dtypes)
            assert offer.reason or torch.float64 in offer.dtypes, "what is refused has a reason"
