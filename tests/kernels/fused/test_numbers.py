"""Every operation by every library that offers it, forward and backward, against float64: the table's cells."""

from collections.abc import Callable

import pytest
import torch

from megatron_ring.kernels.cross_entropy import WHOLE
from megatron_ring.kernels.fused import liger
from megatron_ring.kernels.fused.operations import TORCH, Operations
from megatron_ring.kernels.fused.support import LIBRARIES, OFFERS, Operation
from megatron_ring.kernels.rope import Rope
from tests.kernels.fused.interpreted import interpreted  # noqa: F401
from tests.kernels.fused.stand_ins import APEX, FLASH_ATTN, stood_in
from tests.tolerances import TOLERANCE, error

IGNORED = -100
STAND_INS = {"flash-attn": FLASH_ATTN, "apex": APEX}
EPSILON = 1e-5
# The interpreter multiplies two bfloat16 numbers wrongly, which no other operation does.
NOT_INTERPRETED = [(Operation.SWIGLU, "liger", torch.bfloat16)]


@pytest.fixture
def functions(library, request, monkeypatch) -> Operations:
    """A library's functions, by the names of Operations."""
    if library in STAND_INS:
        return stood_in(monkeypatch, STAND_INS[library], LIBRARIES[library].module)
    if library == "liger":
        request.getfixturevalue("interpreted")
    return {"torch": TORCH, "liger": liger}[library]


