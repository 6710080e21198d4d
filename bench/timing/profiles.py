"""Profile of a pass by operators or kernels, in groups that two networks share.

On a CPU an operator's time excludes the operators that it calls; the rest of the call is Python. On a GPU kernels are
counted, and the gaps between them are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

OUTSIDE = "outside of operators"
# (group, pattern): a name belongs to the first pattern found in it. Names are torch's operators on a CPU, and kernels
# of ATen, cuDNN and cuBLAS on a GPU.
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
# Triton names a kernel like its function; no other library's kernels have such names.
OURS = re.compile(r"_([a-z_]+)_kernel")
# A group below this share of the longest total is added to OTHER.
LEAST_SHARE = 0.01
SHOWN = 12

Spent = Mapping[str, tuple[float, int]]


def group(name: str) -> str:
    """Return the group of an operator or kernel; each fused kernel has its own group."""
    ours = OURS.fullmatch(name)
    if ours:
        return FUSED + ours[1].replace("_", " ")
    found = (label for label, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHER)


def spent(call: Callable[[], Any], device: torch.device) -> dict[str, tuple[float, int]]:
    """Return name -> (seconds, calls) of each operator, or of each kernel on a GPU, in one call."""
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
    """Return the call with the median total: its parts add up, which medians of parts do not."""
    totals = sorted(range(len(samples)), key=lambda i: total(samples[i]))
    return samples[totals[len(totals) // 2]]


def total(sample: Spent) -> float:
    """Return the seconds of all operators or kernels."""
    return sum(seconds for seconds, _ in sample.values())


def row(sample: Spent) -> dict[str, Any]:
    """Return one contestant's entry of the results: total seconds, seconds by group, and the longest by name."""
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
    """Return contestant -> group -> seconds, in one order for all; groups that are small everywhere are in OTHER."""
    most = max(row["seconds"] for row in rows.values())
    names = {name for row in rows.values() for name in row["groups"]}
    large = {name for name in names if any(row["groups"].get(name, 0) >= LEAST_SHARE * most for row in rows.values())}
    fixed = [label for label, _ in GROUPS]
    fused = sorted(name for name in large if name.startswith(FUSED))
    order = [*[label for label in fixed if label in large and label != OUTSIDE], *fused]
    order += [OUTSIDE] if OUTSIDE in large else []
    seconds = {}
    for contestant, row in rows.items():
        seconds[contestant] = {name: row["groups"].get(name, 0.0) for name in order}
        seconds[contestant][OTHER] = row["seconds"] - sum(seconds[contestant].values())
    return seconds
