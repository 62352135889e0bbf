"""The fused head beside torch's: F.cross_entropy(hidden @ weight.T), in float64."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks.live_memory import LiveMemory
from megatron_ring.kernels.cross_entropy import VocabularyPart, head_loss_sum
from tests.distributed import run_ranks
from tests.tolerances import TOLERANCE, beyond_tolerance, error

B, L, E, V = 2, 9, 6, 37
IGNORED = -100
FACTOR = 0.3

each_chunk_size = pytest.mark.parametrize("chunk_size", [1, 5, B * L, 100, 0])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str
)


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor


class Outcome(NamedTuple):
    loss: Tensor
    dhidden: Tensor
    dweight: Tensor


def head(dtype: torch.dtype = torch.float64, tokens: int = L) -> Head:
    """Of every seven tokens one is ignored."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((B, tokens, E), (V, E))
    )
    targets = torch.randint(V, (B, tokens), generator=random)
    targets.view(-1)[3::7] = IGNORED
    return Head(hidden, weight, targets)


def outcome(loss_sum, hidden: Tensor, weight: Tensor, *rest) -> Outcome:
    """The sum, and the gradients of FACTOR times it."""
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = loss_sum(*inputs, *rest)
    return Outcome(loss.detach(), *torch.autograd.grad(loss * FACTOR, inputs))


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")


def expected(given: Head) -> Outcome:
    return outcome(torchs, given.hidden.double(), given.weight.double(), given.targets)


# ---- numbers ----


