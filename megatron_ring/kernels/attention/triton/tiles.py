"""What Triton's kernels of one hop share: tiles of tokens x one head, and how a tile walks along what it sees.

Tensors are (batch, tokens, heads, head size), contiguous or some heads of one that is. A head size that is no power of
two is padded in registers alone.
"""

import triton
import triton.language as tl


@triton.jit
def pointers(
    base,
    sample,
    tokens,
    heads,
    head,
    start,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
):
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
def add(
    base,
    sample,
    tokens,
    heads,
    head,
    start,
    tile,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Add ``tile`` to what lies there. Nobody else may write there meanwhile."""
    at = pointers(base, sample, tokens, heads, head, start, BLOCK, HEAD, PADDED)
    there = inside(tokens, start, BLOCK, HEAD, PADDED)
    tl.store(at, tl.load(at, mask=there, other=0.0) + tile, mask=there)


@triton.jit
def walk_of(lo, hi, start, rows, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """How the tile of BLOCK rows from ``start`` walks along what its rows see, in whole blocks of STEP.

    Rows and runs are queries and their keys, or keys and the queries that see them: lo and hi never fall along either.
    Gives (first, unmasked from, unmasked to, stop): blocks between the middle two are seen by all rows and need no
    mask. Where there is none, masking never ends.
    """
    last = tl.minimum(start + BLOCK, rows) - 1
    any_from, all_from = tl.load(lo + start), tl.load(lo + last)
    all_to, stop = tl.load(hi + start), tl.load(hi + last)
    first = any_from // STEP * STEP
    unmasked_from = tl.maximum((all_from + STEP - 1) // STEP * STEP, first)
    unmasked_to = all_to // STEP * STEP
    nowhere = unmasked_from >= unmasked_to
    return first, tl.where(nowhere, stop, unmasked_from), tl.where(nowhere, stop, unmasked_to), stop


@triton.jit
def runs_of(lo, hi, indices, rows):
    """The runs [lo, hi) of these rows. A row beyond the last sees nothing."""
    there = indices < rows
    return tl.load(lo + indices, mask=there, other=0), tl.load(hi + indices, mask=there, other=0)


@triton.jit
def visible(lo, hi, columns):
    """Whether a row's run [lo, hi) has a column; rows and columns along different dims."""
    return (lo <= columns) & (columns < hi)
