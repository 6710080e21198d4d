"""Small model on the path of a user's CPU: torch's layers, without the interpreter."""

import pytest
from support.small_store import small_vae


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_vae().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def as_a_users_cpu(monkeypatch):
    """Disable the kernels on the CPU: the interpreter takes seconds a call, and a user's CPU does not run it."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae.report.torch_checks.INTERPRETED", False)
