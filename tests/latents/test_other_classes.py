"""diffusers' other autoencoders, wrappers, and what is no model: a right answer, or one sentence that names it."""

import functools

import diffusers
import pytest
import torch
from fastvae_kernels import posterior
from support.small_store import small_vae, write_pictures, write_store
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastvae
from fastvae.data.decoding.decode import decode

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
NARROW = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "norm_num_groups": 2}
FOUR = {"block_out_channels": (8,) * 4, "layers_per_block": 1}


@pytest.fixture(autouse=True)
def as_a_users_cpu(monkeypatch):
    """Run no fused kernel: the interpreter takes seconds a call."""
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    monkeypatch.setattr("fastvae.latents.sampling.posterior_op", posterior.reference)


BY_POSTERIOR = "must return mean and log-variance as AutoencoderKL does, got"
# Each class with the last words of its refusal.
REFUSED = {
    "AutoencoderTiny": (
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            num_encoder_blocks=(1,),
            num_decoder_blocks=(1,),
        ),
        "its config has latent_magnitude",
    ),
    "VQModel": (lambda: diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4), "has num_vq_embeddings"),
    "AutoencoderDC": (
        lambda: diffusers.AutoencoderDC(
            attention_head_dim=2,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
        ),
        "its config has no block_out_channels",
    ),
    "AutoencoderKLCogVideoX": (
        lambda: diffusers.AutoencoderKLCogVideoX(**NARROW, **FOUR),
        "its config has temporal_compression_ratio",
    ),
    "AutoencoderKLMagvit": (
        lambda: diffusers.AutoencoderKLMagvit(**NARROW, **FOUR),
        "its encoder convolves in 3 dimensions",
    ),
    "AutoencoderKLWan": (
        lambda: diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1] * 4, num_res_blocks=1),
        "its config has no latent_channels",
    ),
    "AutoencoderOobleck": (
        lambda: diffusers.AutoencoderOobleck(
            encoder_hidden_size=12, decoder_channels=12, downsampling_ratios=[2], channel_multiples=[1]
        ),
        "its config has no in_channels",
    ),
    "no scaling": (
        lambda: without_scaling(small_vae()),
        "its config has no scaling_factor",
    ),
}


def without_scaling(vae: nn.Module) -> nn.Module:
    """Remove the scaling factor from the config of a model."""
    vars(vae.config).pop("scaling_factor")
    return vae


def pixels(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def functions(folder):
    """Return every public function that takes a VAE alone, as functions of it; a store is written to ``folder``."""
    write_pictures(folder / "in", 1)
    write_store(folder / "store", {(32, 32): ["a"]})
    z = torch.zeros(1, 4, 4, 4)
    options = {"buckets": 32, "progress": False, "device": "cpu", "dtype": "fp32"}
    return {
        "encode_latents": lambda vae: fastvae.encode_latents(vae, pixels()),
        "decode_latents": lambda vae: fastvae.decode_latents(vae, z),
        "scale_latents": lambda vae: fastvae.scale_latents(vae, z),
        "unscale_latents": lambda vae: fastvae.unscale_latents(vae, z),
        "LatentLoader": lambda vae: fastvae.LatentLoader([pixels()], vae),
        "compare": lambda vae: fastvae.compare(vae, pixels()),
        "encode": lambda vae: fastvae.encode(folder / "in", folder / "out", vae=vae, **options),
        "decode": lambda vae: decode(folder / "store", folder / "png", vae=vae, device="cpu", progress=False),
    }


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_of_other_latents_is_refused_in_one_sentence(kind, tmp_path):
    make, words = REFUSED[kind]
    vae = make()
    for name, function in functions(tmp_path).items():
        with pytest.raises(ValueError, match=f"{BY_POSTERIOR} {type(vae).__name__}: .*{words}$"):
            function(vae)
        assert not (tmp_path / "out").exists(), name


def asymmetric():
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=DOWN,
        up_block_types=UP,
        down_block_out_channels=(32, 64),
        up_block_out_channels=(32, 64),
        scaling_factor=0.25,
    )


def temporal():
    return diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=DOWN, block_out_channels=(32, 64), scaling_factor=0.25
    )


def hunyuan_image():
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
        scaling_factor=0.25,
    )


WAYS = [(asymmetric, False), (asymmetric, True), (temporal, False), (temporal, True), (hunyuan_image, False)]


@torch.no_grad()
@pytest.mark.parametrize(("make", "is_fast"), WAYS)
def test_a_model_without_a_shift_is_scaled_alone(make, is_fast):
    vae = make().eval().requires_grad_(False)
    if is_fast:
        fastvae.accelerate(vae, "exact")
    mode = vae.encode(pixels(2)).latent_dist.mode()
    z = fastvae.encode_latents(vae, pixels(2), posterior="mode")
    assert torch.equal(z, mode * 0.25)
    assert torch.equal(fastvae.scale_latents(vae, mode), z)
    assert torch.equal(fastvae.unscale_latents(vae, z), mode)  # 0.25 is a power of two
    assert torch.equal(next(iter(fastvae.LatentLoader([pixels(2)], vae, posterior="mean"))), z)
    moments = next(iter(fastvae.LatentLoader([pixels(2)], vae, posterior="dist")))
    assert torch.equal(moments["mean"], z)