@each_dtype
@each_chunk_size
def test_loss_and_gradients_are_torchs(chunk_size, dtype):
    given = head(dtype)
    found = outcome(head_loss_sum, *given, chunk_size)
    assert found.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (found.dhidden.dtype, found.dweight.dtype) == (dtype, dtype)
    assert not beyond_tolerance(found, expected(given), dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@each_chunk_size
def test_chunks_change_nothing_but_rounding(chunk_size, dtype, tolerance):
    given = head(dtype)
    found, whole = outcome(head_loss_sum, *given, chunk_size), outcome(head_loss_sum, *given)
    assert max(error(a, b.double()) for a, b in zip(found, whole)) <= tolerance


def test_gradients_are_finite_differences():
    given = head()

    def sum_of(hidden, weight):
        # Recomputed for each backward, of which one graph allows one.
        return checkpoint(head_loss_sum, hidden, weight, given.targets, 5, use_reentrant=False)

    assert torch.autograd.gradcheck(
        sum_of, (given.hidden.requires_grad_(), given.weight.requires_grad_())
    )


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_large_logits_overflow_nowhere(scale):
    given = head(torch.float32)
    given.hidden.mul_(scale)
    assert not beyond_tolerance(outcome(head_loss_sum, *given, 5), expected(given), torch.float32)


def test_a_weight_in_bfloat16_gets_every_chunk_of_its_gradient():
    """Added up in bfloat16, a thousand tokens of the same target would stop to count at 256."""
    hidden, weight, targets = (
        torch.ones(1, 1024, 1),
        torch.zeros(4, 1),
        torch.zeros(1, 1024, dtype=torch.int64),
    )
    found = outcome(head_loss_sum, hidden.bfloat16(), weight.bfloat16(), targets, 1)
    assert found.dweight.flatten().tolist() == pytest.approx(
        [-768 * FACTOR, *[256 * FACTOR] * 3], rel=2**-8
    )


def test_the_factor_is_not_rounded_to_bfloat16():
    factor = 1 + 3 * 2**-9  # its nearest neighbours there are 1 and 1 + 2^-7

    def dhidden(factor):
        given = head(torch.bfloat16)
        hidden = given.hidden.requires_grad_()
        return torch.autograd.grad(
            head_loss_sum(hidden, given.weight, given.targets, 5) * factor, hidden
        )[0]

    assert torch.equal(dhidden(factor), (dhidden(1.0).float() * factor).bfloat16())


# ---- tokens that do not count ----


@each_dtype
def test_ignored_tokens_leave_no_trace(dtype):
    given = head(dtype)
    ignored = given.targets == IGNORED
    found = outcome(head_loss_sum, *given, 5)
    others = given._replace(hidden=given.hidden.masked_fill(ignored.unsqueeze(-1), 7))
    assert (found.dhidden[ignored] == 0).all()
    assert all(map(torch.equal, found, outcome(head_loss_sum, *others, 5)))


@pytest.mark.parametrize("tokens", [L, 0])
@each_chunk_size
def test_without_a_token_that_counts_all_is_zero(chunk_size, tokens):
    given = head(tokens=tokens)
    found = outcome(
        head_loss_sum, given.hidden, given.weight, torch.full((B, tokens), IGNORED), chunk_size
    )
    assert all((x == 0).all() for x in found)
    assert found.dhidden.shape == given.hidden.shape


def test_which_target_is_ignored_can_be_said():
    given = head()
    zeroed = given.targets.masked_fill(given.targets == IGNORED, 0)
    found = outcome(head_loss_sum, given.hidden, given.weight, zeroed, 5, None, 0)
    ignoring = given._replace(targets=zeroed.masked_fill(zeroed == 0, IGNORED))
    assert not beyond_tolerance(found, expected(ignoring), torch.float64)


@pytest.mark.parametrize("target", [V, -1])
def test_a_target_beyond_the_vocabulary_cannot_look_well(target):
    given = head()
    given.targets[0, 0] = target
    assert not head_loss_sum(*given, 5).isfinite()


# ---- a split vocabulary ----

SPLITS = [(37,), (19, 18), (30, 7), (13, 13, 11), (37, 0), (20, 0, 17)]


class Meeting:
    """Parts in threads: what each gives is reduced once all are there. A part that does not come fails them all."""

    def __init__(self, size: int):
        self.size = size
        self.given: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(size, timeout=20)

    def part(self, number: int, start: int) -> VocabularyPart:
        return VocabularyPart(
            start,
            sum=lambda x: self.reduced(number, x, lambda given: given.sum(0)),
            max=lambda x: self.reduced(number, x, lambda given: given.amax(0)),
        )

    def reduced(self, number: int, x: Tensor, reduce) -> Tensor:
        self.given[number] = x.clone()
        self.barrier.wait()
        x.copy_(reduce(torch.stack([self.given[other] for other in range(self.size)])))
        self.barrier.wait()
        return x


def in_parts(given: Head, split: tuple[int, ...], chunk_size: int) -> list[Outcome]:
    meeting, rows = Meeting(len(split)), given.weight.split(split)

    def part_outcome(number: int) -> Outcome:
        part = meeting.part(number, sum(split[:number]))
        return outcome(head_loss_sum, given.hidden, rows[number], given.targets, chunk_size, part)

    with ThreadPoolExecutor(len(split)) as threads:
        return list(threads.map(part_outcome, range(len(split))))


def joined(parts: list[Outcome]) -> Outcome:
    """As tensor parallelism does: the shares of dhidden are added, each part has its rows of dweight."""
    dhidden = sum(part.dhidden.double() for part in parts)
    return Outcome(parts[0].loss, dhidden, torch.cat([part.dweight for part in parts]))


@each_dtype
@pytest.mark.parametrize("chunk_size", [5, 0])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_parts_of_the_vocabulary_make_the_whole(split, chunk_size, dtype):
    given = head(dtype)
    parts = in_parts(given, split, chunk_size)
    assert all(torch.equal(part.loss, parts[0].loss) for part in parts)
    assert not beyond_tolerance(joined(parts), expected(given), dtype)


def test_large_logits_overflow_in_no_part():
    given = head(torch.float32)
    given.hidden.mul_(1e4)
    assert not beyond_tolerance(
        joined(in_parts(given, (20, 0, 17), 5)), expected(given), torch.float32
    )


def test_a_target_of_no_part_cannot_look_well():
    given = head()
    given.targets[0, 0] = V
    assert not any(part.loss.isfinite() for part in in_parts(given, (19, 18), 5))


def rank_outcome(rank: int, world_size: int, split: tuple[int, ...]) -> Outcome:
    def reduce(x: Tensor, op: dist.ReduceOp) -> Tensor:
        dist.all_reduce(x, op)
        return x

    given, start = head(), sum(split[:rank])
    part = VocabularyPart(
        start, lambda x: reduce(x, dist.ReduceOp.SUM), lambda x: reduce(x, dist.ReduceOp.MAX)
    )
    weight = given.weight[start : start + split[rank]]
    return outcome(head_loss_sum, given.hidden, weight, given.targets, 5, part)


@pytest.mark.parametrize("split", [(30, 7), (20, 0, 17)], ids=str)
def test_parts_may_be_real_ranks(split):
    assert not beyond_tolerance(
        joined(run_ranks(len(split), rank_outcome, split)), expected(head()), torch.float64
    )


# ---- inside a model ----


def test_a_tied_weight_gets_both_gradients():
    given = head()
    tokens = given.targets.clamp(min=0)

    def tied(loss_sum):
        weight = given.weight.clone().requires_grad_()
        loss = loss_sum(F.embedding(tokens, weight).tanh(), weight, given.targets)
        return torch.autograd.grad(loss, weight)[0]

    assert error(tied(head_loss_sum), tied(torchs)) <= TOLERANCE[torch.float64]


def test_the_weight_may_be_freed_before_backward():
    """As ZeRO 3 does."""
    given = head()
    hidden, weight = given.hidden.requires_grad_(), torch.nn.Parameter(given.weight.clone())
    loss = head_loss_sum(hidden, weight, given.targets, 5)
    weight.data = weight.new_empty(0)
    dhidden, dweight = torch.autograd.grad(loss * FACTOR, (hidden, weight))
    assert not beyond_tolerance(
        Outcome(loss.detach(), dhidden, dweight), expected(given), torch.float64
    )


def test_a_gradient_of_the_gradient_is_refused():
    given = head()
    hidden = given.hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(head_loss_sum(hidden, *given[1:]), hidden, create_graph=True)


def test_a_second_backward_is_refused():
    given = head()
    hidden = given.hidden.requires_grad_()
    loss = head_loss_sum(hidden, *given[1:])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- what it costs ----


class Watch(TorchDispatchMode):
    """Which operators ran, how often, and the most numbers that any of them gave."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        self.largest = max(self.largest, out.numel() if isinstance(out, Tensor) else 0)
        return out

    @property
    def products(self) -> int:
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_", "bmm"))


@each_dtype
@pytest.mark.parametrize(
    ("wanted", "products"),
    [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)],
)
def test_a_chunk_takes_the_products_that_are_asked_for(wanted, products, dtype):
    given = head(dtype)
    for tensor, wants in zip(given, wanted):
        tensor.requires_grad_(wants)
    with Watch() as forward:
        loss = head_loss_sum(*given, 5)
    assert forward.products == 4 * products
    assert loss.requires_grad == any(wanted)
    if loss.requires_grad:
        with Watch() as backward:
            loss.backward()
        assert backward.products == 0
    assert [tensor.grad is not None for tensor in given[:2]] == list(wanted)


def test_validation_takes_no_gradient():
    given = head()
    for tensor in given[:2]:
        tensor.requires_grad_()
    with Watch() as watch, torch.no_grad():
        loss = head_loss_sum(*given, 5)
    assert watch.products == 4
    assert not loss.requires_grad
    assert not {"scatter_add_", "zeros_like", "empty_like"} & set(watch.calls)


@each_dtype
@pytest.mark.parametrize("chunk_size", [7, 16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunk_size, dtype):
    given = head(dtype, tokens=20)
    with Watch() as watch:
        outcome(head_loss_sum, *given, chunk_size)
    assert watch.largest == chunk_size * V


@each_dtype
def test_more_tokens_take_memory_for_their_gradient_alone(dtype):
    def beyond_gradients(tokens: int) -> int:
        given = head(dtype, tokens)
        inputs = [x.requires_grad_() for x in given[:2]]
        with LiveMemory() as live:
            (head_loss_sum(*given, 16) * FACTOR).backward()
        return live.peak - sum(x.grad.nbytes for x in inputs)

    assert len({beyond_gradients(tokens) for tokens in (16, 64, 256)}) == 1


def test_the_host_never_waits_for_a_number():
    """Fake tensors have none: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        hidden, weight = (
            torch.randn(B, L, E, requires_grad=True),
            torch.randn(V, E, requires_grad=True),
        )
        head_loss_sum(hidden, weight, torch.randint(V, (B, L)), 5).backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)
