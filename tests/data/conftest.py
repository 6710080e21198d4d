"""What a user's CPU does: torch's own layers, and no interpreter, which takes seconds a call."""

import pytest
from fastvae_kernels import posterior


@pytest.fixture(autouse=True)
def _as_a_users_cpu(monkeypatch):
    monkeypatch.setattr("fastvae.fast.reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae.sampling.posterior_op", posterior.reference)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the processes that a test starts
