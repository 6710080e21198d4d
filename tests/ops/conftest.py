"""Device of the kernels' tests: the GPU if there is one, else the CPU under Triton's interpreter."""

import pytest
import torch


@pytest.fixture
def on_device():
    """Make new tensors on the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
