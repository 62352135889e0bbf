"""What cannot work is refused before a process group forms, all of it at once, each with its rule and its flag."""

import pytest

from megatron_ring.errors import ConfigError, KernelUnavailable
from megatron_ring.kernels.attention.support import SUPPORT, Feature, Unsupported
from megatron_ring.settings.setup import Setup
from tests.training import tiny


def problems(world_size: int, **sections) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        Setup.of(tiny.config(**sections), world_size)
    return refused.value.problems


def test_a_length_that_the_layout_cannot_take_names_the_nearest_ones_and_the_way_out():
    zigzag = {"context_parallel": "zigzag"}
    assert problems(4, parallel=zigzag, data={"seq_length": 8190}) == [
        "seq_length 8190 cannot be laid out zigzag on 4 ring ranks: it must be a multiple of 8 (2 x ring size). "
        "Nearest: 8184, 8192. Set --seq-length, or use --context-parallel striped (multiple of 4)."
    ]


def test_context_ranks_that_do_not_divide_the_world():
    assert problems(4, parallel={"context_parallel_size": 3}) == [
        "context_parallel_size 3 does not divide the 4 processes that run. Legal: 1, 2, 4. "
        "Set --context-parallel-size, or start another number of processes."
    ]


def test_a_stripe_without_stripes():
    assert problems(2, parallel={"context_parallel": "ring", "stripe_size": 4}) == [
        "stripe_size 4 has no effect while context_parallel is ring. "
        "Set --stripe-size 1, or --context-parallel striped."
    ]


def test_single_striped_tokens_are_dealt_out_whatever_their_number():
    assert Setup.of(tiny.config(data={"seq_length": 47}), 4).layout.seq_length == 48
    assert (
        Setup.of(
            tiny.config(data={"seq_length": 47}, parallel={"stripe_size": 1}), 3
        ).layout.seq_length
        == 48
    )
    assert Setup.of(tiny.config(data={"seq_length": 48}), 4).layout.seq_length == 48
    assert (
        Setup.of(
            tiny.config(data={"seq_length": 47}, parallel={"ulysses_degree": 4}), 8
        ).layout.seq_length
        == 48
    )
    (said,) = problems(4, parallel={"stripe_size": 2}, data={"seq_length": 47})
    assert said.startswith(
        "seq_length 47 cannot be laid out striped on 4 ring ranks: it must be a multiple of 8"
    )


def test_all_problems_are_said_at_once():
    found = problems(
        4,
        model={"hidden_size": 30},
        parallel={"context_parallel": "ring"},
        data={"seq_length": 47},
        training={"min_lr": 1.0, "lr_warmup_iters": 20},
        checkpoint={"save_interval": 5},
    )
    named = [
        "hidden_size 30",
        "min_lr 1.0",
        "lr_warmup_iters 20",
        "save_interval 5",
        "seq_length 47",
    ]
    assert [problem.startswith(name) for problem, name in zip(found, named, strict=True)] == [
        True
    ] * 5


def test_the_default_batch_is_one_micro_batch_on_each_data_rank():
    config = tiny.config(
        parallel={"context_parallel_size": 2},
        training={"global_batch_size": 0, "micro_batch_size": 3},
    )
    setup = Setup.of(config, 4)
    assert (setup.grid.data, setup.grid.ring) == (2, 2)
    assert (setup.global_batch_size, setup.micro_batches) == (6, 1)


def test_context_ranks_default_to_all_that_is_left():
    assert Setup.of(tiny.config(), 4).grid.ring == 4


def test_what_a_process_is_handed_of_a_sequence():
    setup = Setup.of(
        tiny.config(parallel={"ulysses_degree": 2, "tensor_model_parallel_size": 2}), 8
    )
    assert (setup.layout.shard_length, setup.resident_length) == (24, 12)


def test_a_kernel_that_cannot_serve_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(
        SUPPORT[Feature.FLOAT32],
        ("sdpa", "cpu"),
        Unsupported("this test took it away", "Set another"),
    )
    with pytest.raises(
        KernelUnavailable, match="sdpa cannot do float32: this test took it away. Set another."
    ):
        Setup.of(tiny.config(parallel={"attention_kernel": "sdpa"}), 2)
    assert Setup.of(tiny.config(), 2).kernel.name == "reference"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"attention_dropout": 0.1}, "Set --attention-dropout 0"),
        ({"attn_logit_softcapping": 50.0}, "softcapping 0"),
    ],
)
def test_what_no_kernel_does_is_refused(model, said):
    with pytest.raises(KernelUnavailable, match=said):
        Setup.of(tiny.config(model=model), 2)


def test_stripes_are_as_wide_as_the_kernel_likes_where_nothing_speaks_against_it():
    def stripe(**sections) -> int:
        return Setup.of(tiny.config(**sections), 2).layout.stripe_size

    assert stripe(data={"seq_length": 32768}) == 2048
    assert stripe(data={"seq_length": 2048}) == 512
    assert stripe(data={"seq_length": 512}) == 128
    assert stripe(data={"seq_length": 500}) == 1
    assert stripe(data={"seq_length": 2048}, parallel={"stripe_size": 4}) == 4
    assert stripe(data={"seq_length": 2048}, parallel={"attention_kernel": "reference"}) == 1
    assert stripe(data={"seq_length": 2048, "reset_attention_mask": True}) == 1
    assert stripe(data={"seq_length": 8192, "reset_attention_mask": True}) == 128, "32 rounds"
    assert stripe(data={"seq_length": 131072, "reset_attention_mask": True}) == 1024, (
        "a round of 2,048 tokens"
    )
    assert stripe(data={"seq_length": 8192}, model={"window_size": 2048}) == 512, (
        "two rounds in a window"
    )
    assert stripe(data={"seq_length": 8192}, model={"window_size": 100}) == 128, (
        "no width is narrow enough"
    )
    assert stripe(data={"seq_length": 500}, model={"window_size": 100}) == 1
    assert stripe(data={"seq_length": 2048}, parallel={"context_parallel": "zigzag"}) == 1
    assert (
        stripe(data={"seq_length": 2048}, parallel={"context_parallel_reduction": "invariant"}) == 1
    )
