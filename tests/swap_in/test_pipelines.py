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
from swap_in.tiny_parts import two_sided_autoencoder
from swap_in.tiny_pipelines import CASES, build, call
from torch import Tensor, nn

import fastvae
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath

LEAST_DEVIATION = 0.02
"""Of the images: a picture that random weights drove to white shows no difference."""


class Call(NamedTuple):
    """One call of a VAE: "encode" or "decode", what it was given, its moments or its image, and what else it saw."""

    name: str
    given: Tensor
    result: Tensor
    shown: dict[str, Tensor]


@contextmanager
def replaced(vae: nn.Module, **methods: Any):
    """A VAE whose ``encode`` and ``decode`` are others for a while, as users assign compiled ones."""
    for name, method in methods.items():
        setattr(vae, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(vae, name)


def run(pipe: Any, case: str) -> tuple[Tensor, list[Call]]:
    """A pipeline's images, and the calls of its VAE."""
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
    """A pipeline's images where another VAE computes, in its own dtype and layout, what the pipeline's would."""
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
    """What a VAE gives for x [B, C, H, W] in its own dtype: the moments of ``encode``, the image of ``decode``."""
    dtype = next(vae.parameters()).dtype
    shown = {key: value.to(dtype) for key, value in shown.items()}
    with torch.no_grad():
        done = getattr(vae, name)(x.to(dtype), **shown)
    return done.latent_dist.parameters if name == "encode" else done.sample


def same(one: tuple[Tensor, list[Call]], other: tuple[Tensor, list[Call]]) -> bool:
    """Whether two runs gave the same images and asked the VAE for the same, to the bit."""
    pairs = list(zip(one[1], other[1], strict=True))
    return torch.equal(one[0], other[0]) and all(
        a.name == b.name and torch.equal(a.given, b.given) and torch.equal(a.result, b.result) for a, b in pairs
    )


def assert_as_accurate_as_stock(pipe: Any, case: str, stock: nn.Module) -> tuple[Tensor, list[Call]]:
    """Run an accelerated pipeline and hold every call of its VAE, and its images, to eager and to float64.

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
    """How often a part of a VAE came to the fast path."""
    parts: list[str] = []
    original = FastPath.run

    def counted(self, part, x):
        parts.append(type(part).__name__)
        return original(self, part, x)

    monkeypatch.setattr(FastPath, "run", counted)
    return parts


@pytest.mark.usefixtures("users_cpu")
@pytest.mark.parametrize("case", CASES)
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
    assert same(during, run(pipe, case)), "a run must not hang on the one before"
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
    [
        *(("SDXL", half) for half in HALVES),
        ("SDXL, image to image", "fp16, decoded in fp32"),
        pytest.param("SDXL, image to image", "fp16 throughout", marks=pytest.mark.slow),
        pytest.param("SDXL, image to image", "bf16 throughout", marks=pytest.mark.slow),
    ],
)
def test_half_precision_pipelines_recast_as_ever(case, half):
    """Under force_upcast SDXL's pipelines take a VAE of fp16 to fp32 and back within each call."""
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
def test_a_decoder_that_is_shown_the_picture_runs_as_it_stands():
    """AsymmetricAutoencoderKL's, which inpainting calls with more than latents; its encoder is AutoencoderKL's."""
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
@pytest.mark.parametrize("case", ["image to image"])
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
