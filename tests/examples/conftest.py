"""The examples as modules, on what a user's CPU does."""

import importlib.util
import sys
from pathlib import Path

import pytest
from fastvae_kernels import posterior

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def as_a_users_cpu(monkeypatch):
    """The tests' interpreter takes seconds a call; without it the CPU is what it is for a user."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae.latents.sampling.posterior_op", posterior.reference)


@pytest.fixture(scope="session")
def example():
    """A function that gives an example's module by its name; they are scripts, and no package."""

    def load(name):
        specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        sys.modules[specification.name] = module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load
