"""Every supported cell of the table, forward and backward, against float64."""

from collections.abc import Callable

import pytest
import torch

from megatron_ring.kernels.cross_entropy import WHOLE
from megatron_ring.kernels.fused import liger, triton
from megatron_ring.kernels.fused.libraries import LIBRARIES, OFFERS, Operation
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.kernels.rope import Rope
from tests.kernels.fused.interpreted import interpreted  # noqa: F401
from tests.kernels.fused.stand_ins import APEX, FLASH_ATTN, import_with_stand_ins
from tests.tolerances import TOLERANCE, error

IGNORE_INDEX = -100
STAND_INS = {"flash-attn": FLASH_ATTN, "apex": APEX}
EPSILON = 1e-5
# The interpreter's products of two bfloat16 numbers are wrong; only this operation has any.
NOT_INTERPRETED = [(Operation.SWIGLU, "liger", torch.bfloat16)]


@pytest.fixture
def functions(library, request, monkeypatch) -> Operations:
    """The functions of a library, with the names of ``Operations``."""
    if library in STAND_INS:
        return import_with_stand_ins(monkeypatch, STAND_INS[library], LIBRARIES[library].module)
    if library in ("liger", "triton"):
        request.getfixturevalue("interpreted")
    return {"torch": TORCH, "liger": liger, "triton": triton}[library]


def rotate(functions: Operations, q, k, rotation) -> list[torch.Tensor]:
    """Rotate with a library's function, of which some return the values as well."""
    if getattr(functions, "rope_and_pack", None):
        return list(functions.rope_and_pack(q, k, k, rotation))[:2]
    return list(functions.rope(q, k, rotation))


