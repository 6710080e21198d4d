"""The network compared with diffusers', with the same weights on the CPU: the same keys and the same bits."""

import copy
import pickle

import diffusers
import pytest
import torch
from support.accuracy import assert_as_accurate
from support.twins import CONFIGS, SMALL, images, twins

import fastvae


@pytest.mark.parametrize("name", CONFIGS)
def test_same_tree_and_config(name):
    ours, theirs = twins(**CONFIGS[name])
    # The order counts too: optimisers number parameters by it.
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert getattr(ours.config, key) == value, key


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_same_bits(name):
    ours, theirs = twins(**CONFIGS[name])
    x = images(2, ours.config.in_channels, 24, 40)
    moments = ours.encode_moments(x)
    assert torch.equal(moments, theirs.encode(x).latent_dist.parameters)
    z = moments.chunk(2, dim=1)[0].contiguous()
    assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
    assert torch.equal(ours.decode(z, False)[0], theirs.decode(z, False)[0])


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(8, 8), (23, 17), (9, 64)])
def test_same_bits_at_odd_sizes(batch, size):
    ours, theirs = twins()
    x = images(batch, 3, *size)
    assert torch.equal(ours(x).sample, theirs(x).sample)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = [
        vae(x, sample_posterior=True, generator=g).sample for vae, g in zip((ours, theirs), generators, strict=True)
    ]
    assert torch.equal(*drawn)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_same_bits_in_other_dtypes(dtype):
    ours, theirs = (vae.to(dtype) for vae in twins())
    x = images(2, 3, 24, 40, dtype=dtype)
    assert torch.equal(ours(x).sample, theirs(x).sample)


@torch.no_grad()
def test_decoding_the_mode_differs_by_layout_alone():
    """diffusers' mean is a view of the moments and ours a copy; a convolution's last bits depend on its strides.

    Compared by the derived tolerance, since the bits of a batch above one cannot be equal.
    """
    ours, theirs = twins()
    x = images(3, 3, 24, 40)
    z = ours.encode(x).latent_dist.mode()
    assert torch.equal(z, theirs.encode(x).latent_dist.mode())
    expected = theirs.decode(theirs.encode(x).latent_dist.mode()).sample
    truth = copy.deepcopy(theirs).double().decode(z.double()).sample
    assert_as_accurate(ours.decode(z).sample, expected, truth)


@torch.no_grad()
def test_one_latent_pixel_differs_by_the_place_of_the_weights_alone():
    """As diffusers' loaded weights lie: the bits of a product of one row depend on it, and it differs from its copy."""
    ours, theirs = twins()
    for weight in theirs.parameters():
        place = torch.empty(weight.numel() + 1)[1:].view_as(weight)
        weight.data = place.copy_(weight.data)
    x = images(1, 3, 2, 2)
    truth = copy.deepcopy(theirs).double()(x.double()).sample
    assert torch.equal(ours(x).sample, copy.deepcopy(theirs)(x).sample)
    assert_as_accurate(ours(x).sample, theirs(x).sample, truth)
    larger = images(1, 3, 4, 2)
    assert torch.equal(ours(larger).sample, theirs(larger).sample)


@torch.no_grad()
def test_flux2():
    config = {"latent_channels": 8, "sample_size": 32, "batch_norm_eps": 1e-4}
    ours, theirs = twins(fastvae.AutoencoderKLFlux2, diffusers.AutoencoderKLFlux2, **config)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    x = images(2, 3, 24, 40)
    assert torch.equal(ours(x).sample, theirs(x).sample)
    small_decoder = {**config, "decoder_block_out_channels": (8, 16)}
    ours, theirs = twins(fastvae.AutoencoderKLFlux2, diffusers.AutoencoderKLFlux2, **small_decoder)
    assert torch.equal(ours(x).sample, theirs(x).sample)


@torch.no_grad()
def test_the_full_size_configuration():
    """The widths of Stable Diffusion, at 64 x 72."""
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 32,
        "layers_per_block": 2,
    }
    ours, theirs = twins(**config)
    x = images(1, 3, 64, 72)
    assert torch.equal(ours(x).sample, theirs(x).sample)


