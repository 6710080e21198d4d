"""Switches of the environment and of torch that change no result: TRITON_INTERPRET on a CPU, fp32_precision."""

import os
import subprocess
import sys

import pytest
import torch

from fastvae.report.benchmark import _convolves_in_tf32

# Every route from fastvae to an op of fastvae_kernels; the process ends with an error if one is interpreted.
PROGRAM = """
import warnings, torch, fastvae
from triton.runtime.interpreter import GridExecutor
def launched(self, *given, **options):
    raise AssertionError(f"{self.fn} is interpreted")
GridExecutor.__call__ = launched
vae = fastvae.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    fastvae.accelerate(vae)
x = torch.rand(2, 3, 8, 8)
posterior = vae.encode(x).latent_dist
(posterior.sample(seeds=[1, 2]).sum() + posterior.kl().sum()).backward()
fastvae.sample_posterior(posterior.parameters.detach(), seeds=[1, 2])
vae.requires_grad_(False)
fastvae.decode_latents(vae, fastvae.encode_latents(vae, x, seeds=[1, 2]))
fastvae.explain(vae)
fastvae.calibrate(vae.half(), x)
print(len(said), str(said[0].message), fastvae.fast_report(vae)["rows"])
"""


def test_the_interpreter_is_not_used_outside_the_tests():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("FASTVAE_INTERPRET_ON_CPU", None)
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 TRITON_INTERPRET=1 is for debugging")
    assert done.stdout.endswith(" 0\n")


@pytest.mark.parametrize(("precision", "expected"), [("ieee", False), ("tf32", True)])
def test_the_precision_of_convolutions_is_read_by_its_present_name(precision, expected):
    before = torch.backends.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.fp32_precision = precision
        torch.backends.cudnn.conv.fp32_precision = precision
        assert _convolves_in_tf32() == expected
    finally:
        torch.backends.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before
