"""The fewest tokens per rank from which on a ring hides its messages behind its computation.

In a hop a rank of c tokens sends bytes in proportion to c and computes in proportion to c squared.
From some c on, the messages therefore arrive before they are needed: c >= F/B in the forward pass,
for full hops of equal heads in two-byte elements, with F operations and B bytes per second (Liu,
Zaharia and Abbeel 2023, section 3). This module generalizes that to any dtype, to grouped heads and
to hops of which a causal mask hides half.
"""

from dataclasses import dataclass

# Visible pairs of a hop, divided by c squared. CAUSAL: the first hop, on the rank's own keys, and
# every hop of a balanced layout. FULL: the later hops of a contiguous ring, on its last rank.
CAUSAL = 0.5
FULL = 1.0


def operations(products: int, heads: int, head_dim: int) -> int:
    """Return the operations per visible pair; a multiply-add counts as two."""
    return products * 2 * heads * head_dim


@dataclass(frozen=True)
class Hop:
    """A hop of a rank with c tokens: c squared x ``flops`` operations, c x ``sent`` bytes sent."""

    flops: float
    sent: float

    def shortest_shard(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the c from which on sending takes no longer than computing."""
        return (self.sent / bytes_per_second) / (self.flops / flops_per_second)
