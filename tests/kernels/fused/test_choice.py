"""Which library computes which operation; Liger-Kernel is installed, the others have stand-ins."""

import importlib.metadata
import sys
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import torch

from megatron_ring.config import TrainingConfig
from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.fused import liger, triton
from megatron_ring.kernels.fused.choose_libraries import choose, missing
from megatron_ring.kernels.fused.libraries import COLUMNS, LIBRARIES, OFFERS, PREFERENCE, Operation
from megatron_ring.kernels.fused.operations import TORCH
from megatron_ring.kernels.selection import Validation
from tests.kernels.fused.stand_ins import APEX, FLASH_ATTN, import_with_stand_ins

LLAMA = [
    Operation.RMS_NORM,
    Operation.ROPE,
    Operation.SWIGLU,
    Operation.CROSS_ENTROPY,
    Operation.ADAMW,
]
VERSIONS = {"triton": "3.6.0", "liger": "0.8.5", "flash-attn": "2.8.3", "apex": "0.1"}
STAND_INS = {"flash-attn": FLASH_ATTN, "apex": APEX}


@pytest.fixture
def install(monkeypatch):
    """``install(*names)``: these libraries are installed and no others."""

    def install(*names: str) -> None:
        versions = {LIBRARIES[name].distribution: VERSIONS[name] for name in names}

        def version(distribution: str) -> str:
            if distribution not in versions:
                raise importlib.metadata.PackageNotFoundError(distribution)
            return versions[distribution]

        for name in STAND_INS.keys() & set(names):
            import_with_stand_ins(monkeypatch, STAND_INS[name], LIBRARIES[name].module)
        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


def libraries(
    requested: str, required=LLAMA, device="cuda", dtype=torch.bfloat16, **options
) -> list[str]:
    choice = choose(requested, device, dtype, required, **options)
    return [selected.library for selected in choice.choices]


def refusal(requested: str, required=LLAMA, device="cuda", dtype=torch.bfloat16) -> str:
    """Return the message of the error."""
    with pytest.raises(KernelUnavailable) as error:
        choose(requested, device, dtype, required)
    (message,) = error.value.problems
    return message


def test_the_option_offers_every_library():
    offered = get_args(get_type_hints(TrainingConfig)["fused_operations"])
    assert set(offered) == {"auto", *COLUMNS}


def test_auto_on_a_cpu_is_torch_with_the_reason():
    choice = choose("auto", "cpu", torch.bfloat16, LLAMA)
    assert choice.operations == TORCH
    (line,) = choice.describe()
    libraries, reason = line.split(": ", maxsplit=1)
    assert libraries == "torch for RMSNorm, RoPE, SwiGLU, cross entropy, AdamW"
    assert reason.startswith("triton, liger, flash-attn, apex: CUDA only")


def test_torch_can_be_requested_on_every_device():
    for device in ("cpu", "cuda"):
        assert choose("torch", device, torch.float64, LLAMA).describe() == [
            "torch for RMSNorm, RoPE, SwiGLU, cross entropy, AdamW: requested"
        ]


def test_auto_on_cuda_is_the_first_installed_library(install):
    install("liger", "flash-attn")
    choice = choose("auto", "cuda", torch.bfloat16, LLAMA)
    assert choice.operations.norm is liger.norm
    assert choice.operations.cross_entropy is liger.cross_entropy
    line = choice.describe()[0]
    assert line.startswith("liger for RMSNorm, RoPE, SwiGLU, cross entropy: ")
    assert "not been measured" in line
    assert line.endswith(Validation.INTERPRETED.caveat)
    install("triton", "liger")
    assert libraries("auto") == ["triton"] * 3 + ["liger", "torch"]
    install("flash-attn")
    assert libraries("auto") == ["flash-attn"] * 4 + ["torch"]
    install()
    assert libraries("auto") == ["torch"] * 5


