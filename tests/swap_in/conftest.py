"""What a user's CPU does: torch's own layers, and no interpreter, which takes seconds a call."""

import pytest


@pytest.fixture
def users_cpu(monkeypatch):
    """No kernel runs; a test that wants the fused ones puts KERNEL_DEVICES back."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