@torch.no_grad()
def test_an_asymmetric_decoder_decodes():
    vae = asymmetric().eval()
    z = torch.randn(2, 4, 4, 4)
    assert torch.equal(fastvae.decode_latents(vae, z, output="float"), vae.decode(z / 0.25).sample)
    assert fastvae.compare(vae, pixels()).is_right


def test_an_encoder_of_another_structure_makes_no_store(tmp_path):
    words = (
        "must have an encoder built like AutoencoderKL's, got AutoencoderKLHunyuanImage with a HunyuanImageEncoder2D$"
    )
    with pytest.raises(ValueError, match=words):
        functions(tmp_path)["encode"](hunyuan_image())
    assert not (tmp_path / "out").exists()


def test_a_decoder_of_videos_is_refused_where_it_decodes(tmp_path):
    vae, called = temporal().eval(), functions(tmp_path)
    words = "must decode single images, got AutoencoderKLTemporalDecoder, .* its decode with num_frames$"
    for name in ("decode_latents", "compare", "decode"):
        with pytest.raises(ValueError, match=words):
            called[name](vae)
    assert called["encode"](vae).ok == 1


class Holder:
    """Object with a VAE, as a pipeline is."""

    def __init__(self, vae):
        self.vae = vae
        self.config = {}


NO_MODEL = {
    "a pipeline": lambda: Holder(small_vae()),
    "nothing": lambda: None,
    "a class": lambda: diffusers.AutoencoderKL,
    "a state dict": lambda: small_vae().state_dict(),
    "a list": lambda: [small_vae()],
    "another module": lambda: nn.Linear(2, 2),
    "an encoder": lambda: small_vae().encoder,
}
GOT = {
    "a pipeline": "Holder: give the AutoencoderKL inside it",
    "nothing": "NoneType",
    "a class": "the class AutoencoderKL",
    "a state dict": "OrderedDict",
    "a list": "list",
    "another module": "Linear",
    "an encoder": "Encoder",
}


@pytest.mark.parametrize("kind", NO_MODEL)
def test_what_is_no_model_is_named(kind, tmp_path):
    given, words = NO_MODEL[kind](), f"^vae(_or_pipe)? must be a .*got {GOT[kind]}$"
    called = functions(tmp_path)
    others = (fastvae.accelerate, fastvae.restore, fastvae.refresh, fastvae.explain, fastvae.fast_report)
    by_pipeline = {"compare": called.pop("compare"), **{function.__name__: function for function in others}}
    if kind == "nothing":
        called.pop("decode")  # the model that the store names
    for name, function in called.items():
        with pytest.raises(ValueError, match=words):
            function(given)
        assert not (tmp_path / "out").exists(), name
    for function in () if kind == "a pipeline" else by_pipeline.values():
        with pytest.raises(TypeError, match=words):
            function(given)


def test_a_name_is_no_loaded_model(tmp_path):
    called = functions(tmp_path)
    for name in ("encode_latents", "decode_latents", "scale_latents", "unscale_latents", "LatentLoader"):
        with pytest.raises(ValueError, match=r"must be a loaded model with the methods of AutoencoderKL, got str$"):
            called[name]("tiny")


WRAPPERS = {"DataParallel": nn.DataParallel, "AveragedModel": AveragedModel, "Sequential": nn.Sequential}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_inside_a_wrapper_is_named(name, tmp_path):
    wrapped, called = WRAPPERS[name](small_vae()), functions(tmp_path)
    for function in ("encode_latents", "decode_latents", "scale_latents", "LatentLoader", "decode"):
        with pytest.raises(ValueError, match=f"got {name}: give the AutoencoderKL inside it$"):
            called[function](wrapped)
    assert called["encode"](wrapped).ok == 1


@torch.no_grad()
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_around_the_encoder_gives_the_same_latents(name):
    vae = small_vae()
    expected = fastvae.encode_latents(vae, pixels(2), posterior="mode")
    vae.encoder = WRAPPERS[name](vae.encoder)
    for run in (fastvae.encode_latents, functools.partial(fastvae.encode_latents, fastvae.accelerate(vae, "exact"))):
        given = (vae, pixels(2)) if run is fastvae.encode_latents else (pixels(2),)
        assert torch.equal(run(*given, posterior="mode"), expected)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("make", [small_vae, lambda: diffusers.AutoencoderKL(**dict(small_vae().config))])
def test_half_a_model_does_its_half(make, part, tmp_path):
    called = functions(tmp_path)
    for remove in (lambda vae: setattr(vae, part, None), lambda vae: delattr(vae, part)):
        vae = make()
        remove(vae)
        halves = {"encoder": ("encode_latents", "LatentLoader"), "decoder": ("decode_latents", "decode")}
        for name in halves.pop(part):
            with pytest.raises(ValueError, match=f"must have its {part}, got AutoencoderKL with its"):
                called[name](vae)
        for names in halves.values():
            called[names[0]](vae)
