"""Outputs of encode and decode as diffusers' BaseOutput: dict, pytree node, copies, accelerate's mixed precision."""

import copy
import pickle
from collections.abc import Mapping

import diffusers.models.autoencoders.vae
import pytest
import torch
from accelerate import Accelerator
from torch.utils import _pytree

from fastvae import AutoencoderKL
from fastvae.models import DecoderOutput

SMALLEST = {"block_out_channels": (8,), "norm_num_groups": 2}


@pytest.fixture
def output():
    return DecoderOutput(sample=torch.arange(3.0))


def test_the_values_of_an_output_are_those_of_diffusers(output):
    theirs = diffusers.models.autoencoders.vae.DecoderOutput(sample=output.sample)
    assert isinstance(output, Mapping)
    for ours in (output, copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(ours) is DecoderOutput
        assert list(ours) == list(theirs) == list(ours.keys()) == ["sample"]
        assert all(map(torch.equal, ours.values(), theirs.values()))
        assert all(map(torch.equal, ours.to_tuple(), theirs.to_tuple()))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours["sample"], theirs.sample)
        assert torch.equal(dict(**ours)["sample"], ours.sample)
    assert repr(output) == "DecoderOutput(sample=tensor([0., 1., 2.]))"


def test_attribute_and_key_of_an_output_change_together(output):
    output.sample = torch.zeros(1)
    assert torch.equal(output["sample"], torch.zeros(1))
    output["sample"] = torch.ones(1)
    assert torch.equal(output.sample, torch.ones(1))
    for remove in (lambda: output.pop("sample"), lambda: output.update(sample=1), output.clear):
        with pytest.raises(TypeError, match="can be replaced and not removed"):
            remove()


def test_an_output_is_a_node_of_the_pytree(output):
    doubled = _pytree.tree_map(lambda values: values * 2, output)
    assert type(doubled) is DecoderOutput
    assert torch.equal(doubled.sample, output.sample * 2)


@pytest.mark.parametrize("kind", [AutoencoderKL, diffusers.AutoencoderKL])
def test_accelerates_mixed_precision_returns_fp32(kind):
    vae = Accelerator(mixed_precision="bf16", cpu=True).prepare(kind(**SMALLEST))
    assert vae(torch.zeros(1, 3, 8, 8)).sample.dtype == torch.float32
    assert vae(torch.zeros(1, 3, 8, 8), return_dict=False)[0].dtype == torch.float32
