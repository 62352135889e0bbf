"""Time ring attention in every layout, forward and backward, against a single process.

    python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 \\
        --heads 8 --kv-heads 8 --head-dim 64 --json F
    python -m benchmarks.bench_attention --nproc 2 --seq-length 16384 --documents 2000
    python -m benchmarks.bench_attention --emulate-ranks 16 --seq-length 16384

--nproc N starts N real ranks (NCCL on CUDA; otherwise gloo, with one thread per rank). The single
process holds the whole sequence, has N threads and runs torch's causal attention. The runs of each
round are interleaved and medians over the rounds are reported, so that a drift of the machine's
speed affects all of them alike.

With real ranks the baseline is the published ring, in which keys and values travel in the backward
pass too. Where queries are fewer bytes our ring sends those instead (row "lighter"). The rank that
idles in its forward pass is then the busy one in its backward pass, so a contiguous ring is less
unbalanced and striping gains less over it.

--documents and --window apply the same mask to all runs; document lengths are lognormal and the
same on every rank. The single process then runs torch's causal attention on one document after
another or, with --window, which torch's public function does not support, the ring's kernel. With
real ranks the striped ring without that mask is timed as well (row "dense"), to compare the cost
per visible pair. With documents the striped ring that places them by size is timed too (row
"placed"), and where documents end with the shards of a contiguous ring, ranks that attend to their
own documents without a ring (row "apart").

--emulate-ranks N runs the hops of all ranks one after another in one process. The critical path is
the time that a ring of N such devices with free communication would take. The kernel is timed,
forward and backward, in every hop with visible pairs, on a CPU in CPU seconds. Not timed: building
the mask of a hop and its tiles, which a model does once per batch for all of its layers.
"""

import tyro

from benchmarks.attention_cases import Options, build_mask, select_cases
from benchmarks.attention_report import findings_of, print_report
from benchmarks.attention_times import measure
from benchmarks.common import check_outputs, size_problems, write_json
from megatron_ring.errors import ConfigError, flag, reporting_errors


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_outputs(json=options.json)
    _check(options)
    cases = select_cases(options)
    findings = findings_of(options, cases, measure(options, cases))
    print_report(findings)
    write_json(options.json, findings)


def _check(options: Options) -> None:
    problems = size_problems(options, "nproc", "seq_length", "head_dim", "batch")
    for name in ("emulate_ranks", "window", "rounds"):
        value = getattr(options, name)
        if value < 0:
            problems.append(f"{name} {value} must be at least 0. Set {flag(name)}.")
    if problems:
        raise ConfigError(problems)
    build_mask(options)


if __name__ == "__main__":
    with reporting_errors():
        main()
