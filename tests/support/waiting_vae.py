"""A VAE whose encoder waits as for a GPU and computes almost nothing, and a dataset of images for it."""

import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader


class WaitingVAE(nn.Module):
    """Latents are pixel means of 8 x 8 squares; a call sets its event in ``started`` and waits for ``seconds``.

    ``calls`` counts them, up to 64; the one numbered ``fail_at`` fails.
    """

    def __init__(self, seconds: float = 0.0):
        super().__init__()
        self.config = SimpleNamespace(
            block_out_channels=(1,) * 4, in_channels=3, latent_channels=3, scaling_factor=0.5, shift_factor=None
        )
        self.weight = nn.Parameter(torch.ones(()))
        self.seconds = seconds
        self.started = [threading.Event() for _ in range(64)]
        self.calls = 0
        self.fail_at = -1

    def encode(self, x):
        number, self.calls = self.calls, self.calls + 1
        self.started[number].set()
        if number == self.fail_at:
            raise RuntimeError(f"call {number} of the encoder fails")
        time.sleep(self.seconds)
        mean = nn.functional.avg_pool2d(x, 8) * self.weight
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=torch.cat([mean, mean - 3], dim=1)))


class Pictures(torch.utils.data.Dataset):
    """uint8 images [3, side, side] with their keys, each different."""

    def __init__(self, count: int, side: int = 16, fail_at: int = -1):
        self.count, self.side, self.fail_at = count, side, fail_at

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.fail_at:
            raise OSError(f"picture {index} cannot be read")
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, self.side, self.side), dtype=torch.uint8, generator=generator)
        return {"image": image, "key": f"{index:03d}.png", "caption": f"picture {index}"}


def loader_of(count=10, batch_size=2, workers=0, **options):
    return DataLoader(Pictures(count, **options), batch_size=batch_size, num_workers=workers)


def threads_of_ours():
    """Return the names of a loader's threads. A thread that has read an image keeps one, fastvae-call."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("fastvae-") and name != "fastvae-call"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert threads_of_ours() == []
    assert multiprocessing.active_children() == []
