"""Renaming of tensors from other layouts to diffusers' names: pure functions on strings.

Three layouts occur: that of diffusers, that of diffusers before its attention was renamed (query, key, value,
proj_attn), and that of the original latent-diffusion code (LDM), bare or in a whole checkpoint under a prefix. Source:
diffusers.loaders.single_file_utils and diffusers.models.modeling_utils.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Prefixes of the VAE's tensors in a whole checkpoint, in the order of the search; the last is that of a bare VAE.
PREFIXES = ("first_stage_model.", "vae.", "")

#: First words of the tensor names of each half of a VAE.
PART_ROOTS = {"encoder": ("encoder", "quant_conv", "bn"), "decoder": ("decoder", "post_quant_conv", "bn")}
_ROOTS = tuple(dict.fromkeys(root for roots in PART_ROOTS.values() for root in roots))

_DEPRECATED_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LDM_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LDM_UP = re.compile(r"decoder\.up\.(\d+)\.")
_LDM_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.(.+)")
_LDM_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d+)\.(.+)")
_ATTENTION_WEIGHT = re.compile(r".*\.attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight")

# In FLUX.2's original file each 1x1 convolution is inside the half that it belongs to.
_MOVED_ROOTS = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def is_attention_weight(name: str) -> bool:
    """Return True if a diffusers name is an attention projection, which LDM stores as a convolution [C, C, 1, 1]."""
    return _ATTENTION_WEIGHT.fullmatch(name) is not None


def is_vae_name(name: str) -> bool:
    """Return True if the first word of a name (without prefix) is that of a VAE's tensor."""
    return name.split(".", 1)[0] in _ROOTS


def part_of(name: str, parts: Iterable[str]) -> bool:
    """Return True if a diffusers name is of one of ``parts`` ("encoder", "decoder"); batch statistics are of both."""
    root = name.split(".", 1)[0]
    return any(root in PART_ROOTS[part] for part in parts)


def find_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of the VAE's tensors: "" for a bare VAE, None if there is no VAE."""
    names = list(names)
    for prefix in PREFIXES:
        if any(name.startswith((f"{prefix}encoder.", f"{prefix}decoder.")) for name in names):
            return prefix
    return None


def rename_table(names: Iterable[str]) -> dict[str, str]:
    """Map each of a VAE's tensor names to diffusers' name; names outside the VAE are left out.

    Works for any number of blocks and layers, and for a file with one half alone. Raises ValueError if two names become
    the same.
    """
    names = list(names)
    prefix = find_prefix(names)
    if prefix is None:
        return {}
    stripped = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
    stripped = {name: short for name, short in stripped.items() if is_vae_name(short)}
    # LDM counts the decoder's blocks from the image inwards, diffusers in the order of the computation.
    levels = [int(match.group(1)) for match in map(_LDM_UP.match, stripped.values()) if match]
    up_blocks = max(levels, default=-1) + 1
    table = {name: rename(short, up_blocks) for name, short in stripped.items()}
    seen: dict[str, str] = {}
    for old, new in table.items():
        if new in seen:
            raise ValueError(f"two tensors are the same one, {new}: {seen[new]} and {old}")
        seen[new] = old
    return table


def rename(name: str, up_blocks: int) -> str:
    """Return diffusers' name of one tensor (without prefix) of a VAE whose decoder has ``up_blocks`` blocks.

    A name of another layout is returned unchanged.
    """
    for old, new in _MOVED_ROOTS.items():
        if name.startswith(old):
            return new + name[len(old) :]
    if match := _LDM_BLOCK.fullmatch(name):
        return _rename_block(match, up_blocks)
    if match := _LDM_MIDDLE.fullmatch(name):
        half, kind, index, rest = match.groups()
        stack = "resnets" if kind == "block" else "attentions"
        return f"{half}.mid_block.{stack}.{int(index) - 1}.{_rename_leaf(kind, rest)}"
    if match := re.fullmatch(r"(encoder|decoder)\.norm_out\.(.+)", name):
        return f"{match.group(1)}.conv_norm_out.{match.group(2)}"
    if match := re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(.+)", name):
        return f"{match.group(1)}.{_DEPRECATED_ATTENTION[match.group(2)]}.{match.group(3)}"
    return name


def _rename_block(match: re.Match[str], up_blocks: int) -> str:
    stack, level, kind, rest = match.groups()
    is_down = stack == "encoder.down"
    place = f"{stack}_blocks.{level if is_down else up_blocks - 1 - int(level)}"
    if kind in ("downsample", "upsample"):
        return f"{place}.{kind}rs.0.{rest}"
    index, _, leaf = rest.partition(".")
    return f"{place}.{'resnets' if kind == 'block' else 'attentions'}.{index}.{_rename_leaf(kind, leaf)}"


def _rename_leaf(kind: str, leaf: str) -> str:
    layer, _, rest = leaf.partition(".")
    if kind == "attn":
        layer = _LDM_ATTENTION.get(layer, layer)
    else:
        layer = "conv_shortcut" if layer == "nin_shortcut" else layer
    return f"{layer}.{rest}"
