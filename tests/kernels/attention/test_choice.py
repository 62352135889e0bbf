"""Which kernel ``auto`` chooses and its reason, and what vendors' kernels require of a machine."""

import re
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch

from megatron_ring.config import ParallelConfig
from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import KERNELS, choose
from megatron_ring.kernels.attention.flash import PINNED_4
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import MEASURED, MEASURED_STRIPES, MaskKind
from megatron_ring.kernels.attention.registry import (
    KERNEL_SPECS,
    Feature,
    features_of_tensors,
    support,
)
from megatron_ring.kernels.selection import Unsupported

WITHOUT_LIBRARIES = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002)
AMPERE = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 91002, "2.8.3")
WITH_TRITON = replace(WITHOUT_LIBRARIES, triton=True)
HOPPER = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002, "2.8.3", flash_3=True, triton=True)


def auto(machine: Machine, *features: Feature, dtype: torch.dtype = torch.bfloat16):
    return choose("auto", "cuda", dtype, 128, features, machine)


def test_the_option_offers_every_registered_kernel():
    offered = get_args(get_type_hints(ParallelConfig)["attention_kernel"])
    assert set(offered) == {"auto", *KERNEL_SPECS}


def test_on_a_cpu_auto_follows_the_measurements():
    for mask, features in ((MaskKind.CAUSAL, []), (MaskKind.SPARSE, [Feature.WINDOW])):
        (entry,) = (
            one
            for one in MEASURED
            if (one.device, one.dtype, one.mask) == ("cpu", torch.float32, mask)
        )
        name, reason = choose("auto", "cpu", torch.float32, 64, features)
        assert name == entry.order[0] == "sdpa"
        measured = "as measured with documents" if features else "as measured"
        assert f"torch.float32 with {mask.value}, {measured} ({entry.source})" in reason


def test_every_measurement_is_of_kernels_that_support_it():
    for entry in MEASURED:
        device = "cpu" if entry.device == "cpu" else "cuda"
        required = features_of_tensors(entry.dtype, entry.head_dim)
        if entry.mask is MaskKind.SPARSE:
            required.add(Feature.DOCUMENTS)
        assert set(entry.order) <= set(KERNELS)
        assert entry.source
        cells = [support(name, device, one) for name in entry.order for one in required]
        assert not any(isinstance(cell, Unsupported) for cell in cells)
    assert len({(entry.device, entry.dtype, entry.mask) for entry in MEASURED}) == len(MEASURED)
    stripes = {(entry.device, entry.kernel, entry.mask) for entry in MEASURED_STRIPES}
    assert len(stripes) == len(MEASURED_STRIPES)
    assert {kernel for _, kernel, _ in stripes} <= set(KERNELS)


def test_the_reason_names_the_kernels_that_were_passed_over():
    deterministic = auto(WITH_TRITON, Feature.DETERMINISM)
    assert deterministic.name == "triton"
    assert "cudnn does not support bitwise determinism: " in deterministic.reason
    without_triton = auto(WITHOUT_LIBRARIES, Feature.DOCUMENTS)
    assert without_triton.name == "sdpa"
    assert "triton cannot run here: triton is not installed" in without_triton.reason
    name, reason = auto(HOPPER, dtype=torch.float64)
    assert name == "reference"
    assert "sdpa does not support float64: " in reason


def test_the_reason_has_the_version_of_flash_attn():
    def by_name(machine: Machine) -> str:
        return choose("flash", "cuda", torch.bfloat16, 128, [], machine).reason

    assert by_name(HOPPER).endswith("flash-attn 3 is used")
    version_2 = "flash-attn 2.8.3 is used; flash-attn 3 (the package flash_attn_3) is not installed"
    assert version_2 in by_name(AMPERE)
    with_4 = Machine("NVIDIA B200", (10, 0), 91002, flash_4=PINNED_4)
    reason = choose("flash", "cuda", torch.bfloat16, 128, [], with_4).reason
    assert (
        f"flash-attn {PINNED_4} is used; flash-attn 3 (the package flash_attn_3) is not" in reason
    )


V100 = Machine("V100", (7, 0), 91002, "2.8.3")
UNAVAILABLE = [
    (
        "flash",
        WITHOUT_LIBRARIES,
        64,
        "flash-attn 3 (the package flash_attn_3) is not installed; flash-attn 4 (the package "
        "flash-attn-4) is not installed; flash-attn 2 is not installed. "
        "pip install -e '.[flash]' (flash-attn 4), or set --attention-kernel auto",
    ),
    ("flash", V100, 64, "compute capability 8.0, and this one has 7.0. Set --attention-kernel"),
    ("flash", Machine(), 64, "it requires a GPU of compute capability 8.0, and there is none"),
    (
        "cudnn",
        Machine("H100", (9, 0)),
        64,
        "torch is built without cuDNN. Install a torch for CUDA with cuDNN 9.0",
    ),
    ("cudnn", Machine("H100", (9, 0), 8907), 64, "cuDNN 8.9.7 is older than 9.0"),
    ("cudnn", V100, 64, "compute capability 8.0, and this one has 7.0"),
    (
        "cudnn",
        AMPERE,
        192,
        "head dims up to 128, not 192; larger ones require compute capability 9.0 and cuDNN 9.10",
    ),
    (
        "triton",
        WITHOUT_LIBRARIES,
        64,
        "triton is not installed. pip install triton, or set --attention-kernel auto",
    ),
    ("triton", replace(V100, triton=True), 64, "compute capability 8.0, and this one has 7.0"),
    (
        "triton",
        Machine("NVIDIA L40S", (8, 9), 91002, triton=True),
        192,
        "its tiles for head dims above 128, here 192, exceed the shared memory of compute "
        "capability 8.9. Set --attention-kernel sdpa, or auto",
    ),
]


@pytest.mark.parametrize(("kernel", "machine", "head_dim", "part"), UNAVAILABLE)
def test_a_kernel_that_cannot_run_on_a_machine_is_refused(kernel, machine, head_dim, part):
    message = rf"attention_kernel {kernel} cannot run here: .*{re.escape(part)}"
    with pytest.raises(KernelUnavailable, match=message):
        choose(kernel, "cuda", torch.bfloat16, head_dim, [], machine)


def test_on_another_device_only_the_device_is_the_reason():
    with pytest.raises(KernelUnavailable) as refused:
        choose("flash", "cpu", torch.bfloat16, 64)
    assert len(refused.value.problems) == 1
    assert "it runs on cuda, not cpu" in str(refused.value)


def test_cudnn_supports_a_head_dim_of_256_on_hopper():
    assert choose("cudnn", "cuda", torch.bfloat16, 256, [], HOPPER).name == "cudnn"


def test_the_machine_is_this_one_by_default():
    assert Machine.here().capability == (0, 0) or torch.cuda.is_available()
    assert Machine.here().device_name("cpu") == "cpu"
    assert AMPERE.device_name("cuda") == "NVIDIA A100-SXM4-80GB"
