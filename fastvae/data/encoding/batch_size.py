"""Images per step in each bucket, and the number of threads, chosen from memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any

import torch

from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.encoding.report import EncodeReport
from fastvae.data.encoding.settings import Settings
from fastvae.data.rows import Size, size_name
from fastvae.system.arguments import parse_positive
from fastvae.system.devices import DTYPES, free_memory, total_memory
from fastvae.system.terminal import format_bytes
from fastvae.system.threads import usable_cores

MAX_BATCH, MAX_WORKERS = 65_536, 1024
GPU_BATCH_PIXELS = 16 * 512 * 512  # one batch on a GPU: 16 images of 512x512, 1 of 2048x2048
GPU_SHARE = 0.7  # of free memory: the bytes of a step are an estimate


class BatchSizes:
    """Batch size of each bucket; ``size_for`` and ``halve`` may be called by any thread."""

    def __init__(self, asked: int | str, encoder: MomentEncoder):
        self._asked = None if asked == "auto" else parse_positive("batch", asked, MAX_BATCH)
        self._encoder = encoder
        self._batches: dict[Size, int] = {}
        self._guard = threading.Lock()
        self.halved = 0

    def size_for(self, bucket: Size) -> int:
        """Return the number of images in a step of ``bucket``."""
        with self._guard:
            if bucket not in self._batches:
                self._batches[bucket] = self._asked or self._automatic(bucket)
            return self._batches[bucket]

    def halve(self, bucket: Size, tried: int) -> int:
        """Return half of ``tried``, which did not fit in memory; the bucket's batch is at most that from now on."""
        if self._encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        with self._guard:
            self.halved += 1
            half = math.ceil(tried / 2)
            self._batches[bucket] = min(self._batches.get(bucket, half), half)
        return half

    def as_dict(self) -> dict[str, int]:
        """Return the batch size of every bucket used so far, by the bucket's name."""
        with self._guard:
            return {size_name(bucket): batch for bucket, batch in self._batches.items()}

    def _automatic(self, bucket: Size) -> int:
        if self._encoder.device.type == "cpu":
            return 1
        fitting = int(GPU_SHARE * free_memory(self._encoder.device)) // self._step_bytes(bucket)
        return max(1, min(GPU_BATCH_PIXELS // (bucket[0] * bucket[1]), fitting))

    def _step_bytes(self, bucket: Size) -> int:
        return step_bytes(1, bucket, self._encoder.widest, self._encoder.dtype)


def choose_workers(
    report: EncodeReport, batches: BatchSizes, encoder: MomentEncoder, counts: dict[Size, int], workers: int | str
) -> None:
    """Fill the report's workers and threads_per_worker; ``counts``: images in each bucket."""
    on_cpu = encoder.device.type == "cpu"
    cores = torch.get_num_threads()  # OMP_NUM_THREADS or torch.set_num_threads, else every core
    if workers != "auto":
        report.workers = parse_positive("workers", workers, MAX_WORKERS)
    elif on_cpu:
        # One stream a core, as far as memory allows; each gets the threads of those that do not fit.
        steps = sum(math.ceil(count / batches.size_for(bucket)) for bucket, count in counts.items())
        streams = [step_bytes(batches.size_for(bucket), bucket, encoder.widest, encoder.dtype) for bucket in counts]
        fitting = free_memory(encoder.device) // (2 * max(streams, default=1))
        report.workers = max(1, min(cores, steps, fitting))
    else:
        report.workers = max(2, min(32, usable_cores() or 8))
    # One in deterministic runs: oneDNN and torch sum in another order when two threads share an image.
    shared = 1 if encoder.deterministic else max(1, cores // report.workers)
    report.threads_per_worker = shared if on_cpu else cores


def check_memory(model: Any, settings: Settings, batch: int | str) -> None:
    """Raise ValueError if one step of the largest bucket needs more than the device's total memory."""
    size = 1 if batch == "auto" else parse_positive("batch", batch, MAX_BATCH)
    bucket = largest(settings.buckets.sizes)
    needed = step_bytes(size, bucket, int(model.config.block_out_channels[0]), DTYPES[str(settings.dtype)])
    total = total_memory(settings.device)
    if needed > total:
        raise ValueError(
            f"buckets of {size_name(bucket)} in batches of {size} need about {format_bytes(needed)} a step, and "
            f"{settings.device} has {format_bytes(total)}"
        )


def largest(buckets: Iterable[Size]) -> Size:
    """Return the bucket with the most pixels."""
    return max(buckets, key=lambda bucket: bucket[0] * bucket[1])


def step_bytes(batch: int, bucket: Size, widest: int, dtype: torch.dtype) -> int:
    """Estimate the bytes of a step: eight activations of ``widest`` channels at full size."""
    return 8 * batch * bucket[0] * bucket[1] * widest * dtype.itemsize
