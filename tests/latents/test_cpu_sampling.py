"""Draws by seed on the CPU: the bits of the generator, the accuracy of the sampler, independent of the batch."""

import pytest
import torch
from fastvae_kernels.shared import philox
from hypothesis import given
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate

import fastvae
from fastvae.latents.cpu_sampling import BLOCK, draw, normals

KEYS = [13470992453623031481, 0, 2**64 - 1, 7, 2**63, 2**32, 99]


@pytest.mark.parametrize("count", [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 4 * 128 * 128])
def test_normals_have_the_bits_of_philox(count):
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1]
    assert torch.equal(normals(seeds, count), philox.normals(seeds, count))


@given(st.integers(0, 2**64 - 1), st.integers(1, 3000))
def test_normals_of_any_seed_have_the_bits_of_philox(seed, count):
    assert torch.equal(normals([seed], count), philox.normals([seed], count))


def test_normals_of_no_seeds_and_of_wrong_ones():
    assert normals([], 5).shape == (0, 5)
    with pytest.raises(ValueError, match=r"seeds must be integers from 0 to 2\^64 - 1, got -1"):
        normals([-1], 5)


def _moments(rows, side=5):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(rows, 4, side, side, generator=generator) * 3 for _ in range(2)]


def test_the_bits_of_a_row_do_not_depend_on_its_batch():
    mean, logvar = _moments(7)
    whole = draw(mean, logvar, KEYS)
    order = [4, 0, 6, 2]
    assert torch.equal(draw(mean[order], logvar[order], [KEYS[index] for index in order]), whole[order])
    for index in range(7):
        assert torch.equal(draw(mean[index, None], logvar[index, None], KEYS[index : index + 1])[0], whole[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draws_are_as_accurate_as_the_sampler(dtype):
    mean, logvar = (part.to(dtype) for part in _moments(3))
    logvar[0, 0, 0, :2] = torch.tensor([-60.0, 25.0])  # beyond the clamp on both sides
    keys = KEYS[:3]
    noise = philox.normals(keys, 100).view(mean.shape)
    wide = [part.float() for part in (mean, logvar)]
    truth = wide[0].double() + (0.5 * wide[1].double().clamp(-30, 20)).exp() * noise.double()
    eager = wide[0] + (0.5 * wide[1].clamp(-30, 20)).exp() * noise
    assert_as_accurate(draw(mean, logvar, keys), eager, truth)


def test_sample_posterior_takes_mean_logvar_and_keys():
    mean, logvar = _moments(2)
    keys = torch.tensor(KEYS[:2], dtype=torch.uint64)
    z = fastvae.sample_posterior(mean, logvar, keys)
    assert torch.equal(z, fastvae.sample_posterior(torch.cat([mean, logvar], 1), seeds=keys))
    truth = draw(mean, logvar, keys)
    # Both have the same noise; std is rounded in fp32 or once from float64, then a product and a sum are rounded.
    std, step = (0.5 * logvar.clamp(-30, 20)).exp(), torch.finfo(torch.float32).eps
    assert ((z - truth).abs() <= step * (mean.abs() + 3 * 6 * std)).all()
    with pytest.raises(
        ValueError, match=r"mean and logvar must have one shape .* got \(2, 4, 5, 5\) and \(1, 4, 5, 5\)"
    ):
        fastvae.sample_posterior(mean, logvar[:1], keys)
