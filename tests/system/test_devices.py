"""Memory of a device: free and total bytes, also on a system that does not report them."""

import os

import pytest
import torch

from fastvae.system.devices import UNKNOWN_MEMORY, free_memory, total_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="this system does not report its memory")
def test_free_memory_is_part_of_the_total():
    assert 2**20 < free_memory(CPU) <= total_memory(CPU) < UNKNOWN_MEMORY


@pytest.mark.parametrize("error", [ValueError, OSError, AttributeError])
def test_unknown_memory_is_more_than_any_request(monkeypatch, error):
    def missing(name):
        raise error(name)

    monkeypatch.setattr(os, "sysconf", missing, raising=False)
    assert free_memory(CPU) == total_memory(CPU) == UNKNOWN_MEMORY == 2**63
