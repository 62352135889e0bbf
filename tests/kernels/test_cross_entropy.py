"""The chunked head against torch's in float64: F.cross_entropy(hidden @ weight.T)."""

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
from megatron_ring.kernels.cross_entropy import (
    TokenScores,
    VocabularyPart,
    head_loss_sum,
    head_token_scores,
)
from tests.distributed import run_ranks
from tests.tolerances import TOLERANCE, beyond_tolerance, error

B, L, E, V = 2, 9, 6, 37
IGNORE_INDEX = -100
FACTOR = 0.3

each_chunk_size = pytest.mark.parametrize("chunk_size", [1, 5, B * L, 100, 0])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str
)


class Head(NamedTuple):
    """The inputs of the loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


class Outcome(NamedTuple):
    """The loss, and the gradients of FACTOR times the loss."""

    loss: Tensor
    dhidden: Tensor
    dweight: Tensor


def head(dtype: torch.dtype = torch.float64, tokens: int = L) -> Head:
    """Random inputs; one of every seven tokens is ignored."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((B, tokens, E), (V, E))
    )
    targets = torch.randint(V, (B, tokens), generator=random)
    targets.view(-1)[3::7] = IGNORE_INDEX
    return Head(hidden, weight, targets)


def outcome(loss_sum, hidden: Tensor, weight: Tensor, *rest) -> Outcome:
    inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = loss_sum(*inputs, *rest)
    return Outcome(loss.detach(), *torch.autograd.grad(loss * FACTOR, inputs))


def torch_loss_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")


def expected(inputs: Head) -> Outcome:
    return outcome(torch_loss_sum, inputs.hidden.double(), inputs.weight.double(), inputs.targets)


# ---- numbers ----


@each_dtype
@each_chunk_size
def test_loss_and_gradients_match_torchs(chunk_size, dtype):
    inputs = head(dtype)
    result = outcome(head_loss_sum, *inputs, chunk_size)
    assert result.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert (result.dhidden.dtype, result.dweight.dtype) == (dtype, dtype)
    assert not beyond_tolerance(result, expected(inputs), dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@each_chunk_size
def test_chunks_change_only_rounding(chunk_size, dtype, tolerance):
    inputs = head(dtype)
    result = outcome(head_loss_sum, *inputs, chunk_size)
    whole = outcome(head_loss_sum, *inputs)
    assert max(error(a, b.double()) for a, b in zip(result, whole)) <= tolerance


def test_gradients_match_finite_differences():
    inputs = head()

    def sum_of(hidden, weight):
        # Recomputed for each backward, because a graph supports only one.
        return checkpoint(head_loss_sum, hidden, weight, inputs.targets, 5, use_reentrant=False)

    assert torch.autograd.gradcheck(
        sum_of, (inputs.hidden.requires_grad_(), inputs.weight.requires_grad_())
    )


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6])
def test_large_logits_do_not_overflow(scale):
    inputs = head(torch.float32)
    inputs.hidden.mul_(scale)
    assert not beyond_tolerance(outcome(head_loss_sum, *inputs, 5), expected(inputs), torch.float32)


def test_a_weight_in_bfloat16_gets_every_chunk_of_its_gradient():
    """In bfloat16 the sum over a thousand tokens of the same target would stop growing at 256."""
    hidden = torch.ones(1, 1024, 1)
    weight = torch.zeros(4, 1)
    targets = torch.zeros(1, 1024, dtype=torch.int64)
    result = outcome(head_loss_sum, hidden.bfloat16(), weight.bfloat16(), targets, 1)
    assert result.dweight.flatten().tolist() == pytest.approx(
        [-768 * FACTOR, *[256 * FACTOR] * 3], rel=2**-8
    )


def test_the_factor_is_not_rounded_to_bfloat16():
    factor = 1 + 3 * 2**-9  # between 1 and 1 + 2^-7, which are neighbours in bfloat16

    def dhidden(factor):
        inputs = head(torch.bfloat16)
        hidden = inputs.hidden.requires_grad_()
        return torch.autograd.grad(
            head_loss_sum(hidden, inputs.weight, inputs.targets, 5) * factor, hidden
        )[0]

    assert torch.equal(dhidden(factor), (dhidden(1.0).float() * factor).bfloat16())


# ---- ignored and invalid targets ----


@each_dtype
def test_ignored_tokens_affect_nothing(dtype):
    inputs = head(dtype)
    ignored = inputs.targets == IGNORE_INDEX
    result = outcome(head_loss_sum, *inputs, 5)
    changed = inputs._replace(hidden=inputs.hidden.masked_fill(ignored.unsqueeze(-1), 7))
    assert (result.dhidden[ignored] == 0).all()
    assert all(map(torch.equal, result, outcome(head_loss_sum, *changed, 5)))


@pytest.mark.parametrize("tokens", [L, 0])
@each_chunk_size
def test_if_every_token_is_ignored_all_results_are_zero(chunk_size, tokens):
    inputs = head(tokens=tokens)
    result = outcome(
        head_loss_sum,
        inputs.hidden,
        inputs.weight,
        torch.full((B, tokens), IGNORE_INDEX),
        chunk_size,
    )
    assert all((x == 0).all() for x in result)
    assert result.dhidden.shape == inputs.hidden.shape


