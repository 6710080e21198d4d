"""Tests that need a GPU: streams, graphs, cuDNN and the compiled kernels together."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason="needs a GPU: bash bench/device.sh runs it"))


@pytest.fixture
def card():
    """The GPU as a device with its index."""
    return torch.device("cuda", 0)
