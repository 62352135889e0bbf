"""The support matrix is true: what it calls tested is tested here, and what it refuses says why."""

import pytest
import torch

from megatron_ring.context_parallel.layout import Layout
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.errors import KernelUnavailable
from megatron_ring.kernels.attention import KERNELS, choose
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.support import (
    COLUMNS,
    INTERPRETED,
    SUPPORT,
    TESTED,
    UNPROVEN,
    Feature,
    Unsupported,
)
from megatron_ring.model.attention import with_sink
from tests import oracle, simulated_ring
from tests.kernels.attention.one_at_a_time import OneAtATime
from tests.tolerances import TOLERANCE, beyond_tolerance, error

LAYOUT = Layout("striped", 60, 3)
PACK = oracle.documents(1, 60, (13, 1, 2, 30))
STARTS = tuple(oracle.document_starts(PACK).tolist())
WHOLE = oracle.documents(1, 60, (60,))


def parity(
    kernel: str, dtype=torch.float32, groups=4, head_size=16, mask: Mask = CAUSAL, visible=None
) -> None:
    inputs = oracle.random_inputs(1, 60, 4, groups, dtype, head_size)
    found = simulated_ring.run(LAYOUT, KERNELS[kernel], *inputs, mask=mask).results
    assert beyond_tolerance(found, oracle.attention(*inputs, visible), dtype) == {}


def documents(kernel: str) -> None:
    parity(kernel, mask=Mask(document_starts=STARTS), visible=oracle.visible(PACK))


def window(kernel: str) -> None:
    parity(kernel, mask=Mask(window=11), visible=oracle.visible(WHOLE, 11))
    parity(kernel, mask=Mask(11, STARTS), visible=oracle.visible(PACK, 11))


def grouped_heads(kernel: str) -> None:
    parity(kernel, groups=2)
    parity(kernel, groups=1)


def sinks(kernel: str) -> None:
    """Output and gradients are those of a softmax with a column more, the sink's own gradient included."""
    q, k, v, dout = oracle.random_inputs(1, 60, 4, 4, torch.float32)
    out, lse = (x.requires_grad_() for x in _forward(kernel, q, k, v, dout))
    sink_H = torch.linspace(-2, 2, 4).requires_grad_()
    given, dout_of_ring, dlse, dsink = _expected_and_gradients(q, k, v, dout, out, lse, sink_H)
    found = simulated_ring.run(
        LAYOUT, KERNELS[kernel], q, k, v, dout_of_ring, dlse_BHS=dlse
    ).results
    for name, expected in given["gradients"].items():
        assert error(getattr(found, name), expected) <= TOLERANCE[torch.float32]
    assert error(with_sink(out, lse, sink_H).detach(), given["out"]) <= TOLERANCE[torch.float32]
    assert error(dsink, given["dsink"]) <= 10 * TOLERANCE[torch.float32]  # a sum over sixty queries


def _forward(kernel: str, q, k, v, dout) -> tuple[torch.Tensor, torch.Tensor]:
    results = simulated_ring.run(LAYOUT, KERNELS[kernel], q, k, v, dout).results
    return results.out.detach(), results.lse.detach()


def _expected_and_gradients(q, k, v, dout, out, lse, sink_H):
    """What the definition gives, and what autograd sends back to the ring through ``with_sink``."""
    dout_of_ring, dlse, dsink = torch.autograd.grad(
        with_sink(out, lse, sink_H), (out, lse, sink_H), dout
    )
    inputs = [x.double().requires_grad_() for x in (q, k, v, sink_H.detach())]
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs[0], inputs[1]) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(oracle.visible(WHOLE)[:, None].logical_not(), -torch.inf)
    column = inputs[3].view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, inputs[2])
    dq, dk, dv, expected_dsink = torch.autograd.grad(expected, inputs, dout.double())
    given = {
        "out": expected.detach(),
        "gradients": {"dq": dq, "dk": dk, "dv": dv},
        "dsink": expected_dsink,
    }
    return given, dout_of_ring, dlse, dsink


def determinism(kernel: str) -> None:
    inputs = oracle.random_inputs(1, 60, 4, 2, torch.float32)
    first, again = (simulated_ring.run(LAYOUT, KERNELS[kernel], *inputs).results for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again))


def head_sizes(*sizes: int):
    def proof(kernel: str) -> None:
        for size in sizes:
            parity(kernel, head_size=size)

    return proof


def dtype(of: torch.dtype):
    return lambda kernel: parity(kernel, dtype=of)


