"""``fastvae bench``: times of contestants on the same weights and inputs, each after a check of its result."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastvae.checkpoints.loading import full_name
from fastvae.fast.explain import explain
from fastvae.latents.scaling import pixel_multiple
from fastvae.report.contestants import (
    COMPILED,
    DIFFUSERS,
    FASTVAE,
    PLAIN,
    TASKS,
    Contestant,
    contestants_for,
    encoding,
    first_line,
    images,
    open_fp32,
)
from fastvae.report.correctness import Truth, truth_of
from fastvae.report.machine import machine, versions
from fastvae.report.timing import interleaved, median, median_interval, synchronised
from fastvae.system.devices import DTYPES, default_dtype, resolve_device, total_memory
from fastvae.system.terminal import format_bytes

Say = Callable[[str], None]


@dataclass
class Row:
    """Measurements of one contestant, or the ``reason`` why there are none.

    The intervals contain the median with a probability of 95 %. ``memory_bytes`` is the peak of a call above the memory
    in use before it; None if it was not measured. ``error`` is the largest one against float64.
    """

    contestant: str
    reason: str | None = None
    error: float | None = None
    allowed_error: float | None = None
    milliseconds: float | None = None
    milliseconds_interval: tuple[float, float] | None = None
    images_per_second: float | None = None
    images_per_second_interval: tuple[float, float] | None = None
    times_baseline: float | None = None
    memory_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


def benchmark(
    vae: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
    sizes: Sequence[int] = (256,),
    batches: Sequence[int] = (1,),
    tasks: Sequence[str] = TASKS,
    dtype: str | None = None,
    device: str | None = None,
    compiled: bool = False,
    seconds: float = 15.0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure fastvae, diffusers and, if ``compiled``, torch.compile; return values for report.page and for JSON.

    seconds: of all measurements together; loading, compiling and checking take more time. say: called with each step.
    Raises ValueError for sizes that the model does not take or that exceed the memory, and the errors of loading a
    model.
    """
    place = resolve_device(device)
    dtype = dtype or default_dtype(place)
    model, weights = open_fp32(vae, subfolder, revision, preset)
    cases = list(itertools.product(tasks, sizes, batches))
    for _, size, batch in cases:
        _check(model, size, batch, DTYPES[dtype], place)
    plain = model.to(device=place, dtype=DTYPES[dtype])
    say(f"bench   {full_name(vae)}  {place}  {dtype}  " + ", ".join(_name(*case) for case in cases))
    contestants = contestants_for(plain, compiled=compiled)
    ours = next(one.model for one in contestants if one.name == FASTVAE)
    measured = [_measured(plain, contestants, case, seconds / len(cases), say) for case in cases]
    return {
        "title": "fastvae bench",
        "model": {
            "source": vae,
            "class": type(plain).__name__,
            "parameters": sum(parameter.numel() for parameter in plain.parameters()),
            "weights": weights,
        },
        "device": str(place),
        "dtype": dtype,
        "cases": measured,
        "machine": machine(place),
        "versions": versions(),
        "explain": explained(ours, (batches[0], plain.config.in_channels, sizes[0], sizes[0])),
        "notes": _notes(place, dtype, contestants),
    }


def is_right(result: dict[str, Any]) -> bool:
    """Return True if fastvae has a time in every case of a result."""
    rows = [row for case in result["cases"] for row in case["rows"] if row["contestant"] == FASTVAE]
    return all(row["reason"] is None for row in rows)


