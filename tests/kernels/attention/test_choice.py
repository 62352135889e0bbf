import pytest
import torch

from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import KERNELS, choose


def test_auto_takes_torchs_fused_attention_and_says_why():
    assert choose("auto", "cpu", torch.float32, 64) == (
        "sdpa",
        "torch's fused attention, the fastest on cpu in torch.float32",
    )


@pytest.mark.parametrize(
    ("device_type", "dtype", "head_dim", "reason"),
    [
        ("mps", torch.float32, 64, "torch's fused attention with log-sum-exp exists for cpu and cuda, not mps"),
        (
            "cuda",
            torch.float64,
            64,
            "on cuda it takes fp32, bf16 and fp16 and head sizes up to 256 that 8 divides, not torch.float64, 64",
        ),
        (
            "cuda",
            torch.bfloat16,
            512,
            "on cuda it takes fp32, bf16 and fp16 and head sizes up to 256 that 8 divides, not torch.bfloat16, 512",
        ),
        (
            "cuda",
            torch.bfloat16,
            60,
            "on cuda it takes fp32, bf16 and fp16 and head sizes up to 256 that 8 divides, not torch.bfloat16, 60",
        ),
    ],
)
def test_where_sdpa_cannot_serve_auto_falls_back_and_a_request_fails(device_type, dtype, head_dim, reason):
    assert choose("auto", device_type, dtype, head_dim) == ("reference", f"sdpa cannot serve here: {reason}")
    with pytest.raises(KernelUnavailable) as raised:
        choose("sdpa", device_type, dtype, head_dim)
    assert str(raised.value) == (
        f"attention_kernel sdpa cannot serve: {reason}. Set --attention-kernel auto or reference."
    )


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_asked_for_by_name_is_taken(name):
    assert choose(name, "cpu", torch.bfloat16, 64) == (name, "asked for")
