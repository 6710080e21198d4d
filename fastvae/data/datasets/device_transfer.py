"""Transfer of images to the device that encodes them, and of latents to the stream that trains on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# Latents by name, and the tensors that must be finite for them.
EncodedTensors = tuple[dict[str, Tensor], list[Tensor]]
Encoder = Callable[..., EncodedTensors]
UploadedBatch = tuple[tuple[Tensor, ...], torch.cuda.Event]
EncodedBatch = tuple[dict[str, Tensor], Tensor, torch.cuda.Event]


class Transfer(Protocol):
    """Three steps of a batch: ``upload`` in the fetching thread, ``encode`` in the encoding one, ``receive`` in the
    training one. Each takes what the step before returned. ``receive`` waits for the batch, and returns also if all
    that must be finite is. The training thread calls ``begin`` before the first batch and ``end`` after the last one,
    whether that was received or not.
    """

    def begin(self) -> None: ...
    def upload(self, *tensors: Tensor) -> Any: ...
    def encode(self, uploaded: Any, encoder: Encoder) -> Any: ...
    def receive(self, encoded: Any) -> tuple[dict[str, Tensor], bool]: ...
    def end(self) -> None: ...


@functools.cache
def transfer_to(device: torch.device) -> Transfer:
    """Return the transfer to ``device``: streams and events for a CUDA GPU, nothing for another device.

    One serves a device in all epochs: the allocator gives what a stream has freed to that stream alone, so new streams
    would allocate the memory of an encode again each time.
    """
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer()


class HostTransfer:
    """A CPU, where one thread can read what another wrote, or a device other than CUDA, by its default stream."""

    def begin(self) -> None:
        pass

    def upload(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    def encode(self, uploaded: tuple[Tensor, ...], encoder: Encoder) -> EncodedTensors:
        return encoder(*uploaded)

    def receive(self, encoded: EncodedTensors) -> tuple[dict[str, Tensor], bool]:
        latents, checked = encoded
        return latents, bool(_all_finite(checked))

    def end(self) -> None:
        pass


class CudaTransfer:
    """A CUDA GPU: one stream copies images from pinned memory and another encodes them, beside the training stream.

    Events order the streams on the GPU, and only the training thread waits for it; record_stream keeps the allocator
    from reusing memory that another stream still reads.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copying = torch.cuda.Stream(device)
        self.encoding = torch.cuda.Stream(device)

    def begin(self) -> None:
        # The copy of the model's weights to the GPU may not have ended.
        self.encoding.wait_stream(torch.cuda.current_stream(self.device))

    def upload(self, *tensors: Tensor) -> UploadedBatch:
        if tensors[0].device.type == "cuda":  # the loader made them on the stream of this thread
            self.copying.wait_stream(torch.cuda.current_stream(tensors[0].device))
        ready = torch.cuda.Event()
        with torch.cuda.stream(self.copying):
            on_device = tuple(self._move(values) for values in tensors)
        ready.record(self.copying)
        return on_device, ready

    def _move(self, values: Tensor) -> Tensor:
        if values.device.type == "cuda":
            return values
        # A copy from other memory would wait for its stream. Pinned memory is reused once its copy has ended.
        return (values if values.is_pinned() else values.pin_memory()).to(self.device, non_blocking=True)

    def encode(self, uploaded: UploadedBatch, encoder: Encoder) -> EncodedBatch:
        tensors, ready = uploaded
        done = torch.cuda.Event()
        with torch.cuda.stream(self.encoding):
            self.encoding.wait_event(ready)
            for values in tensors:
                values.record_stream(self.encoding)
            latents, checked = encoder(*tensors)
            finite = _all_finite(checked).to("cpu", non_blocking=True)  # to pinned memory
        done.record(self.encoding)
        return latents, finite, done

    def receive(self, encoded: EncodedBatch) -> tuple[dict[str, Tensor], bool]:
        latents, finite, done = encoded
        done.synchronize()
        stream = torch.cuda.current_stream(self.device)
        for tensor in latents.values():
            tensor.record_stream(stream)
        return latents, bool(finite)

    def end(self) -> None:
        # Batches that were never received may still run, and read weights that the caller now changes.
        torch.cuda.current_stream(self.device).wait_stream(self.encoding)


def _all_finite(tensors: list[Tensor]) -> Tensor:
    """Return a bool [] on the tensors' device: True if all values of all ``tensors`` are finite."""
    return torch.stack([values.isfinite().all() for values in tensors]).all()
