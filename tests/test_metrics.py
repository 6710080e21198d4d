"""PSNR of errors that are computed by hand."""

import math

import numpy as np
import pytest
import torch

from fastvae.metrics import psnr


def test_psnr_of_known_errors():
    black = np.zeros((4, 4, 3), dtype=np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 255) == 0.0
    assert math.isclose(psnr(black, black + 1), 20 * math.log10(255))
    assert psnr(torch.from_numpy(black), torch.from_numpy(black + 255)) == 0.0
    with pytest.raises(ValueError, match="images must have one shape"):
        psnr(black, black[:2])


def test_psnr_by_another_peak():
    image = torch.linspace(-1, 1, 12, dtype=torch.float64)
    assert math.isclose(psnr(image, image + 0.02, peak=2.0), 40.0)
    assert math.isclose(psnr(image, -image, peak=2.0), psnr((image + 1) * 127.5, (1 - image) * 127.5))
