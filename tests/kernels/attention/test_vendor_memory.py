"""The memory that vendors' attention operators read: every argument of every call, as any view.

Each operator is called through its stand-in, which reads memory as the operator does; torch's for
CPUs is called itself. Two things are tested for each argument: with the contract every view gives
what a dense tensor gives, and without it some view does not, so that no statement is superfluous.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_ring.kernels.attention import flash, torch_operators
from megatron_ring.kernels.memory_contract import VendorOperator
from tests import oracle
from tests.kernels.attention import flash_stand_ins
from tests.kernels.attention.torch_stand_ins import stand_ins_for_cuda_operators
from tests.kernels.memory_forms import (
    Call,
    misread_forms,
    recorded_calls,
    restricted,
    tensors,
    without_statement,
)

TILE_OPERATORS = {
    "torch's flash for CPUs": torch_operators.CPU_FLASH,
    "torch's flash": torch_operators.CUDA_FLASH,
    "torch's memory-efficient": torch_operators.CUDA_EFFICIENT,
    "cuDNN": torch_operators.CUDNN,
}
OPERATORS = [*TILE_OPERATORS, "flash-attn 2", "flash-attn 3"]
each_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {"flash_attn": {}, "flash_attn.flash_attn_interface": vars(flash_stand_ins)}
    modules |= {"flash_attn_3": {}, "flash_attn_3._C": {}}
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    with (
        stand_ins_for_cuda_operators(),
        torch.library._scoped_library("flash_attn_3", "FRAGMENT") as operators,
    ):
        flash_stand_ins.register_version_3(operators)
        yield


def calls_of(name: str) -> list[Call]:
    """Return the calls forward and backward of one operator, on dense tensors."""
    q, k, v, dout = oracle.random_inputs(2, 10, 4, 2, torch.float16)
    with recorded_calls() as calls:
        if name in TILE_OPERATORS:
            has_bias = name in ("torch's flash for CPUs", "torch's memory-efficient")
            bias = torch.zeros(10, 10, dtype=q.dtype).triu_(1) if has_bias else None
            operator = TILE_OPERATORS[name]
            out, lse = operator.forward(q, k, v, False, bias, 0.25)
            operator.backward(dout, q, k, v, out.contiguous(), lse, False, bias, 0.25)
        else:
            functions = flash._FUNCTIONS[int(name[-1])]
            q, k, v, dout = (x.flatten(0, 1) for x in (q, k, v, dout))
            cu_seqlens = torch.tensor([[0, 10, 20], [0, 10, 20]], dtype=torch.int32)
            lengths = cu_seqlens, (10, 10), True, 0.25
            out, lse = functions.forward(q, k, v, *lengths)
            functions.backward(dout, q, k, v, out, lse, *lengths, False)
    forward, backward = calls
    return [forward, backward]


@pytest.mark.usefixtures("stand_ins")
@each_operator
def test_every_view_of_every_argument_gives_the_same(name):
    for call in calls_of(name):
        assert {parameter: misread_forms(call, parameter) for parameter in tensors(call)} == {
            parameter: [] for parameter in tensors(call)
        }


@pytest.mark.usefixtures("stand_ins")
@each_operator
def test_without_what_is_stated_about_an_argument_some_view_of_it_is_misread(name):
    calls = calls_of(name)
    assert all(restricted(call) for call in calls)
    for call in calls:
        for parameter in restricted(call):
            assert misread_forms(call, parameter, unstated=True), parameter


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_of_the_heads_is_what_the_efficient_backward_misreads(dtype):
    """The fault seen on an H100: the ring passes half of the heads of out."""
    _, (operator, arguments) = calls_of("torch's memory-efficient")
    arguments = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float16 else x
        for name, x in arguments.items()
    }
    out_BHLD = arguments["out"]
    whole = torch.cat([out_BHLD, torch.zeros_like(out_BHLD)], 1).transpose(1, 2).contiguous()
    half_BHLD = whole.transpose(1, 2)[:, : out_BHLD.shape[1]]
    assert torch.equal(half_BHLD, out_BHLD)
    expected = operator(**arguments)[:3]
    actual = operator(**arguments | {"out": half_BHLD})[:3]
    unstated = without_statement(operator, "out")
    dq, dk, dv = unstated(**arguments | {"out": half_BHLD})[:3]
    assert all(map(torch.equal, actual, expected))
    assert (dq - expected[0]).abs().max() > 0.1 * expected[0].abs().max()
    assert (dk - expected[1]).abs().max() > 0.1 * expected[1].abs().max()
    assert torch.equal(dv, expected[2])


@pytest.mark.usefixtures("stand_ins")
@each_operator
def test_what_the_ring_passes_is_copied_only_where_it_would_be_misread(name):
    """Slices of tokens, and of heads, of tensors (batch, tokens, heads, head dim)."""
    _, (operator, arguments) = calls_of(name)
    copied = {"torch's memory-efficient": {"out"}, "cuDNN": {"out", "grad_out"}}
    names = {"query", "key", "value", "out", "grad_out", "q", "k", "v", "dout"}
    for parameter in names & arguments.keys():
        x = arguments[parameter]
        tokens_dim = 2 if x.dim() == 4 else 0  # (batch, heads, tokens, D) or (tokens, heads, D)
        dense = x.movedim(tokens_dim, -3).contiguous().movedim(-3, tokens_dim)
        half_of_heads = dense.narrow(1, 0, x.shape[1] // 2)
        one_sample = dense[:1] if x.dim() == 4 else dense
        half_of_tokens = one_sample.narrow(tokens_dim, 0, x.shape[tokens_dim] // 2)
        memory = operator.memory[parameter]
        assert memory.holds_for(half_of_tokens), parameter
        assert memory.holds_for(half_of_heads) == (parameter not in copied.get(name, ())), parameter


def aten_operators() -> list[VendorOperator]:
    members = vars(torch_operators).values()
    return [x for x in members if isinstance(x, VendorOperator)]


@pytest.mark.parametrize("operator", aten_operators(), ids=lambda operator: operator.name)
def test_something_is_stated_about_every_tensor_of_torchs_schema(operator):
    schema = operator.function.default._schema
    names = {x.name for x in schema.arguments if "Tensor" in str(x.type)}
    assert set(operator.memory) == names


def test_all_of_torchs_operators_are_listed():
    assert len(aten_operators()) == 2 * len(TILE_OPERATORS)
