"""Which layers a pipeline stage holds: runs of them, as even as they come. Pure arithmetic."""


def layers_of_stage(num_layers: int, stages: int, stage: int) -> range:
    """The layers of ``stage``, counted from 0: a run; the first ``num_layers % stages`` stages hold one more.

    The extra ones go first, because the last stage has the head to compute besides.
    """
    assert 0 <= stage < stages
    share, extra = divmod(num_layers, stages)
    start = stage * share + min(stage, extra)
    return range(start, start + share + (stage < extra))
