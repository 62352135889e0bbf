"""A run of any length takes the same memory: nothing is kept of a step once it is done."""

import re
from pathlib import Path

import pytest

from tests.programs import free_port, start_rank, working_folder

COUNTED = Path(__file__).with_name("counted_objects.py")
CONFIG = """\
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}
parallel: {context_parallel: striped}
data: {data_path: [text/tokens], seq_length: 64, split: [0.9, 0.1], reset_attention_mask: true}
training: {train_iters: 141, lr_warmup_iters: 1, eval_interval: 0, dtype: fp32}
logging: {metrics_file: metrics.jsonl}
"""
# Between the two counts are 100 steps: one object kept a step would be 100.
ALLOWED = 20


@pytest.mark.whole
def test_no_object_is_kept_of_a_step(tmp_path):
    """Packed documents, so that every step has another mask; two ranks, so that messages travel."""
    folder, port = working_folder(tmp_path, CONFIG), free_port()
    ranks = [start_rank(rank, port, folder, ["--self-test", "none"], COUNTED) for rank in (0, 1)]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for output in outputs:
        early, late = map(int, re.findall(r"objects after step \d+: (\d+)", output))
        assert late - early <= ALLOWED
