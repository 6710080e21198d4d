"""Fixtures: a CPU as users have it, without Triton's slow interpreter; a store to repair; a small disk."""

import shutil
import subprocess

import pytest
from fastvae_kernels import posterior

from fastvae.data.encoding import self_check


@pytest.fixture(autouse=True)
def _as_a_users_cpu(monkeypatch):
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae.latents.sampling.posterior_op", posterior.reference)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the processes that a test starts


@pytest.fixture(autouse=True)
def _small_check_pictures(monkeypatch):
    """The check before a run on pictures of one size: at their own it takes most of the time of a test that encodes."""
    monkeypatch.setattr(self_check, "SIDES", dict.fromkeys(self_check.SIDES, 16))


@pytest.fixture
def first(tmp_path_factory):
    """Folder of the store that the tests of repair begin with, its source and its model; made once."""
    from support.repairs import first_store  # not needed by the other tests here

    return first_store(tmp_path_factory)


@pytest.fixture
def made(first, tmp_path):
    """A copy of that store, to be damaged, and of its source beside it."""
    from support.repairs import copy_of

    return copy_of(first, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    ) if shutil.which("mount") else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip() if mounted else 'no mount'}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
