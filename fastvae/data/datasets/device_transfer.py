"""How a batch of images reaches the device that encodes it, and how latents reach the stream that trains on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# What is made of a batch, and all that must be finite for it.
Made = tuple[dict[str, Tensor], list[Tensor]]
Work = Callable[..., Made]
Uploaded = tuple[tuple[Tensor, ...], torch.cuda.Event]
EncodedBatch = tuple[dict[str, Tensor], Tensor, torch.cuda.Event]


class Transfer(Protocol):
    """The three moments of a batch: ``up`` in the thread that fetches, ``run`` in the one that encodes, ``take`` in the
    one that trains. Each is handed what the one before gave. ``begin`` comes before the first, where one trains;
    ``take`` waits for the batch and says too whether all that must be finite is. ``end`` comes after the last batch,
    handed out or not."""

    def begin(self) -> None: ...
    def up(self, *given: Tensor) -> Any: ...
    def run(self, uploaded: Any, work: Work) -> Any: ...
    def take(self, finished: Any) -> tuple[dict[str, Tensor], bool]: ...
    def end(self) -> None: ...


@functools.cache
def transfer_to(device: torch.device) -> Transfer:
    """What a device needs: streams and events on a CUDA GPU, nothing elsewhere.

    One for a device and all epochs: what a stream has freed, the allocator gives to that stream alone, so new streams
    would take the memory of an encode anew each time.
    """
    return OnCard(device) if device.type == "cuda" else HostTransfer()


class HostTransfer:
    """A CPU: what one thread has made, another can read. Any device but CUDA is served by its default stream."""

    def begin(self) -> None:
        pass

    def up(self, *given: Tensor) -> tuple[Tensor, ...]:
        return given

    def run(self, uploaded: tuple[Tensor, ...], work: Work) -> Made:
        return work(*uploaded)

    def take(self, finished: Made) -> tuple[dict[str, Tensor], bool]:
        made, looked_at = finished
        return made, bool(_are_finite(looked_at))

    def end(self) -> None:
        pass


class OnCard:
    """A CUDA GPU: images copied from pinned memory on one stream and encoded on another, beside the training step's.

    Events order the hand-overs on the GPU, and none but the thread that trains waits for it; record_stream keeps the
    allocator from giving away memory that another stream still reads.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copying = torch.cuda.Stream(device)
        self.encoding = torch.cuda.Stream(device)

    def begin(self) -> None:
        # The model's weights may still be on their way.
        self.encoding.wait_stream(torch.cuda.current_stream(self.device))

    def up(self, *given: Tensor) -> Uploaded:
        if given[0].device.type == "cuda":  # the loader's own work, on the stream of this thread
            self.copying.wait_stream(torch.cuda.current_stream(given[0].device))
        ready = torch.cuda.Event()
        with torch.cuda.stream(self.copying):
            there = tuple(self._moved(values) for values in given)
        ready.record(self.copying)
        return there, ready

    def _moved(self, values: Tensor) -> Tensor:
        if values.device.type == "cuda":
            return values
        # From other memory the copy would wait for its stream; pinned memory is given away again once it is copied.
        return (values if values.is_pinned() else values.pin_memory()).to(self.device, non_blocking=True)

    def run(self, uploaded: Uploaded, work: Work) -> EncodedBatch:
        there, ready = uploaded
        done = torch.cuda.Event()
        with torch.cuda.stream(self.encoding):
            self.encoding.wait_event(ready)
            for values in there:
                values.record_stream(self.encoding)
            made, looked_at = work(*there)
            finite = _are_finite(looked_at).to("cpu", non_blocking=True)  # to pinned memory
        done.record(self.encoding)
        return made, finite, done

    def take(self, finished: EncodedBatch) -> tuple[dict[str, Tensor], bool]:
        made, finite, done = finished
        done.synchronize()
        stream = torch.cuda.current_stream(self.device)
        for tensor in made.values():
            tensor.record_stream(stream)
        return made, bool(finite)

    def end(self) -> None:
        # Batches that nobody took may still be under way, and read what the caller now changes.
        torch.cuda.current_stream(self.device).wait_stream(self.encoding)


def _are_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all values of all are, as a bool [] where they are."""
    return torch.stack([values.isfinite().all() for values in tensors]).all()
