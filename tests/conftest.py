"""Settings every test runs under."""

import os

# One thread a worker, since two workers share two cores; read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Read when a kernel is decorated, so before the first import of fastvae_kernels: without a GPU the interpreter is the
# device.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Nothing here may reach out; the tests of Hub addresses use a server on the loopback.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest


@pytest.fixture(autouse=True)
def _every_test_alike():
    # Deterministic mode fills torch.empty with NaN, so that a value nobody wrote is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
