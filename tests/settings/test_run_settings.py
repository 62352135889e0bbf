"""Settings are resolved before any process group exists; all problems are reported together."""

import re

import pytest

from megatron_ring.errors import ConfigError, KernelUnavailable
from megatron_ring.kernels.attention.machine import Machine
from megatron_ring.kernels.attention.registry import SUPPORT, Feature, Unsupported
from megatron_ring.settings import run_settings
from megatron_ring.settings.run_settings import RunSettings
from megatron_ring.training import console
from tests.training import tiny


def problems(world_size: int, **sections) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        RunSettings.resolve(tiny.config(**sections), world_size)
    return raised.value.problems


def test_a_length_that_the_layout_cannot_divide_is_refused_with_the_nearest_ones():
    zigzag = {"context_parallel": "zigzag"}
    [problem] = problems(4, parallel=zigzag, data={"seq_length": 8190})
    assert problem.startswith("seq_length 8190 ")
    for part in ("zigzag", "4 ring ranks", "multiple of 8", "8184, 8192"):
        assert part in problem
    assert "--seq-length" in problem
    assert "Any length: --context-parallel striped with --stripe-size 1." in problem


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", ["zigzag", "ring", "striped"])
def test_the_remedy_for_a_length_that_does_not_divide_is_accepted(name, sequence_parallel):
    """The flags after "Any length" of the error make the same length legal."""
    data = {"seq_length": 8189}
    axes = {"tensor_model_parallel_size": 2} if sequence_parallel else {}
    axes["sequence_parallel"] = sequence_parallel
    refused = {"context_parallel": name, "stripe_size": 8 if name == "striped" else 1}
    [problem] = problems(4, parallel=axes | refused, data=data)
    layout, stripe_size = re.search(
        r"Any length: --context-parallel (\w+) with --stripe-size (\d+)", problem
    ).groups()
    remedy = {"context_parallel": layout, "stripe_size": int(stripe_size)}
    RunSettings.resolve(tiny.config(parallel=axes | remedy, data=data), 4)


def test_context_ranks_that_do_not_divide_the_world_are_refused():
    [problem] = problems(4, parallel={"context_parallel_size": 3})
    assert problem.startswith("context_parallel_size 3 ")
    for part in ("4 processes", "1, 2, 4", "--context-parallel-size"):
        assert part in problem


def test_a_stripe_size_without_the_striped_layout_is_refused():
    [problem] = problems(2, parallel={"context_parallel": "ring", "stripe_size": 4})
    assert problem.startswith("stripe_size 4 ")
    for part in ("context_parallel is ring", "--stripe-size 1", "--context-parallel striped"):
        assert part in problem


def test_striped_single_tokens_support_any_length_by_padding():
    def padded_length(world_size: int, seq_length: int = 47, **parallel) -> int:
        config = tiny.config(data={"seq_length": seq_length}, parallel=parallel)
        return RunSettings.resolve(config, world_size).layout.seq_length

    assert padded_length(4) == 48
    assert padded_length(3, stripe_size=1) == 48
    assert padded_length(4, seq_length=48) == 48
    assert padded_length(8, ulysses_degree=4) == 48
    [problem] = problems(4, parallel={"stripe_size": 2}, data={"seq_length": 47})
    assert problem.startswith("seq_length 47 ")
    for part in ("striped", "4 ring ranks", "multiple of 8"):
        assert part in problem


def test_all_problems_are_reported_together():
    messages = problems(
        4,
        model={"hidden_size": 30},
        parallel={"context_parallel": "ring"},
        data={"seq_length": 47},
        training={"min_lr": 1.0, "lr_warmup_iters": 20},
        checkpoint={"save_interval": 5},
    )
    values = [
        "hidden_size 30",
        "min_lr 1.0",
        "lr_warmup_iters 20",
        "save_interval 5",
        "seq_length 47",
    ]
    for message, value in zip(messages, values, strict=True):
        assert message.startswith(value)


def test_the_default_batch_is_one_micro_batch_on_each_data_rank():
    config = tiny.config(
        parallel={"context_parallel_size": 2},
        training={"global_batch_size": 0, "micro_batch_size": 3},
    )
    setup = RunSettings.resolve(config, 4)
    assert (setup.grid.data, setup.grid.ring) == (2, 2)
    assert (setup.global_batch_size, setup.micro_batches) == (6, 1)


