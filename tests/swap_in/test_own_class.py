"""fastvae's own AutoencoderKL as the ``vae`` of a diffusers pipeline: supported calls and errors."""

from __future__ import annotations

import copy
import json
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import hooks
from support.short_run import short_run
from swap_in.stock import offloads_groups
from swap_in.tiny_parts import autoencoder
from swap_in.tiny_pipelines import CASES, build, call
from torch import nn

import fastvae

pytestmark = pytest.mark.usefixtures("users_cpu")

MIXED = "SDXL, image to image"
"""A case that encodes and decodes, and recasts a VAE of half precision within one call."""


def own(vae: nn.Module) -> Any:
    """Return fastvae's model with the config and weights of diffusers' one."""
    ours = getattr(fastvae, type(vae).__name__).from_config(vae.config)
    ours.load_state_dict(vae.state_dict())
    return ours.to(vae.dtype).eval()


def pipeline_with_ours(case: str = "image to image") -> tuple[Any, fastvae.AutoencoderKL]:
    pipe = build(case)
    pipe.vae = own(pipe.vae)
    return pipe, pipe.vae


# test_pipelines.py runs more cases with diffusers' class.
SHORT = ("image to image", "FLUX")


@pytest.mark.parametrize("case", short_run(CASES, SHORT))
def test_images_are_those_of_diffusers_class(case):
    pipe = build(case)
    expected, fast = call(pipe, case), call(fastvae.accelerate(pipe), case)
    pipe.vae = own(pipe.vae)
    assert torch.equal(call(pipe, case), expected)
    assert torch.equal(call(fastvae.accelerate(pipe), case), fast)
    assert torch.equal(call(fastvae.restore(pipe), case), expected)


@pytest.mark.filterwarnings("ignore:.upcast_vae:FutureWarning")
@pytest.mark.parametrize("fast", [False, True], ids=["", "accelerated"])
def test_a_pipeline_recasts_it_like_diffusers_class(fast):
    """SDXL's force_upcast casts an fp16 VAE to fp32 for a call, and back."""
    images = []
    pipe = build(MIXED).to(torch.float16)
    for vae in (pipe.vae, own(pipe.vae)):
        pipe.vae = fastvae.accelerate(vae) if fast else vae
        images.append(call(pipe, MIXED))
        assert pipe.vae.dtype == torch.float16
    assert images[0].std() > 0.02
    assert torch.equal(*images)
    pipe.to(torch.float64)
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float64}


class Bringing(accelerate.hooks.ModelHook):
    """A hook as the one that moves a model to a GPU: until it runs, the weights are zeros."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.weights = copy.deepcopy(module.state_dict())
        with torch.no_grad():
            for weight in module.parameters():
                weight.zero_()
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        module.load_state_dict(self.weights)
        return args, kwargs


METHODS = ("encode", "decode", "forward", "encode_latents", "decode_latents")


@pytest.mark.parametrize(
    ("method", "fast"),
    short_run(
        [(method, fast) for method in METHODS for fast in (False, True)],
        [*((method, True) for method in METHODS), ("encode", False)],
    ),
)
def test_a_model_offload_hook_brings_the_weights_first(method, fast):
    ours = own(autoencoder()).requires_grad_(False)
    if fast:
        fastvae.accelerate(ours)
    x = torch.rand(1, 4, 8, 8) if "decode" in method else torch.rand(1, 3, 16, 16)

    def result():
        done = getattr(ours, method)(x, **({"posterior": "mode"} if method == "encode_latents" else {}))
        return getattr(done, "latent_dist", done).mean if method == "encode" else getattr(done, "sample", done)

    expected = result()
    accelerate.hooks.add_hook_to_module(ours, Bringing())
    assert not any(weight.any() for weight in ours.parameters())
    assert torch.equal(result(), expected)


def offloaded_by_model(pipe: Any) -> None:
    hook = None
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        _, hook = accelerate.cpu_offload_with_hook(part, "cpu", prev_module_hook=hook)


def offloaded_by_layer(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    assert {weight.device.type for weight in pipe.vae.parameters()} == {"meta"}


def offloaded_by_group(pipe: Any) -> None:
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(pipe.vae, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def of_the_pipeline_by_group(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def stored_in_one_byte(pipe: Any) -> None:
    hooks.apply_layerwise_casting(pipe.vae, torch.float8_e4m3fn, torch.float32)


OFFLOADS = [
    (offloaded_by_model, []),
    (offloaded_by_layer, []),
    (offloaded_by_group, [offloads_groups]),
    (of_the_pipeline_by_group, [offloads_groups]),
    (stored_in_one_byte, []),
]


@pytest.mark.parametrize(
    ("offload", "fast"),
    [
        pytest.param(offload, fast, marks=marks if fast else [*marks, pytest.mark.slow])
        for offload, marks in OFFLOADS
        for fast in (True, False)
    ],
)
def test_an_offloaded_pipeline_computes_as_with_diffusers_class(offload, fast):
    case, images = "image to image", []
    pipes = build(case), pipeline_with_ours(case)[0]
    for pipe in pipes:
        if fast:
            fastvae.accelerate(pipe)
        offload(pipe)
        images.append(call(pipe, case))
        assert torch.equal(call(pipe, case), images[-1])
    assert torch.equal(*images)


def test_from_pipe_keeps_it():
    """from_pipe checks the type of diffusers' classes only, so ours is kept."""
    pipe, ours = pipeline_with_ours("image to image")
    fastvae.accelerate(pipe)
    other = diffusers.StableDiffusionInpaintPipeline.from_pipe(pipe, requires_safety_checker=False)
    auto = diffusers.AutoPipelineForText2Image.from_pipe(pipe)
    assert other.vae is auto.vae is ours
    assert fastvae.explain(other).rows
    stock = fastvae.accelerate(build("text to image"))
    assert torch.equal(call(auto, "text to image"), call(stock, "text to image"))


