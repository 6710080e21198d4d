"""The posterior compared with that of diffusers, and its differences: half-precision sums, copies, seeds."""

import copy
import io

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs
from safetensors.torch import load, save

from fastvae.models import DiagonalGaussianDistribution as Ours


def moments(batch=3, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(batch, 8, 6, 5, generator=generator)
    values[:, 4:] *= 8 * scale  # some beyond the clamp at -30 and 20
    return values.to(dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_equal_diffusers(dtype, deterministic):
    ours, theirs = Ours(moments(dtype=dtype), deterministic), Theirs(moments(dtype=dtype), deterministic)
    for name in ("mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == dtype
    assert torch.equal(ours.mode(), theirs.mode())
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    assert torch.equal(ours.sample(generators[0]), theirs.sample(generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_generator_lists_equal_diffusers(batch):
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(batch)]

    p = moments(batch)
    assert torch.equal(Ours(p).sample(generators()), Theirs(p).sample(generators()))
    one = [torch.Generator().manual_seed(0)]
    if batch > 1:  # a list of one is that generator, for the whole batch
        assert torch.equal(Ours(p).sample(one), Theirs(p).sample([torch.Generator().manual_seed(0)]))


def test_kl_and_nll_equal_diffusers():
    p, q = moments(scale=0.2), moments(scale=0.2).flip(0)
    assert torch.equal(Ours(p).kl(), Theirs(p).kl())
    assert torch.equal(Ours(p).kl(Ours(q)), Theirs(p).kl(Theirs(q)))
    sample = torch.randn(3, 4, 6, 5)
    assert torch.equal(Ours(p).nll(sample), Theirs(p).nll(sample))
    assert torch.equal(Ours(p).nll(sample, dims=[1]), Theirs(p).nll(sample, dims=[1]))


LAYOUTS = {
    "NCHW": lambda p: p,
    "channels_last": lambda p: p.contiguous(memory_format=torch.channels_last),
    "transposed": lambda p: p.mT.contiguous().mT,
    "part of a larger tensor": lambda p: torch.cat([p, p], dim=3)[..., : p.shape[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_equal_diffusers_in_every_layout(layout):
    """The moments of a batch above one come out of torch's convolution in channels_last."""
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 2, 5):
        for shape in ((8, 6, 5), (8, 64, 64), (32, 33, 17)):
            p, q = (torch.randn(batch, *shape, generator=generator) for _ in range(2))
            sample = torch.randn(batch, shape[0] // 2, *shape[1:], generator=generator)
            ours, theirs = Ours(LAYOUTS[layout](p)), Theirs(LAYOUTS[layout](p))
            assert torch.equal(ours.kl(), theirs.kl())
            assert torch.equal(ours.kl(Ours(q)), theirs.kl(Theirs(q)))
            assert torch.equal(ours.nll(sample), theirs.nll(sample))
            assert torch.equal(ours.nll(sample, dims=[1, 2]), theirs.nll(sample, dims=[1, 2]))
            drawn = (one.sample(torch.Generator().manual_seed(2)) for one in (ours, theirs))
            assert torch.equal(*drawn)


def test_half_precision_divergence_does_not_overflow():
    """exp(19) overflows fp16, and diffusers returns infinity; the sum is compared with that of float64."""
    p = torch.full((1, 8, 2, 2), 19.0, dtype=torch.float16)
    assert not Theirs(p).kl().isfinite().all()
    exact = Theirs(p.double()).kl()
    error = (Ours(p).kl().double() - exact).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()  # 64 roundings: 16 terms of 4 operations


def test_a_deterministic_posterior_has_no_divergence():
    posterior = Ours(moments(), deterministic=True)
    assert torch.equal(posterior.kl(), torch.zeros(3))
    assert torch.equal(posterior.nll(posterior.mean), torch.zeros(3))
    assert torch.equal(posterior.sample(), posterior.mean)


def test_only_the_moments_are_kept_and_the_mean_is_saved_without_the_log_variance():
    p = moments(1)
    posterior = Ours(p)
    assert [v for v in vars(posterior).values() if isinstance(v, torch.Tensor)] == [p]
    for values in (posterior.mean, posterior.logvar, posterior.mode()):
        assert values.is_contiguous()
        assert values.untyped_storage().nbytes() == values.numel() * 4
    posterior.mean.zero_()
    assert torch.equal(posterior.parameters, moments(1)), "the mean is no copy"
    buffer = io.BytesIO()
    torch.save(posterior.mean, buffer)
    assert len(buffer.getvalue()) < 120 * 4 + 4096
    assert torch.equal(load(save({"mean": posterior.mean}))["mean"], posterior.mean)


def test_gradients_reach_the_moments():
    p = moments(scale=0.2).double().requires_grad_()
    noise = torch.Generator().manual_seed(2)
    assert torch.autograd.gradcheck(lambda x: Ours(x).sample(copy_of(noise)), p)
    assert torch.autograd.gradcheck(lambda x: Ours(x).kl(), p)


def copy_of(generator):
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_depends_on_its_seed_alone(dtype):
    p = moments(7, dtype)
    seeds = [11, 2**64 - 1, 0, 5, 7, 2**63, 3]
    whole = Ours(p).sample(seeds=seeds)
    order = [4, 0, 6, 2, 1, 5, 3]
    assert torch.equal(Ours(p[order]).sample(seeds=[seeds[i] for i in order]), whole[order])
    assert torch.equal(Ours(p[2:3]).sample(seeds=[0]), whole[2:3])
    channels_last = p.contiguous(memory_format=torch.channels_last)
    assert torch.equal(Ours(channels_last).sample(seeds=seeds), whole)
    unsigned = torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds])
    assert torch.equal(Ours(p).sample(seeds=unsigned), whole)


def test_seeds_give_the_known_numbers():
    p = torch.zeros(1, 24, 1, 1)
    expected = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    expected += [-0.62285119, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]
    drawn = Ours(p).sample(seeds=[0]).flatten()
    # The published vector comes from a GPU, whose fast sine has an error of up to 1e-5.
    assert (drawn - torch.tensor(expected)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": [1, 2]}, "seeds must hold one integer for each of the 3 rows, got 2"),
        ({"seeds": [1, 2, -1]}, "seeds must be integers from 0 to 2\\^64 - 1, got -1"),
        ({"seeds": [1, 2, 2**64]}, "got 18446744073709551616"),
        ({"seeds": [1, 2, 0.5]}, "got 0.5"),
        ({"generator": [torch.Generator()] * 4}, "one for each of the 3 rows, got 4"),
        ({"generator": [torch.Generator()] * 2}, "one for each of the 3 rows, got 2"),
        ({"seeds": [1, 2, 3], "generator": torch.Generator()}, "exclude each other"),
    ],
    ids=["few-seeds", "negative", "too-large", "fraction", "many-generators", "few-generators", "both"],
)
def test_bad_seeds_and_generators_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Ours(moments()).sample(**options)


def test_bad_moments_are_named():
    with pytest.raises(ValueError, match=r"parameters must hold mean and log-variance.*\(1, 7, 2, 2\)"):
        Ours(torch.zeros(1, 7, 2, 2))


def test_it_copies():
    posterior = Ours(moments())
    assert torch.equal(copy.deepcopy(posterior).mean, posterior.mean)
