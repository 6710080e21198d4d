"""What a user's CPU does: torch's own layers, and no interpreter, which takes seconds a call."""

import pytest
from support.forks import forks as forks  # the fixture
from support.small_store import small_vae


@pytest.fixture(autouse=True)
def _as_a_users_cpu(monkeypatch):
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the processes that a test starts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model's folder, for all tests of a file."""
    folder = tmp_path_factory.mktemp("model")
    small_vae().save_pretrained(folder)
    return str(folder)
