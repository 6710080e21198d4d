"""Setting of a user's CPU: torch's own layers instead of the interpreter, which takes seconds a call."""

import pytest


@pytest.fixture
def users_cpu(monkeypatch):
    """Run no fused kernel; a test that needs them sets KERNEL_DEVICES again."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
