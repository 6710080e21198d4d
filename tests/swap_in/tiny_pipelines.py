"""diffusers' pipelines with tiny random parts.

Each case of ``CASES`` names a pipeline and how it is called; ``call`` gives its images as a float tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from swap_in.tiny_parts import (
    NARROW,
    SIDE,
    WORDS,
    as_pil,
    autoencoder,
    clip,
    ddim,
    gemma,
    mask,
    picture,
    qwen,
    sixteen_latents,
    t5,
    unet,
)
from torch import Tensor, nn


def stable_diffusion(pipeline: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    """Return a pipeline of Stable Diffusion 1.5's family; ``parts`` replaces its own parts."""
    tokenizer, text_encoder = clip()
    own = {
        "vae": autoencoder,
        "text_encoder": lambda: text_encoder,
        "tokenizer": lambda: tokenizer,
        "unet": unet,
        "scheduler": ddim,
        "safety_checker": lambda: None,
        "feature_extractor": lambda: None,
        "requires_safety_checker": lambda: False,
    }
    made = {name: build() for name, build in own.items() if name not in parts}
    return getattr(diffusers, pipeline)(**made, **parts)


def controlnet() -> Any:
    """Return Stable Diffusion with a ControlNet."""
    guide = diffusers.ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(4, 8), **NARROW
    )
    for weight in guide.controlnet_down_blocks.parameters():  # born as zeros, so that it would say nothing
        nn.init.normal_(weight, std=0.1)
    return stable_diffusion("StableDiffusionControlNetPipeline", controlnet=guide.eval())