def test_the_ignored_target_can_be_chosen():
    inputs = head()
    zeroed = inputs.targets.masked_fill(inputs.targets == IGNORE_INDEX, 0)
    result = outcome(head_loss_sum, inputs.hidden, inputs.weight, zeroed, 5, None, 0)
    ignoring = inputs._replace(targets=zeroed.masked_fill(zeroed == 0, IGNORE_INDEX))
    assert not beyond_tolerance(result, expected(ignoring), torch.float64)


@pytest.mark.parametrize("target", [V, -1])
def test_the_loss_of_a_target_outside_the_vocabulary_is_not_finite(target):
    inputs = head()
    inputs.targets[0, 0] = target
    assert not head_loss_sum(*inputs, 5).isfinite()


# ---- a split vocabulary ----

SPLITS = [(37,), (19, 18), (30, 7), (13, 13, 11), (37, 0), (20, 0, 17)]


class ThreadedReduction:
    """An all-reduce over parts in threads; it fails in all of them if a part does not call it."""

    def __init__(self, size: int):
        self.size = size
        self.operands: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(size, timeout=20)

    def part(self, number: int, start: int) -> VocabularyPart:
        return VocabularyPart(
            start,
            sum=lambda x: self.all_reduce(number, x, lambda stacked: stacked.sum(0)),
            max=lambda x: self.all_reduce(number, x, lambda stacked: stacked.amax(0)),
        )

    def all_reduce(self, number: int, x: Tensor, reduce) -> Tensor:
        self.operands[number] = x.clone()
        self.barrier.wait()
        x.copy_(reduce(torch.stack([self.operands[part] for part in range(self.size)])))
        self.barrier.wait()
        return x


def in_parts(inputs: Head, split: tuple[int, ...], chunk_size: int) -> list[Outcome]:
    reduction = ThreadedReduction(len(split))
    rows = inputs.weight.split(split)

    def part_outcome(number: int) -> Outcome:
        part = reduction.part(number, sum(split[:number]))
        return outcome(head_loss_sum, inputs.hidden, rows[number], inputs.targets, chunk_size, part)

    with ThreadPoolExecutor(len(split)) as threads:
        return list(threads.map(part_outcome, range(len(split))))


def joined(parts: list[Outcome]) -> Outcome:
    """Combine parts as tensor parallelism does: sum dhidden, concatenate the rows of dweight."""
    dhidden = sum(part.dhidden.double() for part in parts)
    return Outcome(parts[0].loss, dhidden, torch.cat([part.dweight for part in parts]))


@each_dtype
@pytest.mark.parametrize("chunk_size", [5, 0])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_parts_of_the_vocabulary_match_the_whole(split, chunk_size, dtype):
    inputs = head(dtype)
    parts = in_parts(inputs, split, chunk_size)
    assert all(torch.equal(part.loss, parts[0].loss) for part in parts)
    assert not beyond_tolerance(joined(parts), expected(inputs), dtype)


def test_large_logits_do_not_overflow_in_any_part():
    inputs = head(torch.float32)
    inputs.hidden.mul_(1e4)
    assert not beyond_tolerance(
        joined(in_parts(inputs, (20, 0, 17), 5)), expected(inputs), torch.float32
    )


def test_the_loss_of_a_target_outside_all_parts_is_not_finite():
    inputs = head()
    inputs.targets[0, 0] = V
    assert not any(part.loss.isfinite() for part in in_parts(inputs, (19, 18), 5))


def rank_outcome(rank: int, world_size: int, split: tuple[int, ...]) -> Outcome:
    def reduce(x: Tensor, op: dist.ReduceOp) -> Tensor:
        dist.all_reduce(x, op)
        return x

    inputs = head()
    start = sum(split[:rank])
    part = VocabularyPart(
        start,
        sum=lambda x: reduce(x, dist.ReduceOp.SUM),
        max=lambda x: reduce(x, dist.ReduceOp.MAX),
    )
    weight = inputs.weight[start : start + split[rank]]
    return outcome(head_loss_sum, inputs.hidden, weight, inputs.targets, 5, part)


@pytest.mark.parametrize("split", [(30, 7), (20, 0, 17)], ids=str)
def test_the_parts_of_real_ranks_match_the_whole(split):
    assert not beyond_tolerance(
        joined(run_ranks(len(split), rank_outcome, split)), expected(head()), torch.float64
    )


# ---- the score of each token ----


def scores_of(inputs: Head, split: tuple[int, ...], chunk_size: int) -> list[TokenScores]:
    """Return the scores that each part of the vocabulary computes."""
    reduction = ThreadedReduction(len(split))
    hidden, targets = inputs.hidden.flatten(0, 1), inputs.targets.flatten()

    def of_part(number: int) -> TokenScores:
        part = reduction.part(number, sum(split[:number])) if len(split) > 1 else None
        rows = inputs.weight.split(split)[number]
        return head_token_scores(hidden, rows, targets, chunk_size, part)

    with ThreadPoolExecutor(len(split)) as threads:
        return list(threads.map(of_part, range(len(split))))