def explained(vae: Any, shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Return the rows of fastvae.explain for an accelerated model, as values for JSON."""
    return [
        {
            "name": row.name,
            "path": row.path,
            "reason": f"{row.reason.name}: {row.reason.value}" if row.reason else None,
            "launches": row.cost.launches,
            "bytes": row.cost.bytes,
        }
        for row in explain(vae, shape).rows
    ]


def _name(task: str, size: int, batch: int) -> str:
    return f"{task} {batch} x {size}x{size}"


def _check(model: Any, size: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
    multiple = pixel_multiple(model)
    if size < multiple or size % multiple:
        raise ValueError(f"size must be a multiple of the model's {multiple} pixels per latent, got {size}")
    # A pass holds about eight activations at full size; the check in float64 runs one image.
    needed = 8 * size**2 * int(model.config.block_out_channels[0]) * max(batch * dtype.itemsize, 8)
    total = total_memory(device)
    if needed > total:
        raise ValueError(
            f"size {size} in batches of {batch} needs about {format_bytes(needed)}, and {device} has "
            f"{format_bytes(total)}"
        )


@torch.no_grad()
def _measured(
    plain: Any, contestants: list[Contestant], case: tuple[str, int, int], budget: float, say: Say
) -> dict[str, Any]:
    task, size, batch = case
    x = images(plain, size, batch)
    if task == "decode":
        x = encoding(plain)(x).chunk(2, dim=1)[0].contiguous()
    say(f"check   {_name(*case)}: against float64")
    truth = truth_of(plain, task, x)
    rows = [Row(one.name, reason=one.reason) for one in contestants]
    calls: dict[str, Callable[[], Any]] = {}
    for one, row in zip(contestants, rows, strict=True):
        if one.model is not None and (call := _admitted(one, row, task, x, truth, say)):
            calls[one.name] = call
    say(f"measure {_name(*case)}: {', '.join(calls) or 'no contestant'} in turns")
    samples = interleaved(calls, x.device, budget)
    baseline = next((name for name in (DIFFUSERS, PLAIN) if name in samples), None)
    for row in rows:
        if row.contestant in samples:
            _fill(row, samples[row.contestant], batch, samples.get(baseline or ""))
    return {
        "name": _name(*case),
        "task": task,
        "size": size,
        "batch": batch,
        "rounds": max((len(taken) for taken in samples.values()), default=0),
        "baseline": baseline,
        "rows": [asdict(row) for row in rows],
    }


def _admitted(one: Contestant, row: Row, task: str, x: Tensor, truth: Truth, say: Say) -> Callable[[], Any] | None:
    """Return the call to measure if its result is right; else None, with the reason in the row."""
    run = one.call(task)
    if one.compiled:
        say(f"compile {task}: this takes a minute")
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # The compiler's warnings about diffusers' code are long and of no use to a user.
            warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor)")
            y = run(x)
        row.memory_bytes = peak_bytes(run, x)
    except RuntimeError as error:  # no memory, no kernel for the dtype or no compiler
        row.reason = f"failed: {first_line(error)}"
        return None
    if one.compiled:
        say(f"compile {task}: {time.perf_counter() - began:.0f} s")
    row.error, row.allowed_error, row.reason = truth.judge(y)
    return None if row.reason else lambda: run(x)


def peak_bytes(run: Callable[[Tensor], Tensor], x: Tensor) -> int | None:
    """Return the peak bytes of a call above the GPU memory in use before it; None without a GPU."""
    if x.device.type != "cuda":
        return None
    synchronised(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    run(x)
    synchronised(x.device)
    return torch.cuda.max_memory_allocated(x.device) - before


def _fill(row: Row, samples: list[float], batch: int, baseline: list[float] | None) -> None:
    low, high = median_interval(samples)
    middle = median(samples)
    row.seconds = samples
    row.milliseconds, row.milliseconds_interval = 1e3 * middle, (1e3 * low, 1e3 * high)
    row.images_per_second, row.images_per_second_interval = batch / middle, (batch / high, batch / low)
    row.times_baseline = median(baseline) / middle if baseline else None


def _convolves_in_tf32() -> bool:
    # cudnn.allow_tf32 raises RuntimeError once a flag of fp32_precision is set (torch 2.13). "none": as the next one.
    cudnn: Any = torch.backends.cudnn
    flags = (cudnn.conv, cudnn, torch.backends)
    return next((flag.fp32_precision for flag in flags if flag.fp32_precision != "none"), "none") == "tf32"


def _notes(device: torch.device, dtype: str, contestants: list[Contestant]) -> list[str]:
    notes = [
        "Times are wall times of one call, with launches, on inputs on the device. The contestants took turns in one "
        "process; each was first checked against float64.",
        "The allowed error is twice that of plain torch in the same dtype, plus one rounding.",
    ]
    if device.type != "cuda":
        notes.append("Peak memory is not measured on a CPU.")
    if device.type == "cuda" and dtype == "fp32" and _convolves_in_tf32():
        notes.append("Convolutions in fp32 use TF32 for all contestants: that is torch's default.")
    if any(one.name == COMPILED for one in contestants):
        notes.append("No time includes compiling.")
    return notes
