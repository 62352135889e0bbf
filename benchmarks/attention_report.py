"""The report of bench_attention: ratios and bounds from measured times, as JSON and as a table."""

from dataclasses import dataclass

from benchmarks.attention_cases import DENSE, PLACED, Case, Options
from benchmarks.attention_runs import APART, LIGHTER, SINGLE
from benchmarks.attention_times import Times
from benchmarks.common import Column, device_name, legend, plain_row, plain_titles
from megatron_ring.context_parallel.mask import CAUSAL
from megatron_ring.errors import counted
from megatron_ring.plan.ring_timeline import bound_over_ring


@dataclass(frozen=True)
class Result:
    """One row of the table; None where nothing was timed or there is nothing to compare with.

    Attributes:
        bound: Upper bound of ``speedup_over_ring``.
        efficiency: Time of the single process over the time of the ring.
        cost_per_pair_over_dense: Time per visible pair, relative to the striped ring without
            documents and window.
    """

    layout: str
    stripe_size: int
    seconds: float | None
    speedup_over_ring: float | None
    bound: float
    efficiency: float | None
    imbalance_counted: float
    imbalance_timed: float | None
    cost_per_pair_over_dense: float | None


def findings_of(options: Options, cases: dict[str, Case], times: Times) -> dict:
    """Return what the JSON file holds: the setting, the baselines' seconds, and a row by case."""
    if options.emulate_ranks:
        setting = f"{counted(options.emulate_ranks, 'emulated rank')}, communication not counted"
    else:
        setting = counted(options.nproc, "rank")
    one_by_one = ", document by document" if options.has_documents else ""
    single = "the ring's kernel" if options.window else f"torch's causal attention{one_by_one}"
    dense = cases.get(DENSE)
    return {
        "setting": setting,
        "device": device_name(options.device_type),
        "emulated": bool(options.emulate_ranks),
        "options": vars(options),
        "documents": options.documents,
        "document_count": len(cases["ring"].mask.document_starts) or options.batch,
        "window": options.window,
        "visible_pairs": _visible_pairs(cases["ring"], options.batch),
        "single": single,
        "single_seconds": times.seconds.get(SINGLE),
        "dense_stripe_size": dense.layout.stripe_size if dense else None,
        "dense_seconds": times.seconds.get(DENSE),
        "lighter_seconds": times.seconds.get(LIGHTER),
        "apart_seconds": times.seconds.get(APART),
        "results": [
            vars(_result(name, cases, times, options.batch)) for name in cases if name != DENSE
        ],
    }


def _result(name: str, cases: dict[str, Case], times: Times, batch: int) -> Result:
    case = cases[name]
    seconds = times.seconds.get(name)
    seconds_per_pair = {
        timed: times.seconds[timed] / _visible_pairs(cases[timed], batch)
        for timed in times.seconds
        if timed in cases
    }
    return Result(
        layout=name,
        stripe_size=case.layout.stripe_size,
        seconds=seconds,
        speedup_over_ring=_ratio(times.seconds.get("ring"), seconds),
        bound=_bound(name, cases),
        efficiency=_ratio(times.seconds.get(SINGLE), seconds),
        imbalance_counted=case.pairs_per_hop.imbalance,
        imbalance_timed=times.hops[name].imbalance if times.hops else None,
        cost_per_pair_over_dense=_ratio(seconds_per_pair.get(name), seconds_per_pair.get(DENSE)),
    )


def _visible_pairs(case: Case, batch: int) -> int:
    """Return the visible pairs of one head in the whole batch.

    The mask of a case may cover one sample or all of them.
    """
    return int(case.pairs_per_hop.work_RR.sum()) * (batch // case.mask.samples)


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def _bound(name: str, cases: dict[str, Case]) -> float:
    if name == "ring" or cases[name].mask == CAUSAL:
        return bound_over_ring(name, cases[name].layout.ring_size)
    return cases["ring"].pairs_per_hop.gain_of_balance


# By field of Result.
_COLUMNS = {
    "stripe_size": Column("stripe", 8, 0, "stripe size in tokens"),
    "seconds": Column(
        "seconds", 10, 4, "forward and backward; of emulated ranks, the slowest rank of each hop"
    ),
    "speedup_over_ring": Column(
        "over ring", 11, 3, "seconds of the row ring over those of this row"
    ),
    "bound": Column("bound", 8, 3, "the most that 'over ring' can be, from balance alone"),
    "efficiency": Column(
        "efficiency", 12, 3, "seconds of the row single over those of this row; 1 is ideal"
    ),
    "imbalance_counted": Column(
        "slowest/mean", 14, 4, "visible pairs of the slowest rank over the mean"
    ),
    "imbalance_timed": Column(
        "timed", 8, 3, "slowest/mean in seconds instead of pairs; emulated ranks only"
    ),
    "cost_per_pair_over_dense": Column(
        "pair/dense", 12, 3, "seconds per visible pair over those of the row dense"
    ),
}
# Legend of the rows that are no layout of a ring, and of the row that others are compared with.
_ROWS = {
    DENSE: "the striped ring without the mask of documents or window",
    LIGHTER: "our contiguous ring, which sends less than the published one",
    APART: "ranks that attend to documents of their own, without a ring",
    PLACED: "the striped ring whose documents are placed by size",
    "ring": "the contiguous ring as published, whose keys and values travel in both directions",
}


def print_report(findings: dict) -> None:
    """Print the table of ``findings_of`` with its legend."""
    options = findings["options"]
    rounds = (
        f"median of {counted(options['rounds'], 'round')}"
        if options["rounds"]
        else "counted, not timed"
    )
    print(
        f"{findings['device']}, {options['dtype']}, {findings['setting']}, "
        f"{options['seq_length']} tokens, forward + backward, {rounds}"
    )
    if options["documents"] != "0" or options["window"]:
        print(_mask_line(findings))
    print(f"single: {findings['single']}")
    print(f"{'layout':<10}{plain_titles(_COLUMNS)}")
    single = {"layout": SINGLE, "seconds": findings["single_seconds"], "efficiency": 1.0}
    dense = {
        "layout": DENSE,
        "seconds": findings["dense_seconds"],
        "stripe_size": findings["dense_stripe_size"],
    }
    lighter = {"layout": LIGHTER, "seconds": findings["lighter_seconds"], "stripe_size": 1}
    apart = {"layout": APART, "seconds": findings["apart_seconds"]}
    for row in (single, dense, lighter, apart):
        if row["seconds"]:
            print(_line(row))
    for row in findings["results"]:
        print(_line(row))
    print(legend(_COLUMNS))
    for row, meaning in _ROWS.items():
        print(f"  {row}: {meaning}")


def _mask_line(findings: dict) -> str:
    documents = "no documents"
    if findings["documents"] != "0":
        count = findings["document_count"]
        documents = f"{counted(count, 'document')} (--documents {findings['documents']})"
    window = f"a window of {findings['window']}" if findings["window"] else "no window"
    return f"{documents}; {window}; {findings['visible_pairs']:,} visible pairs"


def _line(row: dict) -> str:
    return f"{row['layout']:<10}{plain_row(_COLUMNS, row)}"