def gradients_of(vae, x):
    vae.zero_grad()
    generator = torch.Generator().manual_seed(1)
    vae(x, sample_posterior=True, generator=generator).sample.square().sum().backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters()}


def test_gradients_equal_diffusers():
    """In eval mode: in training mode diffusers copies each shortcut's input to another layout, which moves bits."""
    ours, theirs = twins()
    x = images(2, 3, 16, 24)
    mine, expected = gradients_of(ours, x), gradients_of(theirs, x)
    assert list(mine) == list(expected)
    for name in expected:
        assert torch.equal(mine[name], expected[name]), name


def test_gradient_checkpointing_keeps_the_gradients_bits():
    vae = fastvae.AutoencoderKL(**SMALL)
    x = images(2, 3, 16, 24)
    expected = gradients_of(vae, x)
    vae.enable_gradient_checkpointing()
    assert vae.is_gradient_checkpointing
    calls = []
    vae.encoder.down_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    recomputed = gradients_of(vae, x)
    assert len(calls) == 2, "the block was not computed again in the backward pass"
    for name, gradient in recomputed.items():
        assert torch.equal(gradient, expected[name]), name
    vae.disable_gradient_checkpointing()
    assert not vae.is_gradient_checkpointing


def test_the_config_is_frozen():
    vae = fastvae.AutoencoderKL(**SMALL)
    assert vae.config.scaling_factor == vae.config["scaling_factor"] == vae.scaling_factor == 0.18215
    assert not hasattr(vae.config, "nonsense")
    with pytest.raises((AttributeError, TypeError)):
        vae.config.scaling_factor = 1.0
    with pytest.raises((AttributeError, TypeError)):
        vae.config["scaling_factor"] = 1.0
    with pytest.raises(ValueError, match="scaling_factor"):
        vae.register_to_config(scaling_factor=float("nan"))
    vae.register_to_config(scaling_factor=0.5)
    assert vae.scaling_factor == 0.5
    assert vae.downsample_factor == 2


@torch.no_grad()
def test_an_empty_batch():
    for vae in twins()[:1]:
        x = images(0, 3, 16, 24)
        posterior = vae.encode(x).latent_dist
        assert posterior.parameters.shape == (0, 8, 8, 12)
        assert posterior.sample(generator=[]).shape == posterior.sample(seeds=[]).shape == (0, 4, 8, 12)
        assert vae(x).sample.shape == x.shape


def test_copies_and_pickles():
    vae = fastvae.AutoencoderKL(**SMALL).eval()
    x = images(1, 3, 16, 16)
    with torch.no_grad():
        expected = vae(x).sample
        for other in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
            assert torch.equal(other(x).sample, expected)
            assert other.config == vae.config


def test_outputs_are_read_by_name_key_and_position():
    vae = fastvae.AutoencoderKL(**SMALL)
    x = images(1, 3, 16, 16)
    encoded = vae.encode(x)
    assert encoded[0] is encoded.latent_dist is encoded["latent_dist"]
    assert hasattr(encoded, "latent_dist")
    assert not hasattr(encoded, "latents")
    (sample,) = vae.decode(vae.encode(x, return_dict=False)[0].mode(), return_dict=False)
    assert sample.shape == x.shape


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(3, 16, 16), r"x must be a tensor \[B, 3, H, W\], got shape \(3, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16), r"x must be a tensor \[B, 3, H, W\], got shape \(1, 4, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "x must be floating point, got torch.uint8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.float64), "model's dtype torch.float32, got torch.float64"),
    ],
    ids=["rank", "channels", "integers", "dtype"],
)
def test_bad_input_is_named(x, words):
    with pytest.raises(ValueError, match=words):
        fastvae.AutoencoderKL(**SMALL).encode(x)


def test_a_block_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"down_block_types must be .* got \('DownBlock2D'"):
        fastvae.AutoencoderKL(**{**SMALL, "down_block_types": ("DownBlock2D", "DownEncoderBlock2D")})
    with pytest.raises(ValueError, match="act_fn must be"):
        fastvae.AutoencoderKL(**{**SMALL, "act_fn": "tanh"})
