"""Our Triton kernels in the interpreter: odd sizes, views, several programs, packed results.

test_numbers.py compares them with float64 in every dtype.
"""

import pytest
import torch

from megatron_ring.kernels.attention import stack_to_kernel_layout
from megatron_ring.kernels.fused import triton
from megatron_ring.kernels.fused.operations import TORCH
from megatron_ring.kernels.fused.triton import launch, rope_kernel
from megatron_ring.kernels.rope import Rope
from tests.kernels.fused.interpreted import interpreted  # noqa: F401
from tests.tolerances import TOLERANCE, error

pytestmark = pytest.mark.usefixtures("interpreted")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def columns_of_a_wider_tensor(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as a view whose rows are not adjacent."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 9), torch.nan, dtype=x.dtype)
    wide[..., 4:-5] = x
    return wide[..., 4:-5]


def compare(function, reference, inputs: list[torch.Tensor]) -> None:
    """Compare results and gradients with those of torch in float64."""
    dtype = inputs[0].dtype
    arguments = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results, expected = function(*arguments), reference(*exact)
    douts = [columns_of_a_wider_tensor(normal(*y.shape, seed=5, dtype=dtype)) for y in results]
    gradients = torch.autograd.grad(results, arguments, douts)
    of_exact = torch.autograd.grad(expected, exact, [x.double() for x in douts])
    pairs = zip([*results, *gradients], [*expected, *of_exact], strict=True)
    errors = [error(x.detach(), y.detach()) for x, y in pairs]
    assert max(errors) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(3, 1), (9, 37), (2, 700)])
def test_residual_norm_and_the_gradient_of_the_stream(dtype, is_view, adds, rows, width):
    """Nine rows are more than the programs of the interpreter: each sums several."""
    inputs = [normal(2, rows, width, dtype=dtype), normal(width, seed=2, dtype=dtype)]
    if adds:
        inputs.insert(1, normal(2, rows, width, seed=1, dtype=dtype))
    if is_view:
        inputs[:-1] = map(columns_of_a_wider_tensor, inputs[:-1])

    def norm(x, *rest):
        return triton.residual_norm(x, rest[0] if adds else None, rest[-1], None, 1e-5)

    def exact(x, *rest):
        total = x + rest[0] if adds else x + 0
        return total, TORCH.norm(total, rest[-1], None, 1e-5)

    compare(norm, exact, inputs)


def test_a_norm_whose_result_is_unused_passes_the_gradient_of_the_stream_on():
    x = normal(1, 3, 8).requires_grad_()
    total, _ = triton.residual_norm(x, x * 2, torch.ones(8), None, 1e-5)
    (gradient,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize("width", [1, 50, 2100])
def test_swiglu(dtype, is_view, width):
    inputs = [3 * normal(2, 2, width, dtype=dtype), normal(2, 2, width, seed=1, dtype=dtype)]
    if is_view:
        inputs = [columns_of_a_wider_tensor(x) for x in inputs]
    compare(
        lambda gate, up: [triton.swiglu(gate, up)],
        lambda gate, up: [TORCH.swiglu(gate, up)],
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [torch.arange(3), torch.arange(6).view(2, 3) * 70], ids=str)
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(6, 3, 10), (5, 1, 6), (4, 4, 16)])
def test_rope_with_heads_in_several_programs(
    dtype, positions, heads, groups, head_dim, monkeypatch
):
    monkeypatch.setattr(rope_kernel, "MOST_PAIRS", 32)
    rotation = Rope(head_dim, 10000.0).rotation(positions)
    inputs = [
        columns_of_a_wider_tensor(normal(2, 3, n * head_dim, seed=seed, dtype=dtype)).unflatten(
            -1, (n, head_dim)
        )
        for seed, n in enumerate((heads, groups, groups))
    ]
    compare(
        lambda q, k, v: triton.rope_and_pack(q, k, v, rotation),
        lambda q, k, v: [*TORCH.rope(q, k, rotation), v * 1],
        inputs,
    )


def test_packed_keys_and_values_are_stacked_without_a_copy():
    rotation = Rope(8, 10000.0).rotation(torch.arange(5))
    q, k, v = (normal(1, 5, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    _, k_packed, v_packed = triton.rope_and_pack(q, k, v, rotation)
    kv = stack_to_kernel_layout("triton", [k_packed, v_packed])
    assert kv.data_ptr() == k_packed.data_ptr()
    assert torch.equal(kv, torch.stack((k_packed, v_packed)))
    dkv = normal(*kv.shape, seed=7)
    dv = torch.autograd.grad(kv, v, dkv)[0]
    assert torch.equal(dv, dkv[1])


@pytest.mark.parametrize("operation", ["norm", "swiglu", "rope"])
def test_no_tokens(operation):
    x = torch.zeros(1, 0, 4, 8)
    if operation == "norm":
        result = triton.norm(x, torch.ones(8), None, 1e-5)
    elif operation == "swiglu":
        result = triton.swiglu(x, x)
    else:
        result, *_ = triton.rope_and_pack(x, x, x, Rope(8, 1e4).rotation(torch.arange(0)))
    assert result.shape == x.shape


def test_programs_and_warps_are_limited():
    cpu = torch.device("cpu")
    assert [launch.programs_for(cpu, rows) for rows in (0, 3, 100)] == [1, 3, 4]
    assert [launch.warps_for(elements) for elements in (16, 2048, 2**20)] == [1, 4, 16]
