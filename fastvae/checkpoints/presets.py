"""Known models as data, and the search for those that fit the shapes in a file.

Shapes do not distinguish every model: SD and SDXL, and SD3 and FLUX.1, have the same tensors and scale their latents
differently. So from_single_file needs the name of a preset if more than one fits. CogView3-Plus is left out: it has
CogView4's tensors, but diffusers' conversion script and the original configuration disagree on its scaling.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastvae.checkpoints.config import CONFIG_DEFAULTS


@dataclass(frozen=True)
class Preset:
    """A known model: its config and the source of the values.

    ``verified`` is False for values from memory, not checked against the model's config.json.
    """

    name: str
    class_name: str
    models: str
    config: Mapping[str, Any]
    source: str
    verified: bool = True


def _config(class_name: str = "AutoencoderKL", **changes: Any) -> dict[str, Any]:
    common = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
    values = {**CONFIG_DEFAULTS[class_name], **common, **changes}
    blocks = len(values["block_out_channels"])
    values["down_block_types"] = ("DownEncoderBlock2D",) * blocks
    values["up_block_types"] = ("UpDecoderBlock2D",) * blocks
    return values


_SDXL = {"scaling_factor": 0.13025, "sample_size": 1024}
_SIXTEEN = {
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_COGVIEW = {
    **_SIXTEEN,
    "block_out_channels": (128, 512, 1024, 1024),
    "layers_per_block": 3,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}
_FROM_MEMORY = "from memory; not read in the model's config.json"

_ALL = (
    Preset("sd15", "AutoencoderKL", "Stable Diffusion 1.x", _config(), "a mirror of the model's config.json"),
    Preset(
        "sd21",
        "AutoencoderKL",
        "Stable Diffusion 2.0, 2.1",
        _config(sample_size=768),
        "a mirror of the model's config.json",
    ),
    Preset(
        "sd-vae-ft-mse",
        "AutoencoderKL",
        "sd-vae-ft-mse",
        _config(sample_size=256),
        "diffusers: tests/models/autoencoders/test_models_autoencoder_kl.py",
    ),
    Preset(
        "sd-vae-ft-ema",
        "AutoencoderKL",
        "sd-vae-ft-ema, PixArt-alpha, DiT",
        _config(sample_size=256),
        _FROM_MEMORY,
        verified=False,
    ),
    Preset(
        "x4-upscaler",
        "AutoencoderKL",
        "Stable Diffusion x4 upscaler",
        _config(block_out_channels=(128, 256, 512), scaling_factor=0.08333, sample_size=256),
        "scaling_factor: diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale; the rest from memory",
        verified=False,
    ),
    Preset(
        "ldm3d",
        "AutoencoderKL",
        "LDM3D (RGB and depth)",
        _config(in_channels=6, out_channels=6),
        _FROM_MEMORY,
        verified=False,
    ),
    Preset(
        "audioldm-s-full-v2",
        "AutoencoderKL",
        "AudioLDM small, full, v2 (mel spectrograms)",
        _config(
            in_channels=1,
            out_channels=1,
            latent_channels=8,
            block_out_channels=(128, 256, 512),
            scaling_factor=0.9392935633659363,
        ),
        "a mirror of the model's config.json",
    ),
    Preset("sdxl", "AutoencoderKL", "Stable Diffusion XL", _config(**_SDXL), "the model's config.json"),
    Preset(
        "sdxl-fp16-fix",
        "AutoencoderKL",
        "sdxl-vae-fp16-fix",
        _config(scaling_factor=0.13025, force_upcast=False),
        _FROM_MEMORY,
        verified=False,
    ),
    Preset(
        "playground-v2.5",
        "AutoencoderKL",
        "Playground v2.5",
        _config(
            scaling_factor=0.5,
            sample_size=1024,
            latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
            latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
        ),
        "scaling_factor: diffusers.loaders.single_file_utils; latents_mean and latents_std from memory",
        verified=False,
    ),
    Preset(
        "hunyuan-dit",
        "AutoencoderKL",
        "HunyuanDiT 1.2, BRIA 3.2",
        _config(scaling_factor=0.13025, force_upcast=False),
        "BRIA 3.2's config.json",
    ),
    Preset("pixart-sigma", "AutoencoderKL", "PixArt-Sigma", _config(**_SDXL), _FROM_MEMORY, verified=False),
    Preset("kolors", "AutoencoderKL", "Kolors", _config(**_SDXL), _FROM_MEMORY, verified=False),
    Preset("auraflow", "AutoencoderKL", "AuraFlow", _config(**_SDXL), _FROM_MEMORY, verified=False),
    Preset(
        "sd3",
        "AutoencoderKL",
        "Stable Diffusion 3, 3.5",
        _config(**_SIXTEEN, scaling_factor=1.5305, shift_factor=0.0609),
        "diffusers: scripts/convert_sd3_to_diffusers.py, and the model's config.json",
    ),
    Preset(
        "flux",
        "AutoencoderKL",
        "FLUX.1, Z-Image, Ovis-Image",
        _config(**_SIXTEEN, scaling_factor=0.3611, shift_factor=0.1159),
        "the model's config.json",
    ),
    Preset(
        "cogview4",
        "AutoencoderKL",
        "CogView4",
        _config(**_COGVIEW),
        "diffusers: scripts/convert_cogview4_to_diffusers.py",
    ),
    Preset(
        "flux2",
        "AutoencoderKLFlux2",
        "FLUX.2, Ernie-Image, Ideogram 4, FIBO 2",
        dict(CONFIG_DEFAULTS["AutoencoderKLFlux2"]),
        "diffusers.models.autoencoders.autoencoder_kl_flux2 (its defaults)",
    ),
    Preset(
        "flux2-small-decoder",
        "AutoencoderKLFlux2",
        "FLUX.2 with the small decoder",
        {**CONFIG_DEFAULTS["AutoencoderKLFlux2"], "decoder_block_out_channels": (96, 192, 384, 384)},
        "config.json of black-forest-labs/FLUX.2-small-decoder",
    ),
)

#: Keys that change no latent: the size above which an image is tiled, and a pipeline's use of fp32 for decoding.
HINTS = ("sample_size", "force_upcast")
#: Every preset by name.
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def find_preset(name: str, class_name: str) -> Preset:
    """Return the preset of that name. Raises ValueError, which names the known presets, or the class of the preset."""
    preset = PRESETS.get(name)
    if preset is None:
        close = difflib.get_close_matches(str(name), PRESETS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"preset: there is no {name!r}{hint}; there are {', '.join(PRESETS)}")
    if preset.class_name != class_name:
        raise ValueError(
            f"preset: {name!r} is a {preset.class_name}, not a {class_name}; use fastvae.{preset.class_name}"
        )
    return preset


def matching(config: Mapping[str, Any], class_name: str) -> tuple[Preset, ...]:
    """Return the presets that have this config exactly; if there is none, those that differ in HINTS alone."""

    def agrees(preset: Preset, but: Collection[str]) -> bool:
        return preset.class_name == class_name and all(
            _as_list(config.get(name)) == _as_list(value) for name, value in preset.config.items() if name not in but
        )

    exact = tuple(preset for preset in _ALL if agrees(preset, ()))
    return exact or tuple(preset for preset in _ALL if agrees(preset, HINTS))


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def structure(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the config values that the shapes of tensors, by diffusers' names, decide; other keys are left out.

    A file without encoder or decoder gives the values that the other half decides.
    """
    seen: dict[str, Any] = {}
    for half, stack, layers_more in (("decoder", "up_blocks", 1), ("encoder", "down_blocks", 0)):
        widths = _widths(shapes, f"{half}.{stack}")
        if not widths or f"{half}.conv_in.weight" not in shapes or f"{half}.conv_out.weight" not in shapes:
            continue
        outputs, inputs = shapes[f"{half}.conv_out.weight"][0], shapes[f"{half}.conv_in.weight"][1]
        if half == "encoder" and seen.get("block_out_channels", widths) != widths:
            seen["decoder_block_out_channels"] = seen["block_out_channels"]
        seen["latent_channels"] = outputs // 2 if half == "encoder" else inputs
        seen["in_channels" if half == "encoder" else "out_channels"] = inputs if half == "encoder" else outputs
        seen["block_out_channels"] = widths if half == "encoder" else widths[::-1]
        layers = sum(f"{half}.{stack}.0.resnets.{i}.conv1.weight" in shapes for i in range(len(shapes)))
        seen["layers_per_block"] = layers - layers_more
        seen["mid_block_add_attention"] = f"{half}.mid_block.attentions.0.to_q.weight" in shapes
        convolution = "quant_conv" if half == "encoder" else "post_quant_conv"
        seen[f"use_{convolution}"] = f"{convolution}.weight" in shapes
    return seen