def test_saving_a_pipeline_with_it_is_refused(tmp_path):
    """Without the error diffusers logs a line and writes a pipeline without a VAE."""
    pipe, _ = pipeline_with_ours()
    with pytest.raises(ValueError, match=r"fastvae\.accelerate.*vae\.save_pretrained"):
        pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_saving_as_the_refusal_says(tmp_path):
    pipe, ours = pipeline_with_ours("text to image")
    expected = call(pipe, "text to image")
    ours.save_pretrained(tmp_path / "own")
    pipe.vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "own")
    pipe.save_pretrained(tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(call(again, "text to image"), expected)


def test_loading_a_pipeline_around_it_is_refused(tmp_path):
    pipe = build("text to image")
    pipe.save_pretrained(tmp_path)
    ours = own(pipe.vae)
    with pytest.raises(ValueError, match=r"fastvae\.accelerate.*set its vae"):
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, vae=ours, safety_checker=None)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipe.vae = ours
    assert torch.equal(call(pipe, "text to image"), call(build("text to image"), "text to image"))


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0"])
def test_attention_processors_of_diffusers_are_refused(processor):
    """They read attributes of diffusers' Attention; without the check they raise for a missing ``spatial_norm``."""
    ours = own(autoencoder())
    before = ours.attn_processors
    foreign = getattr(diffusers.models.attention_processor, processor)()
    with pytest.raises(ValueError, match=rf"got diffusers' {processor}: .*fastvae\.accelerate"):
        ours.set_attn_processor(foreign)
    assert ours.attn_processors == before


def test_projections_are_fused_on_the_model_and_not_by_the_pipeline():
    """The pipeline's method requires diffusers' class, and raises before it changes the VAE."""
    pipe, ours = pipeline_with_ours("text to image")
    names = set(ours.state_dict())
    with pytest.raises(ValueError, match="only supported for the VAE of type"):
        pipe.fuse_qkv_projections(unet=False)
    assert set(ours.state_dict()) == names
    ours.fuse_qkv_projections()
    theirs = build("text to image")
    theirs.fuse_qkv_projections(unet=False)
    assert set(theirs.vae.state_dict()) == set(ours.state_dict()) > names
    assert torch.equal(call(pipe, "text to image"), call(theirs, "text to image"))


def test_others_may_format_it():
    ours = own(autoencoder())
    assert f"{ours}" == str(ours) == repr(ours)

    def save_pretrained():
        return f"{ours}"

    assert save_pretrained() == str(ours)
