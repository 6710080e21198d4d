"""Rules for config values. Every rule is arithmetic on the values: no tensor and no long list is made.

The bounds are far above every known model (the largest, CogView4, has 406 million parameters, 1024 channels and three
layers per block) and far below what would exhaust a machine.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHANNELS = 65_536
MAX_LAYERS = 64
MAX_BLOCKS = 16
MAX_SIZE = 1_048_576
MAX_PARAMETERS = 4_000_000_000

#: Blocks of an encoder and of a decoder, by diffusers' class names.
DOWN_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCK_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
#: act_fn in lower case and the class of torch.nn it names (diffusers.models.activations.ACT2CLS).
ACTIVATIONS = {"silu": "SiLU", "swish": "SiLU", "mish": "Mish", "gelu": "GELU", "relu": "ReLU"}

_FOREIGN_PREFIXES = ("Autoencoder", "AsymmetricAutoencoder", "ConsistencyDecoder", "FlaxAutoencoder", "UNet", "VQ")
_FOREIGN_SUFFIXES = ("Transformer2DModel", "Transformer3DModel", "Pipeline", "Scheduler")


def is_foreign_class(name: str) -> bool:
    """Return True if ``name`` looks like another class of diffusers, not like a user's own subclass."""
    return name.startswith(_FOREIGN_PREFIXES) or name.endswith(_FOREIGN_SUFFIXES)


