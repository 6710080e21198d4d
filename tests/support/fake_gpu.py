"""A CPU that takes the place of a GPU in the pipeline of encode."""

from contextlib import contextmanager

import torch

import fastvae.data.encoding.run
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.images.on_device.resize import DeviceResize


class FakeGpu:
    """A MomentEncoder on the CPU that says it is on a GPU. ``most``: images that fit into its memory."""

    device = torch.device("cuda")

    def __init__(self, real, most=65_536):
        self.real, self.most, self.inputs = real, most, []

    def __getattr__(self, name):
        return getattr(self.real, name)

    def start(self, pixels):
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError(f"{len(pixels)} do not fit")
        self.inputs.append(pixels)
        return self.real.start(pixels)


@contextmanager
def pipeline_of_a_gpu(monkeypatch, buffer_bytes, most=65_536):
    """Let runs on the CPU use the pipeline of a GPU; yields the list of each run's encoder and resizer."""
    made = []

    def resize(device):
        made.append(DeviceResize(device, buffer_bytes))
        return made[-1], None

    def encoder(*arguments):
        made.append(FakeGpu(MomentEncoder(*arguments), most))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(fastvae.data.encoding.run, "device_resize", resize)
        patch.setattr(fastvae.data.encoding.run, "MomentEncoder", encoder)
        patch.setattr(fastvae.data.encoding.run, "check_fast_path", lambda _: None)  # it would copy to a real GPU
        yield made