def candidates(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Preset, ...]:
    """Return the presets whose tensors have these shapes, given by diffusers' names."""
    seen = structure(shapes)
    if not seen:
        return ()
    class_name = "AutoencoderKLFlux2" if "bn.running_mean" in shapes else "AutoencoderKL"
    fitting = tuple(preset for preset in _ALL if preset.class_name == class_name and not unlike(preset.config, shapes))
    # Without a decoder in the file, models that differ in their decoders alone are one.
    if "decoder.conv_in.weight" not in shapes:
        fitting = tuple(preset for preset in fitting if preset.config.get("decoder_block_out_channels") is None)
    return fitting


def unlike(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the values of structure(shapes) that ``config`` has otherwise."""
    seen, decoder = structure(shapes), "decoder_block_out_channels"
    if "encoder.conv_in.weight" not in shapes and "block_out_channels" in seen and config.get(decoder):
        seen[decoder] = seen.pop("block_out_channels")
    elif "decoder.conv_in.weight" in shapes and "block_out_channels" in seen and config.get(decoder):
        seen.setdefault(decoder, seen["block_out_channels"])
    return {key: value for key, value in seen.items() if config.get(key) != value}


def _widths(shapes: Mapping[str, tuple[int, ...]], stack: str) -> tuple[int, ...]:
    widths = []
    while (shape := shapes.get(f"{stack}.{len(widths)}.resnets.0.conv1.weight")) is not None:
        widths.append(shape[0])
    return tuple(widths)
