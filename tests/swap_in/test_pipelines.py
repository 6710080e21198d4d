"""Whole pipelines of diffusers: the same seeds give the same images before, during and after ``accelerate``."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from fastvae_kernels.shared.runtime import KERNEL_DEVICES
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from swap_in.tiny_parts import two_sided_autoencoder
from swap_in.tiny_pipelines import CASES, build, call
from torch import Tensor, nn

import fastvae
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath

LEAST_DEVIATION = 0.02
"""Standard deviation of the images: an image that random weights drive to white shows no difference."""


class Call(NamedTuple):
    """One call of a VAE: "encode" or "decode", its input, its moments or image, and other tensor arguments."""

    name: str
    given: Tensor
    result: Tensor
    shown: dict[str, Tensor]


@contextmanager
def replaced(vae: nn.Module, **methods: Any):
    """Replace ``encode`` and ``decode`` of a VAE inside the block, as users assign compiled ones."""
    for name, method in methods.items():
        setattr(vae, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(vae, name)


def run(pipe: Any, case: str) -> tuple[Tensor, list[Call]]:
    """Return a pipeline's images and the calls of its VAE."""
    calls: list[Call] = []

    def listening(name):
        method = getattr(pipe.vae, name)

        def listen(x, return_dict=True, **options):
            done = method(x, return_dict=return_dict, **options)
            result = done[0].parameters if name == "encode" else done[0]
            shown = {key: value.clone() for key, value in options.items() if isinstance(value, Tensor)}
            calls.append(Call(name, x.clone(), result.clone(), shown))
            return done

        return listen

    with replaced(pipe.vae, encode=listening("encode"), decode=listening("decode")):
        return call(pipe, case), calls


def run_with(pipe: Any, other: nn.Module, case: str) -> Tensor:
    """Return a pipeline's images computed by another VAE in its own dtype and layout."""
    own = pipe.vae

    def encode(x, return_dict=True):
        moments = result_of(other, "encode", x).to(x.dtype).contiguous()
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(z, return_dict=True, generator=None, **shown):
        sample = result_of(other, "decode", z, **shown).to(z.dtype).contiguous()
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    with replaced(own, encode=encode, decode=decode):
        return call(pipe, case)


def result_of(vae: nn.Module, name: str, x: Tensor, **shown: Tensor) -> Tensor:
    """Return a VAE's moments or image for x [B, C, H, W], computed in its own dtype."""
    dtype = next(vae.parameters()).dtype
    shown = {key: value.to(dtype) for key, value in shown.items()}
    with torch.no_grad():
        done = getattr(vae, name)(x.to(dtype), **shown)
    return done.latent_dist.parameters if name == "encode" else done.sample


def same(one: tuple[Tensor, list[Call]], other: tuple[Tensor, list[Call]]) -> bool:
    """Return True if two runs have the same images and the same calls of the VAE, to the bit."""
    pairs = list(zip(one[1], other[1], strict=True))
    return torch.equal(one[0], other[0]) and all(
        a.name == b.name and torch.equal(a.given, b.given) and torch.equal(a.result, b.result) for a, b in pairs
    )


def assert_as_accurate_as_stock(pipe: Any, case: str, stock: nn.Module) -> tuple[Tensor, list[Call]]:
    """Run an accelerated pipeline and compare its images and every call of its VAE with eager and float64.

    Eager in channels_last, as our convolutions are: on a CPU their rounding differs by the layout.
    """
    eager = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(stock).double()
    images, calls = run(pipe, case)
    for name, given, result, shown in calls:
        assert_as_accurate(result, result_of(eager, name, given, **shown), result_of(exact, name, given, **shown))
    truth = run_with(pipe, exact, case).double()
    assert_as_accurate(images, run_with(pipe, eager, case), truth)
    return images, calls


@pytest.fixture
def walked(monkeypatch):
    """Return the list of parts whose calls reached the fast path."""
    parts: list[str] = []
    original = FastPath.run

    def counted(self, part, x):
        parts.append(type(part).__name__)
        return original(self, part, x)

    monkeypatch.setattr(FastPath, "run", counted)
    return parts


# Each kind of VAE, and each way in which a pipeline calls it; below image to image and SDXL.
SHORT = ("inpaint", "upscale", "SD3", "FLUX.2 with a picture to go by", "Marigold")


