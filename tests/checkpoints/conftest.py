"""A small model, and the same weights under the names of other layouts."""

import re

import pytest
import torch
from safetensors.torch import save_file

from fastvae.models import AutoencoderKL

SMALL = {
    "block_out_channels": (16, 32, 32),
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "sample_size": 64,
    "scaling_factor": 0.7,
    "shift_factor": 0.1,
}
_LDM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_DEPRECATED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def ldm_name(name, up_blocks):
    """Return the LDM name of a diffusers tensor: the inverse of the tested function, implemented separately."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    rest = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", rest)
    rest = rest.replace("mid_block.attentions.0", "mid.attn_1")
    rest = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", rest)
    rest = re.sub(r"down_blocks\.(\d+)\.attentions", r"down.\1.attn", rest)
    rest = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", rest)
    up = re.match(r"up_blocks\.(\d+)\.", rest)
    if up:
        level = up_blocks - 1 - int(up[1])
        rest = f"up.{level}." + rest[up.end() :].replace("resnets.", "block.").replace("attentions.", "attn.")
        rest = rest.replace("upsamplers.0", "upsample")
    if "attn" in rest:
        for new, old in _LDM_ATTENTION.items():
            rest = re.sub(rf"(attn(?:_1|\.\d+))\.{re.escape(new)}\.", rf"\1.{old}.", rest)
    return f"{half}.{rest}"


def to_ldm(state, up_blocks=3, prefix="", dimensions=2):
    """Return a state dict with LDM names, attention weights as convolutions with ``dimensions`` trailing ones."""
    found = {}
    for name, tensor in state.items():
        old = ldm_name(name, up_blocks)
        is_projection = re.search(r"attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight", old)
        found[prefix + old] = tensor.reshape(*tensor.shape, *[1] * dimensions) if is_projection else tensor
    return found


def to_deprecated(state):
    """Return a state dict with the attention names of diffusers before 2023."""
    found = {}
    for name, tensor in state.items():
        for new, old in _DEPRECATED.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        found[name] = tensor
    return found


def write(path, state):
    """Save a state dict of possibly shared or strided tensors as safetensors."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, path)
    return path


def assert_same_state(got, expected, dtype=None):
    """Assert equal names, dtypes and values, bit for bit."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        converted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert got[name].dtype == converted.dtype, name
        assert torch.equal(got[name], converted), name


class Layouts:
    """Helpers of the tests in this folder; a class, since a folder of tests is not a package to import from."""

    small = SMALL
    to_ldm = staticmethod(to_ldm)
    to_deprecated = staticmethod(to_deprecated)
    write = staticmethod(write)
    assert_same_state = staticmethod(assert_same_state)


@pytest.fixture(scope="session")
def layouts():
    return Layouts


@pytest.fixture(scope="session")
def model():
    generator_state = torch.get_rng_state()
    torch.manual_seed(7)
    built = AutoencoderKL(**SMALL)
    torch.set_rng_state(generator_state)
    return built.eval()


@pytest.fixture
def saved(model, tmp_path):
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    return directory