PROOFS = {
    Feature.DOCUMENTS: documents,
    Feature.WINDOW: window,
    Feature.GROUPED_HEADS: grouped_heads,
    Feature.SINKS: sinks,
    Feature.DETERMINISM: determinism,
    Feature.FLOAT64: dtype(torch.float64),
    Feature.FLOAT32: dtype(torch.float32),
    Feature.BFLOAT16: dtype(torch.bfloat16),
    Feature.FLOAT16: dtype(torch.float16),
    Feature.HEAD_DIM_MULTIPLE_OF_8: head_sizes(8, 64, 96, 128, 256),
    Feature.OTHER_HEADS: head_sizes(1, 5, 20, 257),
}
CELLS = [(feature, *column) for feature in SUPPORT for column in SUPPORT[feature]]
each_cell = pytest.mark.parametrize(("feature", "kernel", "device"), CELLS)
# What a run of such a feature has besides it: a type and a head size that every kernel takes.
USUAL = {"flash": torch.bfloat16, "cudnn": torch.bfloat16, "triton": torch.bfloat16}
DTYPES = {
    Feature.FLOAT64: torch.float64,
    Feature.BFLOAT16: torch.bfloat16,
    Feature.FLOAT16: torch.float16,
}


COMPLETE = Machine("NVIDIA H100 80GB HBM3", (9, 0), 91002, "2.8.3", flash_3=True, triton=True)


def ask(kernel: str, feature: Feature, device: str):
    """Ask for the feature in the way a run does: types and head sizes by the tensors, the rest by name."""
    head_dim = 257 if feature is Feature.OTHER_HEADS else 64
    of_tensors = feature in DTYPES or feature in (
        Feature.FLOAT32,
        Feature.HEAD_DIM_MULTIPLE_OF_8,
        Feature.OTHER_HEADS,
    )
    features = [] if of_tensors else [feature]
    usual = torch.float32 if feature is Feature.FLOAT32 else USUAL.get(kernel, torch.float32)
    return choose(kernel, device, DTYPES.get(feature, usual), head_dim, features, COMPLETE)


def test_every_cell_is_filled():
    assert set(SUPPORT) == set(Feature)
    assert all(tuple(cells) == COLUMNS for cells in SUPPORT.values())
    assert {kernel for kernel, _ in COLUMNS} == set(KERNELS)


@each_cell
def test_a_tested_cell_has_its_parity_test_and_a_refused_one_its_error(feature, kernel, device):
    cell = SUPPORT[feature][kernel, device]
    if cell is TESTED:
        assert device == "cpu", "what this machine can test"
        assert ask(kernel, feature, device).reason == "asked for"
        PROOFS[feature](kernel)
    elif cell is INTERPRETED:
        assert device == "cuda"
        assert (
            feature.value
            in ask(kernel, feature, device).reason.partition(f"{INTERPRETED.value}: ")[2]
        )
    elif cell is UNPROVEN:
        assert device != "cpu"
        unproven = ask(kernel, feature, "cuda").reason.partition(
            "written and never run on such a device: "
        )[2]
        assert feature.value in unproven
    else:
        with pytest.raises(KernelUnavailable) as refused:
            ask(kernel, feature, device)
        assert (
            f"attention_kernel {kernel} cannot do {feature.value}: {cell.reason}. {cell.instead}."
            in str(refused.value)
        )
        assert "--" in cell.instead


@pytest.mark.whole
@pytest.mark.parametrize(
    "feature", [f for f in SUPPORT if SUPPORT[f]["triton", "cuda"] is INTERPRETED]
)
def test_an_interpreted_cell_has_its_parity_test(feature, monkeypatch):
    monkeypatch.setitem(KERNELS, "triton", OneAtATime(KERNELS["triton"]))
    PROOFS[feature]("triton")


def test_a_kernel_that_does_not_exist_on_a_device_says_where_it_does():
    with pytest.raises(
        KernelUnavailable,
        match="sdpa cannot do float32, a head .*: it exists for cpu and cuda, not mps",
    ):
        choose("sdpa", "mps", torch.float32, 64)
    assert choose("auto", "mps", torch.float32, 64).name == "reference"


def test_what_no_kernel_does_is_said_once():
    with pytest.raises(KernelUnavailable) as refused:
        choose("auto", "cpu", torch.float32, 64, [Feature.SOFT_CAP, Feature.DROPOUT])
    assert [message.split(":")[0] for message in refused.value.problems] == [
        "attention_kernel sdpa and reference cannot do capped scores",
        "attention_kernel sdpa and reference cannot do dropout of attention weights",
    ]


def test_every_refusal_is_a_reason_and_a_flag():
    refused = {
        cell
        for cells in SUPPORT.values()
        for cell in cells.values()
        if isinstance(cell, Unsupported)
    }
    assert refused
    assert all(cell.reason and "--" in cell.instead for cell in refused)
