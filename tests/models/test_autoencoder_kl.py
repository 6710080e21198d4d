"""The network compared with diffusers', with the same weights on the CPU: the same keys and the same bits."""

import copy
import pickle

import diffusers
import pytest
import torch
from support.accuracy import assert_as_accurate

import fastvae
from fastvae.models import AttnProcessor2_0, FusedAttnProcessor2_0

SMALL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}
# Configurations by what they have that SMALL does not.
CONFIGS = {
    "smallest": {},
    "one-block": {
        "block_out_channels": (16,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    },
    "one-channel": {"in_channels": 1, "out_channels": 1, "latent_channels": 8},
    "four-channels": {"in_channels": 4, "out_channels": 3},
    "six-channels": {"in_channels": 6, "out_channels": 6},
    "three-layers": {"layers_per_block": 3},
    "no-attention": {"mid_block_add_attention": False},
    "no-quant-convs": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "attention-in-blocks": {
        "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    },
    "three-blocks": {
        "block_out_channels": (8, 24, 48),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "mish": {"act_fn": "mish"},
    "normalised": {"latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 2.0, 3.0, 4.0), "shift_factor": 0.1},
}


def twins(ours=fastvae.AutoencoderKL, theirs=diffusers.AutoencoderKL, **config):
    config = {**SMALL, **config}
    a, b = ours(**config).eval(), theirs(**config).eval()
    b.load_state_dict(a.state_dict())
    return a, b


def images(*shape, dtype=torch.float32):
    return (torch.rand(shape) * 2 - 1).to(dtype)


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


TILED = {
    "even": ((40, 40), torch.float32),
    "sliver": ((33, 72), torch.float32),
    "one-axis": ((32, 57), torch.float32),
    "tall": ((50, 20), torch.float32),
    # One size only: the bits of torch's bf16 convolution on tiles a few pixels wide change from run to run.
    "half-precision": ((40, 40), torch.bfloat16),
}


@torch.no_grad()
@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("name", TILED)
def test_tiling_keeps_diffusers_bits(name, slicing):
    size, dtype = TILED[name]
    ours, theirs = (vae.to(dtype) for vae in twins(sample_size=24))
    for vae in (ours, theirs):
        vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
    x = images(2, 3, *size, dtype=dtype)
    moments = ours.encode_moments(x)
    assert torch.equal(moments, theirs.encode(x).latent_dist.parameters)
    z = moments.chunk(2, dim=1)[0].contiguous()
    assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
    assert torch.equal(ours.tiled_decode(z).sample, theirs.tiled_decode(z).sample)
    mine, expected = (vae.tiled_encode(x).latent_dist.parameters for vae in (ours, theirs))
    assert torch.equal(mine, expected)
    for vae in (ours, theirs):
        vae.disable_tiling()
    assert torch.equal(ours.encode_moments(x), theirs.encode(x).latent_dist.parameters)


def test_tiling_without_slivers():
    """41 pixels in tiles of 24 with a stride of 18: diffusers adds a tile of 5 pixels, wholly inside the one before."""
    vae = fastvae.AutoencoderKL(**{**SMALL, "sample_size": 24}).eval()
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        for slivers, heights, widths in ((True, [24, 6], [24, 23, 5]), (False, [24], [24, 23])):
            vae.enable_tiling(slivers=slivers)
            seen.clear()
            assert vae.encode_moments(images(1, 3, 24, 41)).shape == (1, 8, 12, 20)
            assert seen == [(height, width) for height in heights for width in widths]
    with pytest.raises(TypeError):
        vae.enable_tiling(False)  # a switch in older diffusers; here it would only change the slivers


def test_a_pair_as_sample_size_can_be_tiled():
    """diffusers raises TypeError for a pair: it compares the width with the pair."""
    vae = fastvae.AutoencoderKL(**{**SMALL, "sample_size": (24, 48)})
    vae.enable_tiling()
    assert vae.encode_moments(images(1, 3, 40, 40)).shape == (1, 8, 20, 20)


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


@torch.no_grad()
def test_fused_projections_and_back():
    ours, theirs = twins(**CONFIGS["attention-in-blocks"])
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    x = images(2, 3, 16, 24)
    plain = ours(x).sample
    ours.unfuse_qkv_projections()  # without a fuse before, nothing happens; diffusers raises AttributeError
    ours.fuse_qkv_projections()
    theirs.fuse_qkv_projections()
    assert all(isinstance(p, FusedAttnProcessor2_0) for p in ours.attn_processors.values())
    assert torch.equal(ours(x).sample, theirs(x).sample)
    ours.unfuse_qkv_projections()
    assert set(ours.state_dict()) == set(before), "a stray key is left"
    assert torch.equal(ours(x).sample, plain)


@torch.no_grad()
def test_attention_processors():
    ours, theirs = twins(**CONFIGS["attention-in-blocks"])
    assert set(ours.attn_processors) == set(theirs.attn_processors)
    calls = []

    class Counting(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, **kwargs):
            calls.append(attn)
            return super().__call__(attn, hidden_states, **kwargs)

    x = images(1, 3, 16, 16)
    plain = ours(x).sample
    ours.set_attn_processor(Counting())
    assert torch.equal(ours(x).sample, plain)
    assert len(calls) == len(ours.attn_processors)
    ours.set_attn_processor({name: AttnProcessor2_0() for name in ours.attn_processors})
    with pytest.raises(ValueError, match="processor must name the"):
        ours.set_attn_processor({"nowhere.processor": AttnProcessor2_0()})
    ours.set_default_attn_processor()
    assert torch.equal(ours(x).sample, plain)

    class Foreign:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    ours.set_attn_processor(Foreign())
    with pytest.raises(ValueError, match="Foreign"):
        ours.set_default_attn_processor()


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


@torch.no_grad()
def test_tiled_moments_keep_diffusers_strides():
    """The last bits of images that are decoded from the moments depend on the strides; seen with 3 latent channels."""
    ours, theirs = twins(sample_size=24, latent_channels=3)
    for vae in (ours, theirs):
        vae.enable_tiling()
    x = images(2, 3, 40, 57).contiguous(memory_format=torch.channels_last)
    mine, expected = ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters
    assert torch.equal(mine, expected)
    assert mine.stride() == expected.stride()


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