def test_context_ranks_default_to_all_remaining_processes():
    assert RunSettings.resolve(tiny.config(), 4).grid.ring == 4


def test_ulysses_ranks_divide_the_tokens_of_a_shard():
    setup = RunSettings.resolve(
        tiny.config(parallel={"ulysses_degree": 2, "tensor_model_parallel_size": 2}), 8
    )
    assert (setup.layout.shard_length, setup.tokens_per_rank) == (24, 12)


def test_an_unsupported_kernel_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(
        SUPPORT[Feature.FLOAT32],
        ("sdpa", "cpu"),
        Unsupported("removed by this test", "Set another"),
    )
    with pytest.raises(
        KernelUnavailable, match="sdpa .* float32: removed by this test. Set another."
    ):
        RunSettings.resolve(tiny.config(parallel={"attention_kernel": "sdpa"}), 2)
    assert RunSettings.resolve(tiny.config(), 2).kernel.name == "reference"


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ({"attention_dropout": 0.1}, "Set --attention-dropout 0"),
        ({"attn_logit_softcapping": 50.0}, "softcapping 0"),
    ],
)
def test_a_feature_without_a_kernel_is_refused(model, remedy):
    with pytest.raises(KernelUnavailable, match=remedy):
        RunSettings.resolve(tiny.config(model=model), 2)


def test_auto_chooses_the_widest_stripes_that_suit_the_kernel_and_the_mask():
    def stripe(**sections) -> int:
        return RunSettings.resolve(tiny.config(**sections), 2).layout.stripe_size

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


H100 = Machine("NVIDIA H100 80GB HBM3", (9, 0), cudnn=91501, triton=True)


@pytest.fixture
def on_gpu(monkeypatch):
    """Return a function that resolves settings as on a machine with such a GPU."""

    def resolve(machine: Machine, world_size: int = 8, **sections) -> RunSettings:
        monkeypatch.setattr(run_settings, "device_type", lambda: "cuda")
        monkeypatch.setattr(Machine, "here", staticmethod(lambda: machine))
        sections["training"] = {"dtype": "bf16"} | sections.get("training", {})
        return RunSettings.resolve(tiny.config(**sections), world_size)

    return resolve


ONE_DOCUMENT = {"seq_length": 65536}
PACKED = {"seq_length": 65536, "reset_attention_mask": True}
STRIPES_ON_H100 = [
    ("one document", {"data": ONE_DOCUMENT}, "cudnn", 4096),
    ("documents", {"data": PACKED}, "triton", 128),
    ("fewer than 32 rounds", {"data": PACKED | {"seq_length": 16384}}, "triton", 1),
    ("a window", {"data": ONE_DOCUMENT, "model": {"window_size": 4096}}, "triton", 128),
    ("a short window", {"data": ONE_DOCUMENT, "model": {"window_size": 100}}, "triton", 128),
    ("fp32", {"data": ONE_DOCUMENT, "training": {"dtype": "fp32"}}, "sdpa", 4096),
    ("fp32 documents", {"data": PACKED, "training": {"dtype": "fp32"}}, "sdpa", 1),
    ("ragged", {"data": {"seq_length": 65535 + 9}}, "cudnn", 1),
    ("padded", {"data": {"seq_length": 65535}}, "cudnn", 4096),
    ("deterministic", {"data": ONE_DOCUMENT, "training": {"deterministic": True}}, "triton", 4096),
    (
        "invariant",
        {"data": ONE_DOCUMENT, "parallel": {"context_parallel_reduction": "invariant"}},
        "triton",
        1,
    ),
    ("Ulysses", {"data": ONE_DOCUMENT, "parallel": {"ulysses_degree": 2}}, "cudnn", 8192),
    ("Ulysses alone", {"data": ONE_DOCUMENT, "parallel": {"ulysses_degree": 8}}, "cudnn", 1),
    ("by name", {"data": PACKED, "parallel": {"attention_kernel": "cudnn"}}, "cudnn", 1),
    ("a given size", {"data": ONE_DOCUMENT, "parallel": {"stripe_size": 64}}, "cudnn", 64),
    ("zigzag", {"data": ONE_DOCUMENT, "parallel": {"context_parallel": "zigzag"}}, "cudnn", 1),
]