def test_our_own_kernels_replace_the_operations_around_rmsnorm_and_rope(install):
    install("triton")
    operations = choose("auto", "cuda", torch.bfloat16, LLAMA).operations
    assert operations.residual_norm is triton.residual_norm
    assert operations.rope_and_pack is triton.rope_and_pack
    gpt2 = choose("auto", "cuda", torch.bfloat16, [Operation.LAYER_NORM]).operations
    assert gpt2 == TORCH


def test_a_requested_library_computes_what_it_supports_and_torch_the_rest(install):
    install("liger")
    first, second = choose("liger", "cuda", torch.bfloat16, LLAMA).describe()
    assert first.startswith("liger for RMSNorm, RoPE, SwiGLU, cross entropy: requested; tested in")
    assert second == "torch for AdamW: liger: it has no such kernel"


def test_the_cross_entropy_of_a_split_vocabulary_is_torchs(install):
    install("liger", "flash-attn")
    choice = choose("auto", "cuda", torch.bfloat16, [Operation.SPLIT_CROSS_ENTROPY])
    (line,) = choice.describe()
    reason = OFFERS[Operation.SPLIT_CROSS_ENTROPY]["liger"].reason
    assert f"liger, flash-attn: {reason}" in line
    assert line.startswith("torch for cross entropy of a split vocabulary: ")


def test_deterministic_runs_do_not_use_norms_that_are_timed(install):
    install("flash-attn")
    expected = ["torch", "flash-attn", "flash-attn", "flash-attn", "torch"]
    assert libraries("auto", deterministic=True) == expected


def test_apex_computes_norms_and_rope_in_float32(install):
    install("apex")
    assert libraries("apex", dtype=torch.float32) == ["apex", "apex", "torch", "torch", "torch"]


def test_a_library_that_supports_no_operation_is_refused_with_every_reason(install):
    install("apex")
    message = refusal("apex")
    norm = OFFERS[Operation.RMS_NORM]["apex"].reason
    assert message.startswith(f"fused_operations apex is unavailable: RMSNorm: {norm}")
    for operation in ("RoPE", "SwiGLU", "cross entropy", "AdamW"):
        assert f"; {operation}: " in message
    assert message.endswith("Set --fused-operations auto or torch.")


def test_only_torch_supports_float64(install):
    install("liger")
    assert "RMSNorm: it computes in float32" in refusal("liger", dtype=torch.float64)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_not_installed_is_refused_with_the_way_to_install_it(name, install):
    install()
    message = refusal(name)
    assert message.startswith(f"fused_operations {name} ")
    assert f"not installed ({LIBRARIES[name].install})" in message
    assert message.endswith("Set --fused-operations auto or torch.")


def test_on_a_cpu_the_device_is_the_only_reason():
    message = refusal("liger", device="cpu")
    assert "CUDA only, and this device is a cpu" in message
    assert "liger-kernel" not in message
    assert message.endswith("Set --fused-operations auto or torch.")


def test_a_library_that_is_too_old_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda distribution: "0.8.3")
    reason = missing(LIBRARIES["liger"])
    assert "liger-kernel 0.8.3 is older than 0.8.5" in reason
    assert "pip install 'liger-kernel>=0.8.5'" in reason


def test_the_apex_that_pip_installs_is_not_mistaken_for_nvidias(install, monkeypatch):
    install("apex")
    for name in [*APEX, "apex.normalization", "apex.transformer", LIBRARIES["apex"].module]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    assert "it cannot be imported" in missing(LIBRARIES["apex"])
    assert "is another project" in missing(LIBRARIES["apex"])


def test_the_table_is_complete():
    assert set(PREFERENCE) == set(COLUMNS) == {"torch", *LIBRARIES}
    for operation, offers in OFFERS.items():
        assert offers["torch"].dtypes > {torch.float32, torch.bfloat16, torch.float16}, operation
        for offer in offers.values():
            assert bool(offer.validation) == bool(offer.dtypes)
            assert offer.reason or torch.float64 in offer.dtypes, "a refusal has a reason"
