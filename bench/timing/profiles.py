"""Where a pass spends its time, operator by operator or kernel by kernel, in groups that two networks share.

On a CPU the time of an operator is its own, without those that it calls; what is left of the call is Python's. On a GPU
the kernels are counted, and not the gaps between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

OUTSIDE = "outside of operators"
# The first that is found in a name has it. Operators are torch's on a CPU; kernels are ATen's, cuDNN's and cuBLAS's.
GROUPS: Sequence[tuple[str, str]] = (
    ("convolution + residual", r"convolution_pointwise_$"),
    ("convolution", r"conv(olution|2d|_|\b)|fprop|dgrad|wgrad|winograd|implicit|cudnn_generated"),
    ("GroupNorm", r"group_?norm|rowwisemoments|computefusedparams"),
    ("SiLU", r"silu"),
    (
        "attention and products",
        r"attention|flash|fmha|softmax|bmm|addmm|matmul|::mm$|linear|gemm|gemv|nvjet|cutlass|splitk",
    ),
    ("upsampling", r"upsample"),
    ("copies", r"nchwToNhwc|nhwcToNchw|nchwAddPadding|[Tt]ranspose|copy|memcpy|memset|clone|fill|_pad|CatArray"),
    ("residual and bias", r"add|div|mul"),
    (OUTSIDE, f"^{OUTSIDE}$"),
)
OTHER, FUSED = "other", "fused: "
# Triton names a kernel as its function; no other library's kernels look like this.
OURS = re.compile(r"_([a-z_]+)_kernel")
# What is below this share of the longest is shown with the others.
LEAST_SHARE = 0.01
SHOWN = 12

Spent = Mapping[str, tuple[float, int]]


def group(name: str) -> str:
    """The group of an operator or kernel; a fused kernel is a group of its own."""
    ours = OURS.fullmatch(name)
    if ours:
        return FUSED + ours[1].replace("_", " ")
    found = (label for label, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHER)


def spent(call: Callable[[], Any], device: torch.device) -> dict[str, tuple[float, int]]:
    """Name -> (seconds, calls) of each operator, or of each kernel on a GPU, in one call."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as taken:
        if on_gpu:
            call()
            torch.cuda.synchronize(device)
        else:
            with record_function(OUTSIDE):
                call()
    if not on_gpu:
        return {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in taken.key_averages()}
    return {
        event.key: (event.self_device_time_total / 1e6, event.count)
        for event in taken.key_averages()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    }


def middle(samples: Sequence[Spent]) -> Spent:
    """The call whose total is the middle one: its parts belong together, as medians of parts would not."""
    totals = sorted(range(len(samples)), key=lambda i: total(samples[i]))
    return samples[totals[len(totals) // 2]]


def total(sample: Spent) -> float:
    """Seconds of all that was counted."""
    return sum(seconds for seconds, _ in sample.values())


def row(sample: Spent) -> dict[str, Any]:
    """One contestant's part of the results: seconds in all, by group, and what took longest by its own name."""
    groups: dict[str, float] = {}
    for name, (seconds, _) in sample.items():
        groups[group(name)] = groups.get(group(name), 0.0) + seconds
    longest = sorted(sample, key=lambda name: -sample[name][0])[:SHOWN]
    return {
        "seconds": total(sample),
        "groups": groups,
        "longest": [
            {"name": name[:200], "group": group(name), "seconds": sample[name][0], "calls": sample[name][1]}
            for name in longest
        ],
    }


def shown(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Contestant -> group -> seconds, in one order for all, what is small everywhere among the others."""
    most = max(row["seconds"] for row in rows.values())
    names = {name for row in rows.values() for name in row["groups"]}
    large = {name for name in names if any(row["groups"].get(name, 0) >= LEAST_SHARE * most for row in rows.values())}
    fixed = [label for label, _ in GROUPS]
    fused = sorted(name for name in large if name.startswith(FUSED))
    order = [*[label for label in fixed if label in large and label != OUTSIDE], *fused]
    order += [OUTSIDE] if OUTSIDE in large else []
    told = {}
    for contestant, row in rows.items():
        told[contestant] = {name: row["groups"].get(name, 0.0) for name in order}
        told[contestant][OTHER] = row["seconds"] - sum(told[contestant].values())
    return told
