"""The calls of flash-attn 4, held to the library itself: its kernels are compiled, and not run.

Without a GPU. The tensors have a device, shape and strides, and no data. What the kernels compute
is covered by a stand-in in test_flash.py, and its parameters are compared with the library's here.
"""

import inspect
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_ring.kernels.attention import flash
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.tiles import Window
from megatron_ring.kernels.selection import installed_version
from tests.kernels.attention import flash_stand_ins

pytestmark = pytest.mark.flash4

TOKENS, KEYS = 8192, 4096
CAUSAL = Window(right=0)


@pytest.fixture(scope="module")
def interface() -> ModuleType:
    """Import the library as on a machine with one H100."""
    found = installed_version("flash-attn-4") or "none"
    if found != flash.PINNED_4:
        pytest.skip(f"flash-attn-4 {flash.PINNED_4} is required, found {found}: make test-flash4")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
        monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
        monkeypatch.setenv("FLASH_ATTENTION_NUM_SMS", "132")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        from flash_attn.cute import interface

        with FakeTensorMode(allow_non_fake_inputs=True):
            yield interface


def inputs(heads: int, groups: int, head_dim: int, dtype: torch.dtype):
    """Return q_THD, k_UGD and v_UGD as slices of a fused projection, without data."""

    def slice_of_projection(tokens: int, count: int) -> torch.Tensor:
        strides = ((heads + 2 * groups) * head_dim, head_dim, 1)
        return torch.empty_strided((tokens, count, head_dim), strides, dtype=dtype, device="cuda")

    return (
        slice_of_projection(TOKENS, heads),
        slice_of_projection(KEYS, groups),
        slice_of_projection(KEYS, groups),
    )


def lengths(sequences: int) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """Return the cumulative lengths of a pack, and the longest sequences."""
    cu_seqlens = [torch.empty(sequences + 1, dtype=torch.int32, device="cuda") for _ in range(2)]
    return cu_seqlens, (2048, 1024)


# Heads, key-value heads, head dim, dtype, window, deterministic, sequences. Above 256 sequences the
# library finds a tile's sequence in another way.
CALLS = {
    "grouped heads": (32, 8, 128, torch.bfloat16, CAUSAL, False, 8),
    "full rectangles": (4, 4, 64, torch.float16, Window(), True, 8),
    "sliding window": (8, 1, 96, torch.bfloat16, Window(100, 0), False, 300),
    "one edge of a window": (4, 4, 128, torch.bfloat16, Window(left=100), True, 8),
    "head dim 192": (4, 2, 192, torch.float16, Window(100, 0), True, 8),
    "head dim 256": (4, 2, 256, torch.bfloat16, CAUSAL, True, 8),
}


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "dtype", "window", "deterministic", "sequences"),
    CALLS.values(),
    ids=CALLS,
)
def test_the_kernels_of_a_call_compile_for_hopper(
    interface, heads, groups, head_dim, dtype, window, deterministic, sequences
):
    q, k, v = inputs(heads, groups, head_dim, dtype)
    arguments = (*lengths(sequences), window, 0.125)
    out, lse = flash._forward_4(q, k, v, *arguments)
    assert (out.dtype, out.shape, out.is_contiguous()) == (dtype, q.shape, True)
    assert (lse.dtype, lse.shape) == (torch.float32, (heads, TOKENS))
    assert lse.is_contiguous()
    gradients = flash._backward_4(torch.empty_like(q), q, k, v, out, lse, *arguments, deterministic)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert {x.dtype for x in gradients} == {dtype}
    # torch 2.13's own wrapper of these functions expects two.
    named = flash._arguments_4(*arguments)
    assert len(interface._flash_attn_fwd(q, k, v, **named, return_lse=True)) == 5


@pytest.mark.parametrize("name", ["_flash_attn_fwd", "_flash_attn_bwd"])
def test_the_stand_ins_have_the_librarys_parameters(interface, name):
    def parameters(module) -> dict:
        found = inspect.signature(getattr(module, name)).parameters
        return {key: parameter.default for key, parameter in found.items()}

    assert parameters(flash_stand_ins) == parameters(interface)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3), (11, 0)], ids=str)
def test_it_is_available_for_the_head_dims_that_the_library_takes(interface, capability):
    def takes(head_dim: int) -> bool:
        try:
            interface._validate_head_dims(head_dim, head_dim, capability[0], 8)
        except AssertionError:
            return False
        return True

    machine = Machine("a GPU", capability, flash_4=flash.PINNED_4)
    head_dims = range(8, 257, 8)
    available = [dim for dim in head_dims if flash.unavailable(machine, dim, False) is None]
    # 256 has no windows on 10.x and 11.x (the next test).
    refused_here = {256} if capability[0] > 9 else set()
    assert available == [dim for dim in head_dims if takes(dim) and dim not in refused_here]


def test_its_backward_has_no_window_for_head_dim_256_on_blackwell(interface, monkeypatch):
    monkeypatch.setattr(interface, "_get_device_arch", lambda: 100)
    q, k, v = inputs(4, 2, 256, torch.bfloat16)
    lse = torch.empty(4, TOKENS, device="cuda")
    with pytest.raises(AssertionError, match="head_dim=256 does not support local"):
        flash._backward_4(q, q, k, v, q, lse, *lengths(8), Window(100, 0), 0.125, False)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (128, torch.float32, "inputs must be float16, bfloat16"),
        (100, torch.bfloat16, "divisible by 8"),
        (264, torch.bfloat16, "between 8 and 256"),
    ],
)
@pytest.mark.usefixtures("interface")
def test_it_refuses_what_the_support_table_refuses(head_dim, dtype, message):
    qkv = (torch.empty(TOKENS, heads, head_dim, dtype=dtype, device="cuda") for heads in (4, 2, 2))
    with pytest.raises(AssertionError, match=message):
        flash._forward_4(*qkv, *lengths(8), CAUSAL, 0.125)


@pytest.mark.parametrize(
    ("arch", "deterministic", "message"),
    [(80, False, "Unsupported compute capability"), (120, True, "not supported on SM 12.0")],
)
def test_its_backward_refuses_gpus_that_we_refuse(
    interface, monkeypatch, arch, deterministic, message
):
    monkeypatch.setattr(interface, "_get_device_arch", lambda: arch)
    q, k, v = inputs(4, 2, 128, torch.bfloat16)
    lse = torch.empty(4, TOKENS, device="cuda")
    with pytest.raises(AssertionError, match=message):
        flash._backward_4(q, q, k, v, q, lse, *lengths(8), CAUSAL, 0.125, deterministic)
    machine = Machine("a GPU", (arch // 10, 0), flash_4=flash.PINNED_4)
    assert flash.unavailable(machine, 128, deterministic) is not None
