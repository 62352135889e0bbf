"""The support table is true: TESTED cells are tested here, and refused ones have their message."""

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import KERNELS, choose
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.registry import COLUMNS, SUPPORT, Feature, support
from megatron_ring.kernels.selection import Unsupported, Validation
from megatron_ring.model.attention import with_sink
from tests import oracle, simulated_ring
from tests.kernels.attention.test_hops import Serialized
from tests.tolerances import TOLERANCE, beyond_tolerance, error

LAYOUT = Layout("striped", 60, 3)
PACK = oracle.documents(1, 60, (13, 1, 2, 30))
STARTS = tuple(oracle.document_starts(PACK).tolist())
WHOLE = oracle.documents(1, 60, (60,))


def check_parity(
    kernel: str,
    dtype=torch.float32,
    heads=2,
    groups=2,
    head_dim=16,
    mask: Mask = CAUSAL,
    visible=None,
    layout: Layout = LAYOUT,
) -> None:
    inputs = oracle.random_inputs(1, 60, heads, groups, dtype, head_dim)
    results = simulated_ring.run(layout, KERNELS[kernel], *inputs, mask=mask).results
    assert beyond_tolerance(results, oracle.attention(*inputs, visible), dtype) == {}


def check_documents(kernel: str) -> None:
    check_parity(kernel, mask=Mask(document_starts=STARTS), visible=oracle.visible(PACK))


def check_window(kernel: str) -> None:
    check_parity(kernel, mask=Mask(window=11), visible=oracle.visible(WHOLE, 11))
    check_parity(kernel, mask=Mask(11, STARTS), visible=oracle.visible(PACK, 11))


def check_grouped_heads(kernel: str) -> None:
    check_parity(kernel, heads=4, groups=2)
    check_parity(kernel, heads=3, groups=1)


def check_sinks(kernel: str) -> None:
    """Output and all gradients, the sink's too, equal those of a softmax with one more column."""
    q, k, v, dout = oracle.random_inputs(1, 60, 4, 4, torch.float32)
    out, lse = (x.requires_grad_() for x in _forward(kernel, q, k, v, dout))
    sink_H = torch.linspace(-2, 2, 4).requires_grad_()
    expected, dout_of_ring, dlse, dsink = _expected_and_gradients(q, k, v, dout, out, lse, sink_H)
    results = simulated_ring.run(
        LAYOUT, KERNELS[kernel], q, k, v, dout_of_ring, dlse_BHS=dlse
    ).results
    tolerance = TOLERANCE[torch.float32]
    for name, gradient in expected["gradients"].items():
        assert error(getattr(results, name), gradient) <= tolerance
    assert error(with_sink(out, lse, sink_H).detach(), expected["out"]) <= tolerance
    assert error(dsink, expected["dsink"]) <= 10 * tolerance  # a sum over sixty queries


def _forward(kernel: str, q, k, v, dout) -> tuple[torch.Tensor, torch.Tensor]:
    results = simulated_ring.run(LAYOUT, KERNELS[kernel], q, k, v, dout).results
    return results.out.detach(), results.lse.detach()


def _expected_and_gradients(q, k, v, dout, out, lse, sink_H):
    """Compute the results by definition, and the ring's gradients through ``with_sink``."""
    dout_of_ring, dlse, dsink = torch.autograd.grad(
        with_sink(out, lse, sink_H), (out, lse, sink_H), dout
    )
    inputs = [x.double().requires_grad_() for x in (q, k, v, sink_H.detach())]
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs[0], inputs[1]) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(oracle.visible(WHOLE)[:, None].logical_not(), -torch.inf)
    column = inputs[3].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    expected_out = torch.einsum("bhqk,bkhd->bqhd", weights, inputs[2])
    dq, dk, dv, expected_dsink = torch.autograd.grad(expected_out, inputs, dout.double())
    expected = {
        "out": expected_out.detach(),
        "gradients": {"dq": dq, "dk": dk, "dv": dv},
        "dsink": expected_dsink,
    }
    return expected, dout_of_ring, dlse, dsink


def check_determinism(kernel: str) -> None:
    inputs = oracle.random_inputs(1, 60, 2, 1, torch.float32)
    first, again = (simulated_ring.run(LAYOUT, KERNELS[kernel], *inputs).results for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again))


def check_head_dims(*head_dims: int):
    def check(kernel: str) -> None:
        for head_dim in head_dims:
            check_parity(kernel, head_dim=head_dim, layout=Layout("striped", 60, 2))

    return check


def check_dtype(dtype: torch.dtype):
    return lambda kernel: check_parity(kernel, dtype=dtype)


