"""Fixtures: a CPU as users have it, with torch's layers and without Triton's interpreter, which is slow."""

import pytest
from data.conftest import _small_check_pictures as _small_check_pictures
from support.small_store import small_vae, write_pictures


@pytest.fixture(autouse=True)
def _as_a_users_cpu(monkeypatch):
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the processes that a test starts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a small model, shared by the tests of a file."""
    folder = tmp_path_factory.mktemp("model")
    small_vae().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """Folder of four pictures."""
    write_pictures(tmp_path / "in", 4)
    return str(tmp_path / "in")
