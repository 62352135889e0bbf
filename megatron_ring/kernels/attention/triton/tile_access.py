"""Functions shared by the Triton kernels: access to tiles of tokens x one head, and their lists.

Tensors are (batch, tokens, heads, head dim), contiguous or some heads of a contiguous tensor;
``heads`` is the distance of two tokens in memory, in heads. A head dim that is not a power of two
is padded to one in registers only.

HEAD_DIM is the head dim, PADDED the next power of two, BLOCK the tokens of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def pointers(
    base, sample, tokens, heads, head, start,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Return pointers to one head of the BLOCK tokens from ``start``: (BLOCK, PADDED).

    The first is 64-bit, because a shard may have more than 2**31 elements; offsets from it are
    32-bit.
    """
    first = base + ((sample.to(tl.int64) * tokens + start) * heads + head) * HEAD_DIM
    rows = tl.arange(0, BLOCK) * (heads * HEAD_DIM)
    return first + rows[:, None] + tl.arange(0, PADDED)[None, :]


@triton.jit
def inside(tokens, start, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """Return which elements of a tile exist: of existing tokens and within the head dim."""
    rows = start + tl.arange(0, BLOCK) < tokens
    columns = tl.arange(0, PADDED) < HEAD_DIM
    return rows[:, None] & columns[None, :]


@triton.jit
def load(
    base, sample, tokens, heads, head, start,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Load a tile, with 0 for elements that do not exist.

    WHOLE: all of its tokens exist. UPCAST: convert to float32, which the interpreter's products
    need.
    """
    at = pointers(base, sample, tokens, heads, head, start, BLOCK, HEAD_DIM, PADDED)
    if WHOLE and HEAD_DIM == PADDED:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside(tokens, start, BLOCK, HEAD_DIM, PADDED), other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def add(
    base, sample, tokens, heads, head, start, tile,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Add ``tile`` to memory. No other program may write to the same elements."""
    at = pointers(base, sample, tokens, heads, head, start, BLOCK, HEAD_DIM, PADDED)
    exists = inside(tokens, start, BLOCK, HEAD_DIM, PADDED)
    tl.store(at, tl.load(at, mask=exists, other=0.0) + tile, mask=exists)


@triton.jit
def add_atomically(
    base, sample, tokens, heads, head, start, tile,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Add ``tile`` to float32 memory to which other programs add too, in no fixed order.

    WHOLE: all of its tokens exist.
    """
    at = pointers(base, sample, tokens, heads, head, start, BLOCK, HEAD_DIM, PADDED)
    if WHOLE and HEAD_DIM == PADDED:
        tl.atomic_add(at, tile, sem="relaxed")
    else:
        exists = inside(tokens, start, BLOCK, HEAD_DIM, PADDED)
        tl.atomic_add(at, tile, mask=exists, sem="relaxed")


@triton.jit
def load_tile(tiles, index, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Load one row of a list of tiles: the fields of ``TileList`` in tile_lists.py."""
    at = tiles + 5 * index
    start = tl.multiple_of(tl.load(at), BLOCK)
    first = tl.multiple_of(tl.load(at + 1), STEP)
    unmasked_from, unmasked_to, stop = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    return start, first, unmasked_from, unmasked_to, stop


@triton.jit
def load_ranges(lo, hi, indices, rows):
    """Load the ranges [lo, hi) of these rows; empty for a row after the last."""
    exists = indices < rows
    lo_of_rows = tl.load(lo + indices, mask=exists, other=0)
    hi_of_rows = tl.load(hi + indices, mask=exists, other=0)
    return lo_of_rows, hi_of_rows


@triton.jit
def visible(lo, hi, columns):
    """Return whether a row's range [lo, hi) has a column, which is along another dim."""
    return (lo <= columns) & (columns < hi)
