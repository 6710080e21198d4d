"""Noise keys: the encoding as it is written down, and draws that depend on nothing else."""

import hashlib

import pytest
import torch
from fastvae_kernels.shared import philox
from hypothesis import given
from hypothesis import strategies as st
from support.accuracy import assert_as_accurate

import fastvae
from fastvae.data.rows import noise_key, noise_keys
from fastvae.latents.cpu_sampling import BLOCK, draw, normals


def test_the_encoding_is_the_one_that_is_written_down():
    written = (
        b"fastvae noise 1\0" + bytes([7, 0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]) + b"caf\xc3\xa9.png"
    )
    wanted = int.from_bytes(hashlib.sha256(written).digest()[:8], "little")
    assert noise_key(7, 259, "café.png", 2) == wanted
    # A number that must never change: stored draws and resumed runs depend on it.
    assert noise_key(0, 0, "000.png") == 13470992453623031481


def test_every_part_of_a_key_counts_and_none_runs_into_the_next():
    parts = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (256, 0, "a", 0)]
    parts += [
        (0, 256, "a", 0),
        (0, 0, "a", 256),
        (0, 0, "a\0", 0),
        (0, 0, "", 97),
        (2**64 - 1, 2**64 - 1, "a", 2**32 - 1),
    ]
    assert len({noise_key(*part) for part in parts}) == len(parts)


def test_a_name_that_is_no_text_has_the_key_of_its_bytes():
    name = b"\xff.png".decode("utf-8", "surrogateescape")
    assert noise_key(0, 0, name) != noise_key(0, 0, "\ufffd.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, "a"), r"seed must be an integer from 0 to 2\^64 - 1, got -1"),
        ((2**64, 0, "a"), "seed must be"),
        ((True, 0, "a"), "seed must be"),
        ((0, 0.5, "a"), "epoch must be an integer"),
        ((0, 0, "a", 2**32), r"variant must be an integer from 0 to 2\^32 - 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_key(*arguments)


@pytest.mark.parametrize("count", [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 4 * 128 * 128])
def test_normals_are_the_generators_to_the_last_bit(count):
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1]
    assert torch.equal(normals(seeds, count), philox.normals(seeds, count))


@given(st.integers(0, 2**64 - 1), st.integers(1, 3000))
def test_normals_of_any_seed_are_the_generators(seed, count):
    assert torch.equal(normals([seed], count), philox.normals([seed], count))


def test_normals_of_no_seeds_and_of_wrong_ones():
    assert normals([], 5).shape == (0, 5)
    with pytest.raises(ValueError, match=r"seeds must be integers from 0 to 2\^64 - 1, got -1"):
        normals([-1], 5)


def _moments(rows, side=5):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(rows, 4, side, side, generator=generator) * 3 for _ in range(2)]


def test_a_row_drawn_in_any_batch_has_the_bits_it_has_alone():
    mean, logvar = _moments(7)
    keys = noise_keys(3, 1, [(f"{index}", 0) for index in range(7)])
    whole = draw(mean, logvar, keys)
    order = [4, 0, 6, 2]
    assert torch.equal(draw(mean[order], logvar[order], [keys[index] for index in order]), whole[order])
    for index in range(7):
        assert torch.equal(draw(mean[index, None], logvar[index, None], keys[index : index + 1])[0], whole[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draws_are_as_accurate_as_the_sampler(dtype):
    mean, logvar = (part.to(dtype) for part in _moments(3))
    logvar[0, 0, 0, :2] = torch.tensor([-60.0, 25.0])  # beyond the clamp on both sides
    keys = noise_keys(0, 0, [("a", 0), ("b", 0), ("c", 1)])
    noise = philox.normals(keys, 100).view(mean.shape)
    wide = [part.float() for part in (mean, logvar)]
    truth = wide[0].double() + (0.5 * wide[1].double().clamp(-30, 20)).exp() * noise.double()
    eager = wide[0] + (0.5 * wide[1].clamp(-30, 20)).exp() * noise
    assert_as_accurate(draw(mean, logvar, keys), eager, truth)


def test_the_sampler_takes_a_batchs_mean_logvar_and_keys():
    mean, logvar = _moments(2)
    keys = torch.tensor(noise_keys(0, 0, [("a", 0), ("b", 0)]), dtype=torch.uint64)
    z = fastvae.sample_posterior(mean, logvar, keys)
    assert torch.equal(z, fastvae.sample_posterior(torch.cat([mean, logvar], 1), seeds=keys))
    truth = draw(mean, logvar, keys)
    # Both take the twin's noise; std is rounded in fp32 or once from float64, then a product and a sum are.
    std, step = (0.5 * logvar.clamp(-30, 20)).exp(), torch.finfo(torch.float32).eps
    assert ((z - truth).abs() <= step * (mean.abs() + 3 * 6 * std)).all()
    with pytest.raises(
        ValueError, match=r"mean and logvar must have one shape .* got \(2, 4, 5, 5\) and \(1, 4, 5, 5\)"
    ):
        fastvae.sample_posterior(mean, logvar[:1], keys)