def check(values: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for the first value that is not legal; ``values`` holds every key of its class."""
    for key, (is_legal, taken) in _RULES.items():
        if key in values and not is_legal(values[key]):
            raise _refusal(source, key, values[key], taken)
    _check_blocks(values, source)
    _check_latent_statistics(values, source)
    count = parameter_count(values)
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"{source}: this config describes about {count:,} parameters (block_out_channels="
            f"{values['block_out_channels']}, layers_per_block={values['layers_per_block']}); at most "
            f"{MAX_PARAMETERS:,} are taken"
        )


def parameter_count(values: Mapping[str, Any]) -> int:
    """Return the number of parameters of encoder, decoder, quant convolutions and batch norm, by arithmetic alone.

    Source: the layers of diffusers.models.autoencoders.vae (Encoder, Decoder) and their blocks.
    """
    latents, layers, with_attention = (
        values[key] for key in ("latent_channels", "layers_per_block", "mid_block_add_attention")
    )
    encoder, decoder = (values["block_out_channels"], _decoder_channels(values)[::-1])
    total = _conv(values["in_channels"], encoder[0]) + 2 * encoder[-1] + _conv(encoder[-1], 2 * latents)
    total += _stack(encoder, values["down_block_types"], layers) + _middle(encoder[-1], with_attention)
    total += _conv(latents, decoder[0]) + 2 * decoder[-1] + _conv(decoder[-1], values["out_channels"])
    total += _stack(decoder, values["up_block_types"], layers + 1) + _middle(decoder[0], with_attention)
    total += _conv(2 * latents, 2 * latents, 1) if values["use_quant_conv"] else 0
    # Running mean and variance are buffers, but a hostile patch_size makes them arbitrarily large.
    total += 2 * latents * math.prod(values["patch_size"]) if "patch_size" in values else 0
    return total + (_conv(latents, latents, 1) if values["use_post_quant_conv"] else 0)


def _conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return outputs * (inputs * kernel * kernel + 1)


def _resnet(inputs: int, outputs: int) -> int:
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
    return 2 * inputs + _conv(inputs, outputs) + 2 * outputs + _conv(outputs, outputs) + shortcut


def _attention(channels: int) -> int:
    return 2 * channels + 4 * _conv(channels, channels, 1)


def _middle(channels: int, with_attention: bool) -> int:
    return 2 * _resnet(channels, channels) + (_attention(channels) if with_attention else 0)


def _stack(channels: tuple[int, ...], types: tuple[str, ...], layers: int) -> int:
    total, inputs = 0, channels[0]
    for index, (outputs, block) in enumerate(zip(channels, types, strict=True)):
        total += _resnet(inputs, outputs) + (layers - 1) * _resnet(outputs, outputs)
        total += layers * _attention(outputs) if block.startswith("Attn") else 0
        total += _conv(outputs, outputs) if index < len(channels) - 1 else 0
        inputs = outputs
    return total


def _decoder_channels(values: Mapping[str, Any]) -> tuple[int, ...]:
    return values.get("decoder_block_out_channels") or values["block_out_channels"]


def _check_blocks(values: Mapping[str, Any], source: str) -> None:
    encoder_key = "block_out_channels"
    decoder_key = "decoder_block_out_channels" if values.get("decoder_block_out_channels") else encoder_key
    for types_key, channels_key in (("down_block_types", encoder_key), ("up_block_types", decoder_key)):
        if len(values[types_key]) != len(values[channels_key]):
            raise ValueError(
                f"{source}: {types_key} has {len(values[types_key])} entries and {channels_key} has "
                f"{len(values[channels_key])}; both must have one per block"
            )
    if len(values[decoder_key]) != len(values[encoder_key]):
        raise ValueError(
            f"{source}: {decoder_key} has {len(values[decoder_key])} entries and {encoder_key} has "
            f"{len(values[encoder_key])}; decoder and encoder must scale by the same factor"
        )
    groups = values["norm_num_groups"]
    for key in {encoder_key: None, decoder_key: None}:
        odd = [width for width in values[key] if width % groups]
        if odd:
            raise ValueError(f"{source}: {key} holds {odd[0]}, which is not divisible by norm_num_groups={groups}")


def _check_latent_statistics(values: Mapping[str, Any], source: str) -> None:
    latents = values["latent_channels"]
    for key in ("latents_mean", "latents_std"):
        given = values.get(key)
        if given is None:
            continue
        if not isinstance(given, tuple) or len(given) != latents or not all(_is_finite(value) for value in given):
            raise _refusal(source, key, given, f"null, or {latents} finite numbers (one per latent channel)")
        if key == "latents_std" and not all(value > 0 for value in given):
            raise _refusal(source, key, given, "numbers above zero")
    if (values.get("latents_mean") is None) != (values.get("latents_std") is None):
        raise ValueError(f"{source}: latents_mean and latents_std must both be given, or neither")


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # An int beyond the range of a double has no finite float; isfinite would raise on it.
    return abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)


def _is_tuple_of(value: Any, is_legal: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= MAX_BLOCKS and all(is_legal(item) for item in value)


def _is_channels(value: Any) -> bool:
    return _is_integer(value, 1, MAX_CHANNELS)


def _is_size(value: Any) -> bool:
    return _is_integer(value, 1, MAX_SIZE)


def _is_pair(value: Any, is_legal: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(is_legal(item) for item in value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_CHANNELS = f"a whole number from 1 to {MAX_CHANNELS}"
_WIDTHS = f"a list of 1 to {MAX_BLOCKS} whole numbers from 1 to {MAX_CHANNELS}"
_Rule = tuple[Callable[[Any], bool], str]
_RULES: dict[str, _Rule] = {
    "in_channels": (_is_channels, _CHANNELS),
    "out_channels": (_is_channels, _CHANNELS),
    "latent_channels": (_is_channels, _CHANNELS),
    "norm_num_groups": (_is_channels, _CHANNELS),
    "layers_per_block": (lambda v: _is_integer(v, 1, MAX_LAYERS), f"a whole number from 1 to {MAX_LAYERS}"),
    "block_out_channels": (lambda v: _is_tuple_of(v, _is_channels), _WIDTHS),
    "decoder_block_out_channels": (lambda v: v is None or _is_tuple_of(v, _is_channels), "null, or " + _WIDTHS),
    "down_block_types": (
        lambda v: _is_tuple_of(v, lambda item: item in DOWN_BLOCK_TYPES),
        f"a list of 1 to {MAX_BLOCKS} of {', '.join(DOWN_BLOCK_TYPES)}",
    ),
    "up_block_types": (
        lambda v: _is_tuple_of(v, lambda item: item in UP_BLOCK_TYPES),
        f"a list of 1 to {MAX_BLOCKS} of {', '.join(UP_BLOCK_TYPES)}",
    ),
    "act_fn": (lambda v: isinstance(v, str) and v.lower() in ACTIVATIONS, "one of " + ", ".join(ACTIVATIONS)),
    "sample_size": (
        lambda v: _is_size(v) or _is_pair(v, _is_size),
        f"a whole number from 1 to {MAX_SIZE}, or a pair of them (height, width)",
    ),
    "scaling_factor": (lambda v: _is_finite(v) and v != 0, "a finite number other than zero"),
    "shift_factor": (lambda v: v is None or _is_finite(v), "null or a finite number"),
    "force_upcast": (_is_bool, "true or false"),
    "use_quant_conv": (_is_bool, "true or false"),
    "use_post_quant_conv": (_is_bool, "true or false"),
    "mid_block_add_attention": (_is_bool, "true or false"),
    "batch_norm_eps": (lambda v: _is_finite(v) and v > 0, "a finite number above zero"),
    "batch_norm_momentum": (lambda v: v is None or (_is_finite(v) and 0 <= v <= 1), "null or a number from 0 to 1"),
    "patch_size": (
        lambda v: _is_pair(v, lambda item: _is_integer(item, 1, 64)) and v[0] == v[1],
        "a pair of two equal whole numbers from 1 to 64",
    ),
}


class _Shown(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print an integer of more than 4300 digits.
        return super().repr_int(x, level) if abs(x) < 10**18 else f"an integer of {x.bit_length()} bits"


def _refusal(source: str, key: str, value: Any, taken: str) -> ValueError:
    # The value comes from a file and may be a megabyte long: shortened, so that the message stays readable.
    return ValueError(f"{source}: {key} must be {taken}, got {_Shown().repr(value)}")
