"""The options of bench_attention, and the rings that they select: layouts, each under a mask."""

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from benchmarks.common import DTYPES
from benchmarks.document_histogram import pack_starts
from megatron_ring.context_parallel.layout import DocumentPlacement, Layout, auto_stripe_size
from megatron_ring.context_parallel.mask import CAUSAL, Mask
from megatron_ring.context_parallel.placement import place_samples
from megatron_ring.kernels.attention import choose, stripe_widths
from megatron_ring.kernels.attention.measured import MaskKind
from megatron_ring.kernels.attention.registry import Feature
from megatron_ring.plan.ring_timeline import Timeline, keys_of_hop, visible_pairs_per_hop

LAYOUTS = ("ring", "striped", "zigzag")
# Two more cases: the striped ring without the mask, and the one that places documents by size.
DENSE = "dense"
PLACED = "placed"


@dataclass(frozen=True)
class Options:
    nproc: int = 2
    """Ranks of the ring, one process each."""
    emulate_ranks: int = 0
    """Run the hops of this many ranks one after another in one process instead."""
    seq_length: int = 16384
    """Tokens of the whole sequence."""
    documents: str = "0"
    """Lengths in tokens of the documents packed into the sequence: a mean, for lognormal lengths;
    equal:LENGTH; histogram:FILE, drawn from a table, or histogram for the published one
    (document_lengths.csv). 0: a single document."""
    window: int = 0
    """Keys that a token attends to, itself included; 0: all earlier ones."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = 8
    """Key-value heads."""
    head_dim: int = 64
    """Head dim."""
    batch: int = 1
    """Sequences in the batch."""
    stripe_size: int | Literal["auto"] = "auto"
    """Tokens per stripe of the striped layout; auto: the size that training would choose."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the tensors."""
    attention_kernel: Literal["auto", "sdpa", "reference"] = "auto"
    """Kernel that computes a hop."""
    rounds: int = 5
    """Timed rounds, after one warm-up round (with --emulate-ranks: one warm-up hop).
    0: count the work and time nothing."""
    json: str = ""
    """Also write the results to this file."""

    @property
    def has_documents(self) -> bool:
        """Whether the sequence is a pack of documents."""
        return self.documents != "0"

    @property
    def ring_size(self) -> int:
        """Ranks of the ring, real or emulated."""
        return self.emulate_ranks or self.nproc

    @property
    def device_type(self) -> str:
        """CUDA if there is a GPU for every process."""
        processes = 1 if self.emulate_ranks else self.nproc
        return "cuda" if torch.cuda.device_count() >= processes else "cpu"

    @property
    def kernel(self) -> str:
        """The name of the kernel that --attention-kernel chooses for these tensors and masks."""
        features = {
            Feature.DOCUMENTS: self.has_documents,
            Feature.WINDOW: self.window > 0,
            Feature.GROUPED_HEADS: self.heads != self.kv_heads,
        }
        required = [feature for feature, is_required in features.items() if is_required]
        dtype = DTYPES[self.dtype]
        return choose(self.attention_kernel, self.device_type, dtype, self.head_dim, required).name


@dataclass(frozen=True)
class Case:
    """A ring to measure: a layout under a mask.

    Attributes:
        sends_all_rows: Whether it is the ring as published, in which all keys go around.
    """

    layout: Layout
    mask: Mask
    sends_all_rows: bool = False

    @functools.cached_property
    def pairs_per_hop(self) -> Timeline:
        """Visible pairs of every hop and rank."""
        return visible_pairs_per_hop(self.layout, self.mask, self.sends_all_rows)

    def keys_of_hop(self, ring_rank: int, hop: int) -> int:
        """Return the ring rank whose keys ``ring_rank`` has in a hop."""
        return keys_of_hop(self.layout, self.mask, ring_rank, hop, self.sends_all_rows)


def select_cases(options: Options) -> dict[str, Case]:
    """Return a case by name: one for each layout, PLACED with documents, and DENSE with a mask.

    DENSE is left out for emulated ranks.
    """
    mask = build_mask(options)
    cases = {name: Case(_layout(name, options, mask), mask, name == "ring") for name in LAYOUTS}
    if mask.document_starts:
        layout = _layout("striped", options, mask)
        layout = replace(layout, placement=DocumentPlacement(options.window))
        placements = place_samples(torch.tensor(mask.document_starts), options.batch, layout)
        cases[PLACED] = Case(layout, replace(mask, placements=placements))
    # The sequences of emulated ranks are long and take hours without documents.
    if mask != CAUSAL and not options.emulate_ranks:
        cases[DENSE] = Case(_layout("striped", options, CAUSAL), CAUSAL)
    return cases


def build_mask(options: Options) -> Mask:
    """Return the mask of --documents and --window; raises ConfigError for other --documents."""
    if not options.has_documents:
        return Mask(options.window)
    starts = pack_starts(options.documents, options.seq_length, options.batch)
    return Mask(options.window, starts, options.batch)


def _layout(name: str, options: Options, mask: Mask) -> Layout:
    stripe = _stripe_size(options, mask) if name == "striped" else 1
    return Layout(name, options.seq_length, options.ring_size, stripe)


def _stripe_size(options: Options, mask: Mask) -> int:
    """Return --stripe-size as a number of tokens, with "auto" resolved."""
    if options.stripe_size != "auto":
        return options.stripe_size
    packed = bool(mask.document_starts)
    kind = MaskKind.SPARSE if packed or mask.window else MaskKind.CAUSAL
    widths = stripe_widths(options.kernel, options.device_type, kind).widths
    return auto_stripe_size(options.seq_length, options.ring_size, widths, packed, mask.window)
