"""Where the kernels' tests run: on the GPU where there is one, else on the CPU in the interpreter's hands."""

import pytest
import torch


@pytest.fixture
def on_device():
    """Make new tensors on the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