CHECKS = {
    Feature.DOCUMENTS: check_documents,
    Feature.WINDOW: check_window,
    Feature.GROUPED_HEADS: check_grouped_heads,
    Feature.SINKS: check_sinks,
    Feature.DETERMINISM: check_determinism,
    Feature.FLOAT64: check_dtype(torch.float64),
    Feature.FLOAT32: check_dtype(torch.float32),
    Feature.BFLOAT16: check_dtype(torch.bfloat16),
    Feature.FLOAT16: check_dtype(torch.float16),
    Feature.HEAD_DIM_MULTIPLE_OF_8: check_head_dims(8, 64, 96, 128, 256),
    Feature.OTHER_HEADS: check_head_dims(1, 5, 20, 257),
}
CELLS = [(feature, *column) for feature in SUPPORT for column in SUPPORT[feature]]
each_cell = pytest.mark.parametrize(("feature", "kernel", "device"), CELLS)
DTYPES = {
    Feature.FLOAT64: torch.float64,
    Feature.FLOAT32: torch.float32,
    Feature.BFLOAT16: torch.bfloat16,
    Feature.FLOAT16: torch.float16,
}
HEAD_DIMS = {Feature.HEAD_DIM_MULTIPLE_OF_8: 64, Feature.OTHER_HEADS: 257}

# Every library is installed.
COMPLETE = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002, "2.8.3", flash_3=True, triton=True)
ELSEWHERE = Machine("NVIDIA A100-SXM4-80GB", (8, 0), 91002, "2.8.3", triton=True)


def choose_with(kernel: str, feature: Feature, device: str, machine: Machine = COMPLETE):
    """Require a feature as a run does: dtypes and head dims through tensors, the others by name.

    The rest of the run is supported by the kernel: float32 if possible, else bfloat16, and a head
    dim of 64.
    """
    refuses_float32 = isinstance(support(kernel, device, Feature.FLOAT32), Unsupported)
    dtype = DTYPES.get(feature, torch.bfloat16 if refuses_float32 else torch.float32)
    head_dim = HEAD_DIMS.get(feature, 64)
    named = [] if feature in DTYPES or feature in HEAD_DIMS else [feature]
    return choose(kernel, device, dtype, head_dim, named, machine)


def test_every_cell_is_filled():
    assert set(SUPPORT) == set(Feature)
    assert all(tuple(cells) == COLUMNS for cells in SUPPORT.values())
    assert {kernel for kernel, _ in COLUMNS} == set(KERNELS)


@each_cell
def test_a_tested_cell_has_a_parity_test_and_a_refused_one_its_message(feature, kernel, device):
    cell = SUPPORT[feature][kernel, device]
    if isinstance(cell, Unsupported):
        with pytest.raises(KernelUnavailable) as refused:
            choose_with(kernel, feature, device)
        message = f"not support {feature.value}: {cell.reason}. {cell.instead}."
        assert f"attention_kernel {kernel} does {message}" in str(refused.value)
        assert "--" in cell.instead
    elif cell is Validation.TESTED:
        assert device == "cpu", "the device of this machine"
        assert choose_with(kernel, feature, device).reason == "requested"
        CHECKS[feature](kernel)
    elif cell is Validation.MEASURED:
        assert device == "cuda"
        assert cell.caveat not in choose_with(kernel, feature, device).reason
        reason = choose_with(kernel, feature, device, ELSEWHERE).reason
        assert feature.value in reason.partition(f"{cell.caveat}: ")[2]
    else:
        assert device != "cpu"
        assert cell is not Validation.INTERPRETED or device == "cuda"
        reason = choose_with(kernel, feature, "cuda").reason
        assert feature.value in reason.partition(f"{cell.caveat}: ")[2]


@pytest.mark.whole
@pytest.mark.parametrize(
    "feature", [f for f in SUPPORT if isinstance(SUPPORT[f]["triton", "cuda"], Validation)]
)
def test_an_interpreted_or_measured_cell_has_a_parity_test(feature, monkeypatch):
    monkeypatch.setitem(KERNELS, "triton", Serialized(KERNELS["triton"]))
    CHECKS[feature]("triton")


def test_a_kernel_on_an_unsupported_device_is_refused_with_its_devices():
    message = "sdpa does not support float32, head dims .*: it runs on cpu and cuda, not mps"
    with pytest.raises(KernelUnavailable, match=message):
        choose("sdpa", "mps", torch.float32, 64)
    assert choose("auto", "mps", torch.float32, 64).name == "reference"


def test_a_feature_that_no_kernel_supports_is_refused_once():
    with pytest.raises(KernelUnavailable) as refused:
        choose("auto", "cpu", torch.float32, 64, [Feature.SOFT_CAP, Feature.DROPOUT])
    assert [message.split(":")[0] for message in refused.value.problems] == [
        "attention_kernel sdpa and reference do not support logit soft-capping",
        "attention_kernel sdpa and reference do not support attention dropout",
    ]


def test_every_refusal_has_a_reason_and_a_flag():
    cells = {cell for cells in SUPPORT.values() for cell in cells.values()}
    refused = [cell for cell in cells if isinstance(cell, Unsupported)]
    assert refused
    assert all(cell.reason and "--" in cell.instead for cell in refused)
