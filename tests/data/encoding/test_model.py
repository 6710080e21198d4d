"""Models that encode accepts or refuses, before the output is touched."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from support.small_store import SIDE, small_vae, write_pictures
from torch import nn

import fastvae
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


def means(store) -> dict[str, np.ndarray]:
    """Return the mean of each key."""
    return {item["key"]: item["mean"].clone().numpy() for item in LatentDataset(store)}


@pytest.fixture
def source(tmp_path):
    """A folder of two pictures."""
    write_pictures(tmp_path / "in", 2)
    return tmp_path / "in"


def test_the_models_tiling_and_slicing_change_no_latent(source, tmp_path):
    vae = small_vae(sample_size=16)
    encode(source, tmp_path / "plain", vae=vae, **OPTIONS)
    vae.enable_tiling()
    vae.enable_slicing()
    encode(source, tmp_path / "tiled", vae=vae, **OPTIONS)
    assert vae.use_tiling
    assert vae.use_slicing
    plain, tiled = means(tmp_path / "plain"), means(tmp_path / "tiled")
    assert all(np.array_equal(plain[key], tiled[key]) for key in plain)


class Foreign(fastvae.models.attention_processor.AttnProcessor2_0):
    """A processor whose computation the identity does not record."""


def test_a_foreign_attention_processor_is_refused(source, tmp_path):
    vae = small_vae()
    vae.set_attn_processor(Foreign())
    with pytest.raises(
        ValueError, match=r"by a built-in processor .* got AutoencoderKL with Foreign at encoder\.mid_block"
    ):
        encode(source, tmp_path / "out", vae=vae, **OPTIONS)
    assert not (tmp_path / "out").exists()
    theirs = diffusers.AutoencoderKL(**{k: v for k, v in small_vae().config.items() if not k.startswith("_")})
    for processor in (diffusers.models.attention_processor.AttnProcessor(),):
        theirs.set_attn_processor(processor)
        assert encode(source, tmp_path / "theirs", vae=theirs, **OPTIONS).ok == 2


def test_a_model_of_diffusers_is_encoded_without_a_warning(source, tmp_path, caplog):
    """diffusers warns of a cast even of models that have no module to keep in fp32."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        vae = diffusers.AutoencoderKL(**dict(small_vae().config))
        assert encode(source, tmp_path / "out", vae=vae, **OPTIONS | {"dtype": "bf16"}).ok == 2
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def with_part(name: str, part: nn.Module) -> nn.Module:
    """Return a model with another part of this name."""
    vae = small_vae()
    setattr(vae, name, part)
    return vae


NO_MOMENTS = {
    "one colour": (lambda: small_vae(in_channels=1), "must take RGB images, got AutoencoderKL, which takes 1-channel"),
    "the mean alone": (
        lambda: with_part("quant_conv", nn.Conv2d(8, 4, 1)),
        "mean and log-variance, 8 channels .* got AutoencoderKL, which gives 4",
    ),
    "no convolution at the end": (
        lambda: with_part("quant_conv", nn.Identity()),
        "mean and log-variance, 8 channels .* got AutoencoderKL, which has no convolution at the end",
    ),
    "an encoder of another kind": (
        lambda: with_part("encoder", nn.Sequential(small_vae().encoder)),
        "an encoder built like AutoencoderKL's, got AutoencoderKL with a Sequential",
    ),
    "no weights in memory": (
        lambda: small_vae().to("meta"),
        "weights in memory, got AutoencoderKL with offloaded ones: remove the offload hooks",
    ),
    "no encoder": (lambda: with_part("encoder", None), "must have an encoder, got AutoencoderKL without one"),
}


@pytest.mark.parametrize("kind", NO_MOMENTS)
def test_a_model_without_moments_of_rgb_is_refused_before_the_output_is_touched(source, tmp_path, kind):
    vae, words = NO_MOMENTS[kind]
    with pytest.raises(ValueError, match=words):
        encode(source, tmp_path / "out", vae=vae(), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_model_with_fewer_channels_than_its_config_is_refused(source, tmp_path):
    vae = small_vae()
    vae.quant_conv.register_forward_hook(lambda module, args, out: out[:, :4])
    with pytest.raises(
        ValueError, match=r"must give mean and log-variance \[B, 8, h, w\], got AutoencoderKL, which gives"
    ):
        encode(source, tmp_path / "out", vae=vae, **OPTIONS)


def test_flux2_takes_whole_patches(source, tmp_path):
    config = {
        key: value for key, value in small_vae().config.items() if key.startswith(("block", "norm", "down", "up"))
    }
    vae = fastvae.AutoencoderKLFlux2(**config, latent_channels=8, layers_per_block=1)
    with pytest.raises(ValueError, match="multiple of the model's 16 pixels, got 24"):
        encode(source, tmp_path / "out", vae=vae, **OPTIONS | {"buckets": 24})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buckets": 65_536}, r"buckets of 65536x65536 in batches of 1 need about .* GiB a step"),
        ({"buckets": 10**30}, "buckets must be at most 65536"),
        ({"batch": 10**6}, "batch must be at most"),
        ({"workers": 10**6}, "workers must be at most"),
        ({"workers": 0}, "workers must be 'auto' or at least 1"),
        ({"max_failures": float("inf")}, "max_failures must be"),
        ({"shard_mb": float("inf")}, "shard_mb must be above 0 and finite"),
        ({"max_pixels": float("inf")}, "max_pixels must be at least 1 and finite"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_arguments_are_refused_before_the_output_is_touched(source, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("fastvae.data.encoding.batch_size.total_memory", lambda device: 2**36)
    with pytest.raises(ValueError, match=words):
        encode(source, tmp_path / "out", vae=small_vae(), **OPTIONS | change)
    assert not (tmp_path / "out").exists()


def test_the_dtype_error_of_zero_latents_is_none(source, tmp_path):
    vae = small_vae()
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.zero_()
    assert encode(source, tmp_path / "out", vae=vae, **OPTIONS | {"dtype": "bf16"}).dtype_error is None