@pytest.mark.usefixtures("users_cpu")
@pytest.mark.parametrize("case", short_run(CASES, SHORT))
def test_images_are_those_of_stock(case, walked):
    pipe = build(case)
    stock, config = copy.deepcopy(pipe.vae), dict(pipe.config)
    before = run(pipe, case)
    images, calls = before
    assert images.std() > LEAST_DEVIATION
    assert not walked

    assert fastvae.accelerate(pipe) is pipe
    assert set(fastvae.explain(pipe).reasons.values()) == {Reason.CPU}
    _, fast_calls = during = assert_as_accurate_as_stock(pipe, case, stock)
    assert walked == [{"encode": "Encoder", "decode": "Decoder"}[name] for name, *_ in calls]
    assert [name for name, *_ in fast_calls] == [name for name, *_ in calls]
    assert torch.equal(fast_calls[0].given, calls[0].given)
    assert same(during, run(pipe, case)), "a run must not depend on the one before"
    assert type(pipe.vae) is type(stock)
    assert dict(pipe.config) == config

    fastvae.accelerate(pipe, precision="exact")
    assert same(before, run(pipe, case))
    fastvae.restore(pipe)
    del walked[:]
    assert same(before, run(pipe, case))
    assert not walked


HALVES = {
    "fp16, decoded in fp32": (torch.float16, True),
    "fp16 throughout": (torch.float16, False),
    "bf16 throughout": (torch.bfloat16, False),
}


@pytest.mark.filterwarnings("ignore:.upcast_vae:FutureWarning")
@pytest.mark.usefixtures("users_cpu")
@pytest.mark.parametrize(
    ("case", "half"),
    short_run(
        [(case, half) for case in ("SDXL", "SDXL, image to image") for half in HALVES],
        [("SDXL, image to image", "fp16, decoded in fp32"), ("SDXL", "bf16 throughout")],
    ),
)
def test_half_precision_pipelines_recast_as_ever(case, half):
    """With force_upcast SDXL's pipelines cast an fp16 VAE to fp32 and back within each call."""
    dtype, upcast = HALVES[half]
    pipe = build(case).to(dtype)
    pipe.vae.register_to_config(force_upcast=upcast)
    computed = torch.float32 if upcast else dtype
    stock = copy.deepcopy(pipe.vae).to(computed)
    before = run(pipe, case)
    assert before[0].std() > LEAST_DEVIATION
    fastvae.accelerate(pipe)
    _, calls = assert_as_accurate_as_stock(pipe, case, stock)
    assert {each.given.dtype for each in calls} == {computed}
    assert pipe.vae.dtype == dtype
    fastvae.restore(pipe)
    assert same(before, run(pipe, case))


@pytest.mark.usefixtures("users_cpu")
def test_a_decoder_that_takes_the_image_runs_as_a_module():
    """AsymmetricAutoencoderKL: inpainting passes its decoder image and mask; its encoder is AutoencoderKL's."""
    case = "inpaint"
    pipe = build(case)
    pipe.vae = two_sided_autoencoder().requires_grad_(False)
    stock = copy.deepcopy(pipe.vae)
    before = run(pipe, case)
    assert before[0].std() > LEAST_DEVIATION
    fastvae.accelerate(pipe)
    assert set(fastvae.explain(pipe).reasons.items()) == {
        ("encoder", Reason.CPU),
        ("decoder", Reason.UNSUPPORTED_LAYER),
    }
    _, calls = assert_as_accurate_as_stock(pipe, case, stock)
    assert [name for name, *_ in calls] == [name for name, *_ in before[1]] == ["encode", "encode", "decode"]
    assert set(calls[2].shown) == {"image", "mask"}
    fastvae.restore(pipe)
    assert same(before, run(pipe, case))


@pytest.mark.skipif("cpu" not in KERNEL_DEVICES, reason="a GPU is there, and the interpreter is not")
@pytest.mark.parametrize(
    "case", short_run(["image to image", "image to image, small picture"], ["image to image, small picture"])
)
def test_images_of_the_fused_kernels_are_those_of_stock(case):
    pipe = build(case)
    stock = copy.deepcopy(pipe.vae)
    before = run(pipe, case)
    fastvae.accelerate(pipe)
    assert not fastvae.explain(pipe).reasons
    _, calls = assert_as_accurate_as_stock(pipe, case, stock)
    assert fastvae.fast_report(pipe)["rows"] == len(calls) == 2
    fastvae.restore(pipe)
    assert same(before, run(pipe, case))