def cells(*operations: Operation):
    """Every library that offers an operation, in every type that it takes."""
    offers = [(o, library, offer) for o in operations for library, offer in OFFERS[o].items()]
    found = [
        (o, library, dtype)
        for o, library, offer in offers
        for dtype in sorted(offer.dtypes, key=str)
    ]
    return pytest.mark.parametrize(
        ("operation", "library", "dtype"),
        [cell for cell in found if cell not in NOT_INTERPRETED],
        ids=lambda x: x.name if isinstance(x, Operation) else str(x),
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(
    function: Callable, reference: Callable, inputs: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Outputs and gradients are within tolerance of the reference's at the rounded inputs, which stay as they are."""
    rounded = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    handed = [x.clone() for x in rounded]
    found, expected = function(*handed), reference(*exact)
    assert all(map(torch.equal, handed, rounded)), "forward wrote to what it was given"
    assert all(y.dtype == dtype for y in found)
    outputs = [y.detach().clone() for y in found]
    given = [normal(*y.shape, seed=9).to(dtype) for y in found]
    gradients = torch.autograd.grad(found, rounded, [x.clone() for x in given])
    expected = [*expected, *torch.autograd.grad(expected, exact, [x.double() for x in given])]
    errors = [
        error(f.detach(), e.detach()) for f, e in zip([*outputs, *gradients], expected, strict=True)
    ]
    assert max(errors) <= TOLERANCE[dtype], errors


@cells(Operation.RMS_NORM, Operation.LAYER_NORM)
def test_norms(operation, library, dtype, functions):
    centre, root = (
        operation is Operation.LAYER_NORM,
        (lambda x: (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()),
    )

    def formula(x, weight, bias=0):
        x = x - x.mean(-1, keepdim=True) if centre else x
        return [x / root(x) * weight + bias]

    def function(x, weight, bias=None):
        return [functions.norm(x, weight, bias, EPSILON)]

    inputs = [
        3 * normal(2, 5, 48) + 1,
        1 + 0.3 * normal(48, seed=1),
        *([normal(48, seed=2)] if centre else []),
    ]
    check(function, formula, inputs, dtype)


@pytest.mark.parametrize(
    "positions", [torch.arange(5) * 1000, torch.arange(10).view(2, 5) * 70], ids=["l", "Bl"]
)
@cells(Operation.ROPE)
def test_rope(operation, library, dtype, positions, functions):
    """Pairs i and i + D/2 are complex numbers; the positions of samples are their own or everyone's."""
    rotation = Rope(12, 10000.0, "yarn", 4.0, 64).rotation(positions)
    turn = torch.complex(rotation.cos_lP.double(), rotation.sin_lP.double()).unsqueeze(-2)

    def turned(x):
        z = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    inputs = [normal(2, 5, 4, 12), normal(2, 5, 2, 12, seed=1)]
    check(
        lambda q, k: functions.rope(q, k, rotation),
        lambda q, k: [turned(q), turned(k)],
        inputs,
        dtype,
    )


@cells(Operation.SWIGLU)
def test_swiglu(operation, library, dtype, functions):
    inputs = [3 * normal(2, 5, 24), normal(2, 5, 24, seed=1)]
    check(
        lambda g, u: [functions.swiglu(g, u)],
        lambda g, u: [g / (1 + (-g).exp()) * u],
        inputs,
        dtype,
    )


@pytest.fixture
def targets_c1() -> torch.Tensor:
    targets = torch.randint(50, (7, 1), generator=torch.Generator().manual_seed(3))
    targets[2] = IGNORED
    return targets


@pytest.mark.parametrize("wants_gradient", [True, False])
@cells(Operation.CROSS_ENTROPY)
def test_cross_entropy(operation, library, dtype, wants_gradient, targets_c1, functions):
    logits = (3 * normal(7, 50)).to(dtype)
    exact = logits.double().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets_c1[:, 0], reduction="sum")
    loss, gradient = functions.cross_entropy(
        logits.clone(), targets_c1, WHOLE, IGNORED, wants_gradient
    )
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    # In float32 whatever the logits are: it is reported and compared from step to step.
    assert error(loss, expected.detach()) <= TOLERANCE[loss.dtype]
    assert (gradient is not None) == wants_gradient
    if wants_gradient:
        assert gradient.dtype == dtype
        assert error(gradient, torch.autograd.grad(expected, exact)[0]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("astray", [50, -1])
@pytest.mark.parametrize("library", ["torch", "liger", "flash-attn"])
def test_a_target_that_is_no_row_does_not_look_well(astray, targets_c1, library, functions):
    targets_c1[4] = astray
    loss, _ = functions.cross_entropy(normal(7, 50).float(), targets_c1, WHOLE, IGNORED, True)
    assert not loss.isfinite()


def misrounded(functions: Operations, operation: Operation) -> float:
    """The share of results in float16 that are not the exact ones rounded once."""
    dtype, rotation = torch.float16, Rope(32, 10000.0).rotation(torch.arange(30))
    if operation is Operation.ROPE:
        inputs = *(normal(1, 30, 2, 32, seed=n).to(dtype) for n in range(2)), rotation
        found, exact = (
            functions.rope(*inputs)[0],
            TORCH.rope(inputs[0].double(), inputs[1].double(), rotation)[0],
        )
    else:
        x, weight = (3 * normal(30, 300)).to(dtype), (1 + 0.3 * normal(300, seed=1)).to(dtype)
        found = functions.norm(x, weight, None, EPSILON)
        exact = TORCH.norm(x.double(), weight.double(), None, EPSILON)
    return float((found != exact.to(dtype)).double().mean())


@pytest.mark.parametrize(
    "operation", [Operation.RMS_NORM, Operation.ROPE], ids=lambda operation: operation.name
)
@pytest.mark.parametrize("library", ["torch", "liger", "flash-attn"])
def test_results_are_rounded_once(operation, library, functions):
    """Which the tolerances would not tell: Liger's default for RMSNorm is within them."""
    assert misrounded(functions, operation) < 2e-3


@pytest.mark.parametrize(
    "operation", [Operation.RMS_NORM, Operation.ROPE], ids=lambda operation: operation.name
)
@pytest.mark.parametrize("library", ["apex"])
def test_what_rounds_more_often_is_offered_in_float32_alone(operation, library, functions):
    assert OFFERS[operation][library].dtypes == {torch.float32}
    assert misrounded(functions, operation) > 0.1


def test_torchs_fused_adamw_follows_the_formula():
    """Loshchilov and Hutter 2019, algorithm 2, in the form that torch documents: the only AdamW of the table."""
    rate, beta1, beta2, eps, decay = 0.01, 0.9, 0.95, 1e-8, 0.1
    weight = normal(50).float().requires_grad_()
    exact, first, second = (
        weight.detach().double(),
        torch.zeros(50).double(),
        torch.zeros(50).double(),
    )
    adam = torch.optim.AdamW([weight], rate, (beta1, beta2), eps, decay, fused=True)
    for step in range(1, 6):
        weight.grad = normal(50, seed=step).float()
        gradient = weight.grad.double()
        adam.step()
        first, second = (
            beta1 * first + (1 - beta1) * gradient,
            beta2 * second + (1 - beta2) * gradient.square(),
        )
        unbiased = (second / (1 - beta2**step)).sqrt()
        exact = exact * (1 - rate * decay) - rate * first / (1 - beta1**step) / (unbiased + eps)
    assert error(weight.detach(), exact) <= TOLERANCE[torch.float32]