@pytest.mark.parametrize(
    ("sections", "kernel", "stripe_size"),
    [row[1:] for row in STRIPES_ON_H100],
    ids=[row[0] for row in STRIPES_ON_H100],
)
def test_on_a_gpu_the_stripes_are_the_fastest_with_the_kernel(
    sections, kernel, stripe_size, on_gpu
):
    model = {"num_attention_heads": 8, "hidden_size": 64} | sections.get("model", {})
    setup = on_gpu(H100, **sections | {"model": model})
    assert (setup.kernel.name, setup.layout.stripe_size) == (kernel, stripe_size)


def test_the_console_has_the_measurement_that_decided_the_stripes(on_gpu):
    def line(machine: Machine, **sections) -> str:
        return console._layout_description(on_gpu(machine, **sections))

    one_document = line(H100, data=ONE_DOCUMENT)
    assert "striped, stripe size 4096 (auto: fastest with cudnn and a causal mask" in one_document
    assert "as measured (commit 58ca893" in one_document
    h200 = Machine("NVIDIA H200", (9, 0), cudnn=91501, triton=True)
    assert "as measured with documents on NVIDIA H100 80GB HBM3" in line(h200, data=PACKED)
    assert line(H100, world_size=1, data=ONE_DOCUMENT) == "striped"
    ragged = line(H100, data={"seq_length": 65544})
    assert "stripe size 1 (auto: single tokens, because wider stripes, fastest with cudnn" in ragged
    assert "need samples of a multiple of 16 tokens on 8 ring ranks, not 65544" in ragged


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"data": {"reset_attention_mask": True}},
            "striped, stripe size 1 (auto: single tokens, because wider stripes, fastest with "
            "sdpa, need packed samples of a multiple of 1024 tokens on 4 ring ranks, not 48)",
        ),
        (
            {"data": {"reset_attention_mask": True, "seq_length": 1024}},
            "striped, stripe size 1 (auto: single tokens, because wider stripes, fastest with "
            "sdpa, need packed samples of at least 16384 tokens on 4 ring ranks, not 1024)",
        ),
        (
            {"parallel": {"attention_kernel": "reference"}},
            "striped, stripe size 1 (auto: fastest with reference)",
        ),
        (
            {"data": {"seq_length": 8192}},
            "striped, stripe size 1024 (auto: fastest with sdpa)",
        ),
        ({"parallel": {"stripe_size": 2}}, "striped, stripe size 2"),
        ({"parallel": {"context_parallel_reduction": "invariant"}}, "striped, stripe size 1"),
        ({"parallel": {"context_parallel": "ring"}}, "ring"),
    ],
)
def test_on_a_cpu_too_the_layout_has_the_stripe_size_and_the_reason(sections, line):
    assert console._layout_description(RunSettings.resolve(tiny.config(**sections), 4)) == line


@pytest.mark.parametrize(
    ("seq_length", "window", "layers", "frequency", "kernel", "stripe_size"),
    [
        (131072, 1024, 8, 4, "cudnn", 8192),
        (32768, 4096, 8, 4, "triton", 128),
        (131072, 1024, 8, 0, "triton", 128),
    ],
)
def test_where_some_layers_have_no_window_the_costlier_mask_decides(
    seq_length, window, layers, frequency, kernel, stripe_size, on_gpu
):
    model = {
        "num_layers": layers,
        "window_size": window,
        "window_attn_skip_freq": frequency,
    }
    setup = on_gpu(H100, model=model, data={"seq_length": seq_length})
    assert (setup.kernel.name, setup.layout.stripe_size) == (kernel, stripe_size)


def test_a_config_that_is_saved_on_a_gpu_resolves_anew_elsewhere(on_gpu, monkeypatch):
    """A checkpoint stores the option, not the stripe size of the device that wrote it."""
    written = on_gpu(H100, data=ONE_DOCUMENT)
    assert written.config.parallel.stripe_size == "auto"
    monkeypatch.undo()
    read = RunSettings.resolve(written.config, 8)
    assert (read.layout.stripe_size, written.layout.stripe_size) == (2048, 4096)
    assert read.layout.seq_length == written.layout.seq_length


def test_a_window_of_all_layers_counts_for_the_placement_of_documents():
    placed = {"parallel": {"document_placement": "auto"}, "data": {"reset_attention_mask": True}}

    def window(**model) -> int:
        return RunSettings.resolve(tiny.config(model=model, **placed), 2).layout.placement.window

    assert window() == 0
    assert window(window_size=7) == 7
    assert window(window_size=7, window_attn_skip_freq=2) == 0
