"""How a batch of images reaches the device that encodes it, and how latents reach the stream that trains on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[Tensor], dict[str, Tensor]]


class Transfer(Protocol):
    """The three moments of a batch: ``up`` in the thread that fetches, ``run`` in the one that encodes, ``take`` in the
    one that trains. Each is handed what the one before gave."""

    def up(self, images: Tensor) -> Any: ...
    def run(self, uploaded: Any, work: Work) -> Any: ...
    def take(self, finished: Any) -> dict[str, Tensor]: ...


def transfer_to(device: torch.device) -> Transfer:
    """What a device needs: streams and events on a CUDA GPU, nothing elsewhere. To be called where one trains."""
    return OnCard(device) if device.type == "cuda" else InPlace()


class InPlace:
    """A CPU: what one thread has made, another can read. Any device but CUDA is served by its default stream."""

    def up(self, images: Tensor) -> Tensor:
        return images

    def run(self, uploaded: Tensor, work: Work) -> dict[str, Tensor]:
        return work(uploaded)

    def take(self, finished: dict[str, Tensor]) -> dict[str, Tensor]:
        return finished


class OnCard:
    """A CUDA GPU: images copied from pinned memory on one stream and encoded on another, beside the training step's.

    An event orders each hand-over on the GPU, so that no thread waits for it; record_stream keeps the allocator from
    giving away memory that another stream still reads.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.copying = torch.cuda.Stream(device)
        self.encoding = torch.cuda.Stream(device)
        # The model's weights may still be on their way.
        self.encoding.wait_stream(torch.cuda.current_stream(device))

    def up(self, images: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        ready = torch.cuda.Event()
        if images.device.type == "cuda":  # the loader's own work, on the stream of this thread
            ready.record(torch.cuda.current_stream(images.device))
            return images, ready
        pinned = images if images.is_pinned() else images.pin_memory()
        with torch.cuda.stream(self.copying):
            # The allocator of pinned memory waits for this copy before it gives the memory away.
            there = pinned.to(self.device, non_blocking=True)
        ready.record(self.copying)
        return there, ready

    def run(self, uploaded: tuple[Tensor, torch.cuda.Event], work: Work) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        images, ready = uploaded
        done = torch.cuda.Event()
        with torch.cuda.stream(self.encoding):
            self.encoding.wait_event(ready)
            images.record_stream(self.encoding)
            made = work(images)
        done.record(self.encoding)
        return made, done

    def take(self, finished: tuple[dict[str, Tensor], torch.cuda.Event]) -> dict[str, Tensor]:
        made, done = finished
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(done)
        for tensor in made.values():
            tensor.record_stream(stream)
        return made