def upscale() -> Any:
    """Return the x4 upscaler: latents of the size of its input image, and a VAE of four pixels a latent."""
    tokenizer, text_encoder = clip()
    return diffusers.StableDiffusionUpscalePipeline(
        vae=autoencoder(blocks=3, scaling_factor=0.08333),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet(7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=ddim(),
    )


def marigold() -> Any:
    """Return Marigold's depth pipeline: its UNet takes the latents of the image and of the depth."""
    tokenizer, text_encoder = clip()
    return diffusers.MarigoldDepthPipeline(
        unet=unet(8),
        vae=autoencoder(),
        scheduler=ddim(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        prediction_type="depth",
    )


def xl(pipeline: str = "StableDiffusionXLPipeline") -> Any:
    """Return SDXL with its two text encoders and image sizes as conditions."""
    tokenizer, text_encoder = clip()
    tokenizer_2, text_encoder_2 = clip("CLIPTextModelWithProjection")
    return getattr(diffusers, pipeline)(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        unet=unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 32,
        ),
        scheduler=ddim(),
        add_watermarker=False,
    )


def stable_diffusion_3(pipeline: str = "StableDiffusion3Pipeline") -> Any:
    """Return SD3: three text encoders, a transformer, sixteen latents."""
    tokenizer, text_encoder = clip("CLIPTextModelWithProjection")
    tokenizer_2, text_encoder_2 = clip("CLIPTextModelWithProjection")
    tokenizer_3, text_encoder_3 = t5()
    return getattr(diffusers, pipeline)(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=1,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
        ).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=sixteen_latents(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def flux(pipeline: str = "FluxPipeline") -> Any:
    """Return FLUX.1: two text encoders, a transformer over packed latents, sixteen of them."""
    tokenizer, text_encoder = clip()
    tokenizer_2, text_encoder_2 = t5()
    return getattr(diffusers, pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=sixteen_latents(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
    )


def z_image() -> Any:
    """Return Z-Image: a language model reads the prompt, one transformer takes text and latents together."""
    tokenizer, text_encoder = qwen()
    transformer = diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    # Two vectors are uninitialised memory, which a checkpoint would fill.
    for weight in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(weight, std=0.02)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=sixteen_latents(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def lumina() -> Any:
    """Return Lumina 2: a language model reads the prompt; it assumes eight pixels a latent for any VAE."""
    tokenizer, text_encoder = gemma()
    return diffusers.Lumina2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=sixteen_latents(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=SIDE // 2,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(64, 32, 32),
            cap_feat_dim=32,
        ).eval(),
    )


def flux_2() -> Any:
    """Return FLUX.2 klein: latents in patches of 2x2, normalised by statistics of its VAE."""
    tokenizer, text_encoder = qwen("Qwen3ForCausalLM")
    vae = autoencoder(kind="AutoencoderKLFlux2", latent_channels=32, layers_per_block=1)
    nn.init.normal_(vae.bn.running_mean, std=0.1)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=64,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ).eval(),
    )


SQUARE = {"height": SIDE, "width": SIDE}
SHORT = SQUARE | {"max_sequence_length": WORDS}
FROM_PICTURE = {"image": picture(), "strength": 0.6, "num_inference_steps": 4}
CASES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "text to image": (stable_diffusion, lambda: SQUARE),
    "image to image": (
        lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
        lambda: FROM_PICTURE,
    ),
    "image to image, small picture": (
        lambda: stable_diffusion("StableDiffusionImg2ImgPipeline"),
        lambda: FROM_PICTURE | {"image": picture(SIDE // 2)},
    ),
    "inpaint": (
        lambda: stable_diffusion("StableDiffusionInpaintPipeline", unet=unet(9)),
        lambda: {"image": picture(), "mask_image": mask(), "strength": 1.0, **SQUARE},
    ),
    "inpaint without a UNet for it": (
        lambda: stable_diffusion("StableDiffusionInpaintPipeline"),
        lambda: {"image": picture(), "mask_image": mask(), "strength": 0.8, "num_inference_steps": 3, **SQUARE},
    ),
    "upscale": (upscale, lambda: {"image": picture(16)}),
    "ControlNet": (controlnet, lambda: {"image": picture(), **SQUARE}),
    "SDXL": (xl, lambda: SQUARE),
    "SDXL, image to image": (
        lambda: xl("StableDiffusionXLImg2ImgPipeline"),
        lambda: FROM_PICTURE,
    ),
    "SDXL, inpaint": (
        lambda: xl("StableDiffusionXLInpaintPipeline"),
        lambda: {"image": picture(), "mask_image": mask(), "strength": 0.8, "num_inference_steps": 3, **SQUARE},
    ),
    "SD3": (stable_diffusion_3, lambda: SHORT),
    "SD3, image to image": (
        lambda: stable_diffusion_3("StableDiffusion3Img2ImgPipeline"),
        lambda: SHORT | FROM_PICTURE,
    ),
    "FLUX": (flux, lambda: SHORT),
    "FLUX, image to image": (lambda: flux("FluxImg2ImgPipeline"), lambda: SHORT | FROM_PICTURE),
    "FLUX.2 with a picture to go by": (
        flux_2,
        lambda: SHORT | {"image": as_pil(picture(64)), "text_encoder_out_layers": (0, 1)},
    ),
    "Z-Image": (z_image, lambda: SHORT),
    "Lumina 2": (
        lumina,
        lambda: {"height": 4 * SIDE, "width": 4 * SIDE, "system_prompt": "a b", "max_sequence_length": 64},
    ),
    "Marigold": (marigold, lambda: {"image": picture(), "processing_resolution": SIDE}),
}


def build(case: str, seed: int = 0) -> Any:
    """Return the pipeline of a case with weights drawn from ``seed``, frozen and without a progress bar."""
    torch.manual_seed(seed)
    pipe = CASES[case][0]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipe


def call(pipe: Any, case: str, seed: int = 7) -> Tensor:
    """Return the images [B, C, H, W] in [0, 1] of two steps from ``seed``."""
    given = {"num_inference_steps": 2, "output_type": "pt", "generator": torch.Generator().manual_seed(seed)}
    defaults = {"prompt": "a red fox", "negative_prompt": "blurry"}
    taken = inspect.signature(type(pipe).__call__).parameters
    done = pipe(**{name: value for name, value in defaults.items() if name in taken}, **(given | CASES[case][1]()))
    return done.prediction if case == "Marigold" else done.images
