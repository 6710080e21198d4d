"""The examples as modules, on the path of a user's CPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
from fastvae_kernels import posterior

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def as_a_users_cpu(monkeypatch):
    """Disable the kernels on the CPU: the interpreter takes seconds a call, and a user's CPU does not run it."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae.latents.sampling.posterior_op", posterior.reference)


@pytest.fixture(scope="session")
def example():
    """Return a function that loads an example by its name; examples are scripts, not a package."""

    def load(name):
        specification = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        sys.modules[specification.name] = module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    return load
