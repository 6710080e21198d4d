"""Order of streams and events of CudaTransfer, with fake streams that record every wait."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastvae.data.datasets.device_transfer import CudaTransfer, HostTransfer, transfer_to

CARD = torch.device("cuda", 0)


class Stream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")


class Event:
    def __init__(self, log):
        self.log, self.name = log, None

    def synchronize(self):
        self.log.append(f"the caller waits for {self.name}")

    def record(self, stream):
        self.name = f"what {stream.name} had at {len(self.log)}"
        self.log.append(f"event on {stream.name}")


class Values:
    """A fake tensor that records its copies, and on which stream."""

    def __init__(self, card, device, pinned=False, finite=True):
        self.card, self.device, self.pinned, self.finite = card, torch.device(device), pinned, finite

    def is_pinned(self):
        return self.pinned

    def pin_memory(self):
        self.card.log.append("pinned")
        return Values(self.card, "cpu", pinned=True)

    def to(self, device, non_blocking):
        assert self.pinned
        assert non_blocking
        self.card.log.append(f"copied on {self.card.current.name}")
        return Values(self.card, device)

    def isfinite(self):
        return torch.tensor(self.finite)

    def record_stream(self, stream):
        self.card.log.append(f"kept for {stream.name}")


@pytest.fixture
def card(monkeypatch):
    log = []
    card = SimpleNamespace(log=log, current=Stream(log, "step"))
    names = iter(["copying", "encoding"])

    @contextlib.contextmanager
    def entered(stream):
        card.current, before = stream, card.current
        yield
        card.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, next(names)))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: card.current)
    return card


@pytest.mark.parametrize("pinned", [False, True])
def test_each_stream_waits_for_the_one_before(card, pinned):
    transfer = CudaTransfer(CARD)
    transfer.begin()
    latents = Values(card, CARD)

    def encode(images):
        assert images.device == CARD
        card.log.append(f"encoded on {card.current.name}")
        return {"latents": latents}, [latents]

    received = transfer.receive(transfer.encode(transfer.upload(Values(card, "cpu", pinned)), encode))
    assert received == ({"latents": latents}, True)
    copied = 1 if pinned else 2
    expected = [
        "encoding waits for step",  # for copies of the weights that have not ended
        *([] if pinned else ["pinned"]),
        "copied on copying",
        "event on copying",
        f"encoding waits for what copying had at {copied + 1}",
        "kept for encoding",
        "encoded on encoding",
        "event on encoding",
        f"the caller waits for what encoding had at {copied + 5}",
        "kept for step",
    ]
    assert card.log == expected


def test_images_on_the_gpu_are_not_copied(card):
    transfer = CudaTransfer(CARD)
    uploaded = transfer.upload(Values(card, CARD))
    transfer.encode(uploaded, lambda images: ({"latents": images}, [images]))
    assert card.log[:4] == [
        "copying waits for step",
        "event on copying",
        "encoding waits for what copying had at 1",
        "kept for encoding",
    ]


def test_a_batch_that_is_not_finite_is_reported_when_received(card):
    transfer = CudaTransfer(CARD)
    made, moments = {"mean": Values(card, CARD)}, Values(card, CARD, finite=False)
    finished = transfer.encode(transfer.upload(Values(card, "cpu")), lambda images: (made, [made["mean"], moments]))
    assert transfer.receive(finished) == (made, False)


def test_the_end_waits_for_batches_that_were_not_received(card):
    transfer = CudaTransfer(CARD)
    transfer.encode(transfer.upload(Values(card, "cpu")), lambda images: ({"latents": images}, [images]))
    transfer.end()
    assert card.log[-1] == "step waits for encoding"


def test_latents_are_recorded_on_the_stream_that_receives_them(card):
    transfer = CudaTransfer(CARD)
    finished = transfer.encode(transfer.upload(Values(card, "cpu")), lambda images: ({"latents": images}, [images]))
    card.current = Stream(card.log, "other")
    transfer.receive(finished)
    assert card.log[-2].startswith("the caller waits for what encoding had")
    assert card.log[-1] == "kept for other"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_need_no_streams(device):
    assert isinstance(transfer_to(torch.device(device)), HostTransfer)


def test_one_transfer_serves_a_device():
    """The allocator keeps freed memory for its stream: new streams would allocate the memory of an encode again."""
    assert transfer_to(torch.device("cpu")) is transfer_to(torch.device("cpu"))
