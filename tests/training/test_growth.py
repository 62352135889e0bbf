"""Memory does not grow with the number of steps: no object of a finished step is kept."""

import re
from pathlib import Path

import pytest

from tests.programs import free_port, start_rank, working_folder

COUNTING_OBJECTS = Path(__file__).with_name("counting_objects.py")
CONFIG = """\
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [0.9, 0.1], reset_attention_mask: true}
training: {train_iters: 141, lr_warmup_iters: 1, eval_interval: 0, dtype: fp32}
logging: {metrics_file: metrics.jsonl}
"""
# There are 100 steps between the two counts: one object kept for each would make 100.
MAX_GROWTH = 20


@pytest.mark.whole
def test_the_number_of_objects_does_not_grow_with_steps(tmp_path):
    """Packed documents give every step another mask; two ranks exchange messages."""
    folder = working_folder(tmp_path, CONFIG)
    port = free_port()
    ranks = [
        start_rank(rank, port, folder, ["--self-test", "none"], COUNTING_OBJECTS) for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for output in outputs:
        early, late = map(int, re.findall(r"objects after step \d+: (\d+)", output))
        assert late - early <= MAX_GROWTH