def each_cell(*operations: Operation):
    """Parametrize over every library that supports an operation, and every supported dtype."""
    cells = [
        (operation, library, dtype)
        for operation in operations
        for library, offer in OFFERS[operation].items()
        for dtype in sorted(offer.dtypes, key=str)
    ]
    return pytest.mark.parametrize(
        ("operation", "library", "dtype"),
        [cell for cell in cells if cell not in NOT_INTERPRETED],
        ids=lambda x: x.name if isinstance(x, Operation) else str(x),
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(
    function: Callable, formula: Callable, inputs: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Compare outputs and gradients with the formula's in float64.

    Both get the inputs rounded to ``dtype``. Forward must not write to its inputs.
    """
    rounded = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    arguments = [x.clone() for x in rounded]
    results = function(*arguments)
    expected = formula(*exact)
    assert all(map(torch.equal, arguments, rounded)), "forward wrote to its inputs"
    assert all(y.dtype == dtype for y in results)
    outputs = [y.detach().clone() for y in results]
    dresults = [normal(*y.shape, seed=9).to(dtype) for y in results]
    gradients = torch.autograd.grad(results, rounded, [x.clone() for x in dresults])
    expected_gradients = torch.autograd.grad(expected, exact, [x.double() for x in dresults])
    errors = [
        error(actual.detach(), exact_one.detach())
        for actual, exact_one in zip(
            [*outputs, *gradients], [*expected, *expected_gradients], strict=True
        )
    ]
    assert max(errors) <= TOLERANCE[dtype], errors


@each_cell(Operation.RMS_NORM, Operation.LAYER_NORM)
def test_norms_match_the_formula(operation, library, dtype, functions):
    layer_norm = operation is Operation.LAYER_NORM

    def formula(x, weight, bias=0):
        x = x - x.mean(-1, keepdim=True) if layer_norm else x
        root = (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        return [x / root * weight + bias]

    def function(x, weight, bias=None):
        return [functions.norm(x, weight, bias, EPSILON)]

    inputs = [3 * normal(2, 5, 48) + 1, 1 + 0.3 * normal(48, seed=1)]
    if layer_norm:
        inputs.append(normal(48, seed=2))
    check(function, formula, inputs, dtype)


@pytest.mark.parametrize(
    "positions", [torch.arange(5) * 1000, torch.arange(10).view(2, 5) * 70], ids=["l", "Bl"]
)
@each_cell(Operation.ROPE)
def test_rope_multiplies_complex_numbers(operation, library, dtype, positions, functions):
    """Elements i and i + D/2 are a complex number; positions are per sample or shared."""
    rotation = Rope(12, 10000.0, "yarn", 4.0, 64).rotation(positions)
    factor = torch.complex(rotation.cos_lP.double(), rotation.sin_lP.double()).unsqueeze(-2)

    def rotated(x):
        z = torch.complex(*x.chunk(2, -1)) * factor
        return torch.cat([z.real, z.imag], -1)

    inputs = [normal(2, 5, 4, 12), normal(2, 5, 2, 12, seed=1)]
    check(
        lambda q, k: rotate(functions, q, k, rotation),
        lambda q, k: [rotated(q), rotated(k)],
        inputs,
        dtype,
    )


@each_cell(Operation.SWIGLU)
def test_swiglu_matches_the_formula(operation, library, dtype, functions):
    inputs = [3 * normal(2, 5, 24), normal(2, 5, 24, seed=1)]
    check(
        lambda gate, up: [functions.swiglu(gate, up)],
        lambda gate, up: [gate / (1 + (-gate).exp()) * up],
        inputs,
        dtype,
    )


@pytest.fixture
def targets_c1() -> torch.Tensor:
    targets = torch.randint(50, (7, 1), generator=torch.Generator().manual_seed(3))
    targets[2] = IGNORE_INDEX
    return targets


@pytest.mark.parametrize("with_gradient", [True, False])
@each_cell(Operation.CROSS_ENTROPY)
def test_cross_entropy_matches_float64(
    operation, library, dtype, with_gradient, targets_c1, functions
):
    logits = (3 * normal(7, 50)).to(dtype)
    exact = logits.double().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets_c1[:, 0], reduction="sum")
    loss, gradient = functions.cross_entropy(
        logits.clone(), targets_c1, WHOLE, IGNORE_INDEX, with_gradient
    )
    # The loss is float32 for smaller logits too: it is reported, and compared from step to step.
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert error(loss, expected.detach()) <= TOLERANCE[loss.dtype]
    assert (gradient is not None) == with_gradient
    if with_gradient:
        assert gradient.dtype == dtype
        assert error(gradient, torch.autograd.grad(expected, exact)[0]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("invalid", [50, -1])
@pytest.mark.parametrize("library", ["torch", "liger", "flash-attn"])
def test_the_loss_of_an_invalid_target_is_not_finite(invalid, targets_c1, library, functions):
    targets_c1[4] = invalid
    loss, _ = functions.cross_entropy(normal(7, 50).float(), targets_c1, WHOLE, IGNORE_INDEX, True)
    assert not loss.isfinite()


def misrounded(functions: Operations, operation: Operation) -> float:
    """Return the share of float16 results that are not the exact ones rounded once."""
    dtype = torch.float16
    if operation is Operation.ROPE:
        rotation = Rope(32, 10000.0).rotation(torch.arange(30))
        q, k = (normal(1, 30, 2, 32, seed=n).to(dtype) for n in range(2))
        results = rotate(functions, q, k, rotation)[0]
        exact = TORCH.rope(q.double(), k.double(), rotation)[0]
    else:
        x = (3 * normal(30, 300)).to(dtype)
        weight = (1 + 0.3 * normal(300, seed=1)).to(dtype)
        results = functions.norm(x, weight, None, EPSILON)
        exact = TORCH.norm(x.double(), weight.double(), None, EPSILON)
    return float((results != exact.to(dtype)).double().mean())


each_rounded_operation = pytest.mark.parametrize(
    "operation", [Operation.RMS_NORM, Operation.ROPE], ids=lambda operation: operation.name
)


@each_rounded_operation
@pytest.mark.parametrize("library", ["torch", "triton", "liger", "flash-attn"])
def test_results_are_rounded_once(operation, library, functions):
    """Tolerances do not show this: Liger's default RMSNorm, which rounds twice, is within them."""
    assert misrounded(functions, operation) < 2e-3


@each_rounded_operation
@pytest.mark.parametrize("library", ["apex"])
def test_operations_that_round_more_often_are_supported_only_in_float32(
    operation, library, functions
):
    assert OFFERS[operation][library].dtypes == {torch.float32}
    assert misrounded(functions, operation) > 0.1


def test_torchs_fused_adamw_follows_the_formula():
    """Loshchilov and Hutter 2019, algorithm 2, as documented by torch; the only supported AdamW."""
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.95, 1e-8, 0.1
    weight = normal(50).float().requires_grad_()
    exact = weight.detach().double()
    first_moment = torch.zeros(50).double()
    second_moment = torch.zeros(50).double()
    adam = torch.optim.AdamW([weight], lr, (beta1, beta2), eps, decay, fused=True)
    for step in range(1, 6):
        weight.grad = normal(50, seed=step).float()
        gradient = weight.grad.double()
        adam.step()
        first_moment = beta1 * first_moment + (1 - beta1) * gradient
        second_moment = beta2 * second_moment + (1 - beta2) * gradient.square()
        root = (second_moment / (1 - beta2**step)).sqrt()
        exact = exact * (1 - lr * decay) - lr * first_moment / (1 - beta1**step) / (root + eps)
    assert error(weight.detach(), exact) <= TOLERANCE[torch.float32]
