"""What ``auto`` takes and says, and what a vendor's kernel lacks on a machine."""

import pytest
import torch

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import KERNELS, choose, measured
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.measured import MEASURED, MaskKind, Measured
from megatron_ring.kernels.attention.support import Feature, Unsupported, of_tensors, support

BARE = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002)
AMPERE = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 91002, "2.8.3")
HOPPER = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002, "2.8.3", flash_3=True, triton=True)


def auto(machine: Machine, *features: Feature, dtype: torch.dtype = torch.bfloat16):
    return choose("auto", "cuda", dtype, 128, features, machine)


def test_on_a_cpu_it_is_what_was_measured():
    for mask, features in ((MaskKind.CAUSAL, []), (MaskKind.SPARSE, [Feature.WINDOW])):
        (entry,) = (
            one
            for one in MEASURED
            if (one.device, one.dtype, one.mask) == ("cpu", torch.float32, mask)
        )
        name, reason = choose("auto", "cpu", torch.float32, 64, features)
        assert name == entry.order[0] == "sdpa"
        assert (
            reason
            == f"sdpa is the fastest in torch.float32 with {mask.value}, as measured ({entry.source})"
        )


def test_every_line_of_the_table_is_of_kernels_that_could_be_measured_so():
    for entry in MEASURED:
        device = "cpu" if entry.device == "cpu" else "cuda"
        asked = {
            *of_tensors(entry.dtype, 64),
            *([Feature.DOCUMENTS] if entry.mask is MaskKind.SPARSE else []),
        }
        assert set(entry.order) <= set(KERNELS)
        assert entry.source
        assert not any(
            isinstance(support(name, device, one), Unsupported)
            for name in entry.order
            for one in asked
        )
    assert len({(entry.device, entry.dtype, entry.mask) for entry in MEASURED}) == len(MEASURED)


def test_a_gpu_is_found_by_how_its_name_begins(monkeypatch):
    entry = Measured(
        "NVIDIA H100",
        torch.bfloat16,
        MaskKind.CAUSAL,
        {"sdpa": 2.0, "triton": 1.0},
        "here, by a test",
    )
    assert entry.order == ("triton", "sdpa", "reference")
    monkeypatch.setattr(measured, "MEASURED", (entry,))
    assert auto(HOPPER).name == "triton"
    assert auto(HOPPER).reason.startswith(
        "triton is the fastest in torch.bfloat16 with a causal mask, as measured (he"
    )
    assert auto(HOPPER, Feature.DOCUMENTS).reason.startswith(
        "no measurement for NVIDIA H100 80GB HBM3"
    )
    assert auto(AMPERE).reason.startswith(
        "no measurement for NVIDIA A100-SXM4-80GB in torch.bfloat16 with a causal"
    )


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        (HOPPER, [], "flash"),
        (HOPPER, [Feature.DOCUMENTS], "flash"),
        (AMPERE, [], "flash"),
        (Machine("NVIDIA H200", (9, 0), 91002, "2.8.3"), [], "cudnn"),
        (BARE, [], "cudnn"),
        (BARE, [Feature.WINDOW], "sdpa"),
        (HOPPER, [Feature.DETERMINISM], "flash"),
        (BARE, [Feature.DETERMINISM], "sdpa"),
        (Machine("Tesla V100", (7, 0), 91002), [], "sdpa"),
    ],
)
def test_where_nothing_was_measured_the_order_is_that_of_published_figures(
    machine, features, expected
):
    name, reason = auto(machine, *features)
    assert name == expected
    assert "the order is that of published figures" in reason


def test_what_it_passed_over_it_names():
    reason = auto(BARE, dtype=torch.float32).reason
    assert "flash cannot do float32: it computes in elements of two bytes" in reason
    assert (
        "flash cannot run here: flash-attn 2 is not installed, and flash-attn 3 (the package"
        in reason
    )
    name, reason = auto(HOPPER, dtype=torch.float64)
    assert name == "reference"
    assert "sdpa cannot do float64: torch's fused operators on cuda do not take it" in reason


def test_the_version_of_flash_attn_is_said():
    assert "flash-attn 3 is installed and made for compute capability 9.0" in auto(HOPPER).reason
    assert (
        "flash-attn 2.8.3: flash-attn 3 (the package flash_attn_3) is not installed"
        in auto(AMPERE).reason
    )


LACKS = [
    (
        "flash",
        BARE,
        64,
        r"cannot run here: flash-attn 2 is not installed, and .* pip install -U flash-attn --no-build-",
    ),
    (
        "flash",
        Machine("V100", (7, 0), 91002, "2.8.3"),
        64,
        "compute capability 8.0, and this one has 7.0. Set --attenti",
    ),
    ("flash", Machine(), 64, "it needs a GPU of compute capability 8.0, and there is none"),
    (
        "cudnn",
        Machine("H100", (9, 0)),
        64,
        "torch is built without cuDNN. Install a torch for CUDA with cuDNN 9.0",
    ),
    ("cudnn", Machine("H100", (9, 0), 8907), 64, r"cuDNN 8\.9\.7 is older than 9\.0"),
    ("cudnn", Machine("V100", (7, 0), 91002), 64, "compute capability 8.0, and this one has 7.0"),
    (
        "cudnn",
        AMPERE,
        192,
        "head sizes up to 128, not 192; for larger ones it needs compute capability 9.0 and cuDNN",
    ),
    (
        "triton",
        BARE,
        64,
        r"triton is not installed\. pip install triton, or set --attention-kernel auto",
    ),
]


@pytest.mark.parametrize(("kernel", "machine", "head_dim", "said"), LACKS)
def test_what_is_missing_is_named(kernel, machine, head_dim, said):
    with pytest.raises(
        KernelUnavailable,
        match=rf"attention_kernel {kernel} cannot run here: .*{said.split(': ')[-1]}",
    ):
        choose(kernel, "cuda", torch.bfloat16, head_dim, [], machine)


def test_nothing_is_missing_where_the_device_is_another():
    with pytest.raises(KernelUnavailable) as refused:
        choose("flash", "cpu", torch.bfloat16, 64)
    assert len(refused.value.problems) == 1
    assert "it exists for cuda, not cpu" in str(refused.value)


def test_heads_of_256_need_hopper_for_cudnn():
    assert choose("cudnn", "cuda", torch.bfloat16, 256, [], HOPPER).name == "cudnn"


def test_this_machine_is_looked_up():
    assert Machine.here().capability == (0, 0) or torch.cuda.is_available()
    assert Machine.here().named("cpu") == "cpu"
    assert AMPERE.named("cuda") == "NVIDIA A100-SXM4-80GB"
