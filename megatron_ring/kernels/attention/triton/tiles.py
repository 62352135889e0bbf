"""What Triton's kernels of one hop share: tiles of tokens x one head, and which keys a tile of queries sees.

Tensors are (batch, tokens, heads, head size), contiguous or some heads of one that is. A head size that is no power of
two is padded in registers alone.
"""

import triton
import triton.language as tl


@triton.jit
def pointers(base, sample, tokens, heads, head, start, BLOCK: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr):
    """To one head of the BLOCK tokens from ``start``: (BLOCK, PADDED).

    The first in 64 bits, since a shard may have more than 2**31 elements; the others, from there, in 32.
    """
    first = base + ((sample.to(tl.int64) * tokens + start) * heads + head) * HEAD
    return first + (tl.arange(0, BLOCK) * (heads * HEAD))[:, None] + tl.arange(0, PADDED)[None, :]


@triton.jit
def inside(tokens, start, BLOCK: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr):
    """Which elements of such a tile there are."""
    return (start + tl.arange(0, BLOCK) < tokens)[:, None] & (tl.arange(0, PADDED) < HEAD)[None, :]


@triton.jit
def load(
    base, sample, tokens, heads, head, start,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Such a tile, 0 beyond the last token and the head's size; as float32 where products must be.

    WHOLE: there are all of its tokens.
    """
    at = pointers(base, sample, tokens, heads, head, start, BLOCK, HEAD, PADDED)
    if WHOLE and HEAD == PADDED:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside(tokens, start, BLOCK, HEAD, PADDED), other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def add(base, sample, tokens, heads, head, start, tile, BLOCK: tl.constexpr, HEAD: tl.constexpr, PADDED: tl.constexpr):
    """Add ``tile`` to what lies there. Nobody else may write there meanwhile."""
    at = pointers(base, sample, tokens, heads, head, start, BLOCK, HEAD, PADDED)
    there = inside(tokens, start, BLOCK, HEAD, PADDED)
    tl.store(at, tl.load(at, mask=there, other=0.0) + tile, mask=there)


@triton.jit
def span(any_from, all_from, all_to, any_to, BLOCK: tl.constexpr):
    """Where a walk in whole blocks over [any_from, any_to) must mask: (first, unmasked from, unmasked to).

    Blocks within [all_from, all_to) need no mask. Where there is none, masking never ends.
    """
    first = any_from // BLOCK * BLOCK
    unmasked_from = tl.maximum((all_from + BLOCK - 1) // BLOCK * BLOCK, first)
    unmasked_to = all_to // BLOCK * BLOCK
    nowhere = unmasked_from >= unmasked_to
    return first, tl.where(nowhere, any_to, unmasked_from), tl.where(nowhere, any_to, unmasked_to)


@triton.jit
def keys_of(lo, hi, start, queries, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """For the tile of queries from ``start``: as ``span``, and the end of the last run."""
    last = tl.minimum(start + BLOCK_Q, queries) - 1
    any_from, all_from = tl.load(lo + start), tl.load(lo + last)
    all_to, any_to = tl.load(hi + start), tl.load(hi + last)
    first, unmasked_from, unmasked_to = span(any_from, all_from, all_to, any_to, BLOCK_K)
    return first, unmasked_from, unmasked_to, any_to
