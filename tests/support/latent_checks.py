"""Stored latents, and those that the model computes for a file, for comparison."""

import numpy as np
import torch
from support.small_store import SIDE

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.images.crop import to_bucket
from fastvae.data.images.read import read_image


def latents(store) -> dict[str, np.ndarray]:
    return {item["key"]: np.concatenate([item["mean"], item["logvar"]]) for item in LatentDataset(store)}


def expected(vae, path) -> np.ndarray:
    """Return the moments of one file, computed by the model itself, in the dtype of the store."""
    pixels, _ = to_bucket(read_image(path, at_least=SIDE), SIDE)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        mean, logvar = vae.encode_moments(x)[0].chunk(2)
    return torch.cat([mean, logvar.clamp(-30, 20)]).half().numpy()


def assert_half_equal(stored: np.ndarray, wanted: np.ndarray) -> None:
    """Assert equality up to the order of summation: within one step of half precision at the largest value."""
    scale = np.abs(wanted.astype(np.float64)).max()
    assert np.abs(stored.astype(np.float64) - wanted.astype(np.float64)).max() <= 2 * np.finfo(np.float16).eps * scale
