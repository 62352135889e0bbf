"""From how many tokens of a rank on a ring hides its messages behind its computing.

In a hop a rank sends bytes in proportion to its c tokens and computes in proportion to c squared, so that from some c
on the messages are there before they are needed: c >= F/B for full hops of equal heads in two bytes, forward (Liu,
Zaharia and Abbeel 2023, section 3). Here for any type and any heads, and for hops that a causal mask halves.
"""

from dataclasses import dataclass

# Visible pairs of a hop over c squared: in the first, on own keys, and in every hop of a balanced layout; and in the
# later hops of a contiguous ring, on its last rank.
CAUSAL, FULL = 0.5, 1.0


def operations(products: int, heads: int, head_dim: int) -> int:
    """Of a visible pair, a multiply-add as two."""
    return products * 2 * heads * head_dim


@dataclass(frozen=True)
class Hop:
    """What a rank of c tokens does in a hop: c squared x ``flops`` operations, while c x ``sent`` bytes travel."""

    flops: float
    sent: float

    def shortest_shard(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The c from which on the bytes take no longer than the operations."""
        return (self.sent / bytes_per_second) / (self.flops / flops_per_second)