@each_dtype
@pytest.mark.parametrize("chunk_size", [5, 0])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_scores_of_tokens_match_torchs(split, chunk_size, dtype):
    inputs = head(dtype)
    # Half of the targets are the likeliest ones, and row 36 equals row 12 in another part.
    inputs.weight[36] = inputs.weight[12]
    logits = (inputs.hidden @ inputs.weight.T).double()
    likeliest = logits.argmax(-1)
    counts = inputs.targets != IGNORE_INDEX
    inputs.targets[0] = torch.where(counts[0], likeliest[0], IGNORE_INDEX)
    inputs.targets[1, likeliest[1] == 12] = 36
    targets = inputs.targets.clamp(min=0)
    of_targets = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1) * counts
    for scores in scores_of(inputs, split, chunk_size):
        assert error(scores.log_likelihood_N, of_targets.flatten()) < TOLERANCE[dtype]
        expected_greedy = ((likeliest == inputs.targets) & counts).flatten()
        assert torch.equal(scores.is_greedy_N, expected_greedy)
        assert expected_greedy.any()
        assert not expected_greedy.all()


# ---- inside a model ----


def test_a_tied_weight_gets_both_gradients():
    inputs = head()
    tokens = inputs.targets.clamp(min=0)

    def tied(loss_sum):
        weight = inputs.weight.clone().requires_grad_()
        loss = loss_sum(F.embedding(tokens, weight).tanh(), weight, inputs.targets)
        return torch.autograd.grad(loss, weight)[0]

    assert error(tied(head_loss_sum), tied(torch_loss_sum)) <= TOLERANCE[torch.float64]


def test_the_weight_may_be_freed_before_backward():
    """ZeRO 3 frees it."""
    inputs = head()
    hidden, weight = inputs.hidden.requires_grad_(), torch.nn.Parameter(inputs.weight.clone())
    loss = head_loss_sum(hidden, weight, inputs.targets, 5)
    weight.data = weight.new_empty(0)
    dhidden, dweight = torch.autograd.grad(loss * FACTOR, (hidden, weight))
    assert not beyond_tolerance(
        Outcome(loss.detach(), dhidden, dweight), expected(inputs), torch.float64
    )


def test_a_gradient_of_the_gradient_is_refused():
    inputs = head()
    hidden = inputs.hidden.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(head_loss_sum(hidden, *inputs[1:]), hidden, create_graph=True)


def test_a_second_backward_is_refused():
    inputs = head()
    hidden = inputs.hidden.requires_grad_()
    loss = head_loss_sum(hidden, *inputs[1:])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- operators and memory ----


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run, and the elements of their largest result."""

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
        """The number of matrix products."""
        return sum(self.calls[name] for name in ("mm", "addmm", "addmm_", "bmm"))


@each_dtype
@pytest.mark.parametrize(
    ("required", "products"),
    [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)],
)
def test_a_chunk_computes_only_the_products_of_required_gradients(required, products, dtype):
    inputs = head(dtype)
    for tensor, requires_grad in zip(inputs, required):
        tensor.requires_grad_(requires_grad)
    with OperatorCounter() as forward:
        loss = head_loss_sum(*inputs, 5)
    assert forward.products == 4 * products
    assert loss.requires_grad == any(required)
    if loss.requires_grad:
        with OperatorCounter() as backward:
            loss.backward()
        assert backward.products == 0
    assert [tensor.grad is not None for tensor in inputs[:2]] == list(required)


def test_no_gradient_is_computed_under_no_grad():
    inputs = head()
    for tensor in inputs[:2]:
        tensor.requires_grad_()
    with OperatorCounter() as counter, torch.no_grad():
        loss = head_loss_sum(*inputs, 5)
    assert counter.products == 4
    assert not loss.requires_grad
    assert not {"scatter_add_", "zeros_like", "empty_like"} & set(counter.calls)


@each_dtype
@pytest.mark.parametrize("chunk_size", [7, 16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(chunk_size, dtype):
    inputs = head(dtype, tokens=20)
    with OperatorCounter() as counter:
        outcome(head_loss_sum, *inputs, chunk_size)
    assert counter.largest == chunk_size * V


@each_dtype
def test_more_tokens_need_memory_only_for_their_gradient(dtype):
    def beyond_gradients(tokens: int) -> int:
        inputs = head(dtype, tokens)
        differentiated = [x.requires_grad_() for x in inputs[:2]]
        with LiveMemory() as live:
            (head_loss_sum(*inputs, 16) * FACTOR).backward()
        return live.peak - sum(x.grad.nbytes for x in differentiated)

    assert len({beyond_gradients(tokens) for tokens in (16, 64, 256)}) == 1


def test_the_host_does_not_wait_for_values():
    """Fake tensors have no values: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        hidden = torch.randn(B, L, E, requires_grad=True)
        weight = torch.randn(V, E, requires_grad=True)
        head_loss_sum(hidden, weight, torch.randint(V, (B, L)), 5).backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)
