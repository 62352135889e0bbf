"""megatron_ring: GPT pretraining on DeepSpeed with attention split over the sequence by a ring.

Start reading at ``context_parallel/ring.py`` (the ring loop) and ``pretrain_gpt.py`` (everything on
one screen).
"""

from megatron_ring.parallel.environment import remove_empty_variables

remove_empty_variables()

__version__ = "0.1.0"
