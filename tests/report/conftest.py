"""A model that is measured in no time, on what a user's CPU does: torch's own layers, and no interpreter."""

import pytest
from support.small_store import small_vae


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_vae().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def as_a_users_cpu(monkeypatch):
    """The tests' interpreter takes seconds a call; without it the CPU is what it is for a user."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae.report.torch_checks.INTERPRETED", False)
