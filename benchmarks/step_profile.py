"""Where the time of a training step goes, from a profile of it, by kind of work.

On a GPU from the trace that torch.profiler writes for Chrome: the durations of kernels and copies,
and the spans of the optimizer's step on the device. On a CPU from the operators' own time.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.device_trace import ON_DEVICE, Event, Span, merged

OPTIMIZER_STEP = "optimizer step"
"""A record_function of this name is around the optimizer's step. torch's own are found too."""

# The first pattern that occurs in a kernel's or an operator's name, else "element-wise".
_PATTERNS = {
    "communication": r"nccl|gloo|c10d::",
    "attention": r"sdpa|fmha|flash|attention|(forward|backward)_hop|megatron_ring::ring",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|splitk|aten::(mm|addmm|bmm)$",
    "optimizer": r"adam|multi_tensor",
}
ELEMENT_WISE = "element-wise"
IDLE = "idle"
CATEGORIES = ("attention", "matrix products", ELEMENT_WISE, "communication", "optimizer", IDLE)

Milliseconds = dict[str, float]


def category(name: str) -> str:
    """Return the category of a kernel or operator; copies and concatenations are element-wise."""
    found = (kind for kind, pattern in _PATTERNS.items() if re.search(pattern, name.lower()))
    return next(found, ELEMENT_WISE)


def profile_step(step: Callable[[], None], device: str, step_ms: float) -> Milliseconds:
    """Run ``step`` once under the profiler and return the milliseconds of each category.

    ``step_ms``: the time of a step without the profiler, of which the device is idle for the rest.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiled.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        return split_trace(events, step_ms)
    return split_operators(profiled.key_averages(), step_ms)


def split_trace(events: Sequence[Event], step_ms: float) -> Milliseconds:
    """Return the milliseconds by category from a trace.

    Work of two streams at the same time counts twice, except in what is idle.
    """
    work = [event for event in events if event.get("cat") in ON_DEVICE]
    in_optimizer = merged(
        _span(event)
        for event in events
        if event.get("cat") == "gpu_user_annotation"
        and event["name"].startswith((OPTIMIZER_STEP, "Optimizer.step#"))
    )
    total = dict.fromkeys(CATEGORIES, 0.0)
    for event in work:
        kind = category(event["name"])
        if kind != "communication" and any(
            span.begin <= event["ts"] < span.end for span in in_optimizer
        ):
            kind = "optimizer"
        total[kind] += event["dur"] / 1e3
    busy = sum(span.end - span.begin for span in merged(map(_span, work))) / 1e3
    return total | {IDLE: max(0.0, step_ms - busy)}


def split_operators(operators: Iterable[Any], step_ms: float) -> Milliseconds:
    """Return the milliseconds by category from the profiler's averages on a CPU.

    Idle is what the step does outside of torch's operators.
    """
    total = dict.fromkeys(CATEGORIES, 0.0)
    for operator in operators:
        total[category(operator.key)] += operator.self_cpu_time_total / 1e3
    return total | {IDLE: max(0.0, step_ms - sum(total.values()))}


def _span(event: Event) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"])
