from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from megatron_ring.parallel.stages import layers_of_stage

sizes = st.integers(1, 9)


def test_seven_layers_over_three_stages():
    assert [layers_of_stage(7, 3, stage) for stage in range(3)] == [
        range(0, 3),
        range(3, 5),
        range(5, 7),
    ]


@given(st.integers(0, 40), sizes)
def test_every_layer_lies_on_one_stage_in_order(num_layers, stages):
    dealt = [layers_of_stage(num_layers, stages, stage) for stage in range(stages)]
    assert list(chain.from_iterable(dealt)) == list(range(num_layers))


@given(st.integers(0, 40), sizes)
def test_no_stage_holds_more_than_one_layer_above_another_and_the_first_hold_most(
    num_layers, stages
):
    held = [len(layers_of_stage(num_layers, stages, stage)) for stage in range(stages)]
    assert held == sorted(held, reverse=True)
    assert held[0] - held[-1] <= 1
