"""Tensor names: every layout is renamed to diffusers' names, for any number of blocks, whole or in halves."""

import diffusers
import pytest
import torch

from fastvae.checkpoints import rename_table
from fastvae.checkpoints.names import find_prefix, part_of

SHAPES = {
    "one_block": {"block_out_channels": (32,), "layers_per_block": 1},
    "two_blocks": {"block_out_channels": (32, 64), "layers_per_block": 3},
    "twelve_blocks": {"block_out_channels": (32,) * 11 + (64,), "layers_per_block": 2},
    "attention_in_the_blocks": {"block_out_channels": (32, 64, 64), "layers_per_block": 2, "attention": True},
}


def _names(block_out_channels, layers_per_block, attention=False):
    kind = "Attn" if attention else ""
    blocks = len(block_out_channels)
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            down_block_types=(f"{kind}DownEncoderBlock2D",) * blocks,
            up_block_types=(f"{kind}UpDecoderBlock2D",) * blocks,
            norm_num_groups=8,
        )
    return model.state_dict()


@pytest.mark.parametrize("part", ["both", "encoder", "decoder"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("case", SHAPES)
def test_every_ldm_name_is_renamed(case, prefix, part, layouts):
    config = SHAPES[case]
    state = _names(**config)
    state = {name: tensor for name, tensor in state.items() if part == "both" or part_of(name, (part,))}
    old = layouts.to_ldm(state, up_blocks=len(config["block_out_channels"]), prefix=prefix)
    assert list(rename_table(old).values()) == list(state)


def test_the_up_blocks_are_reversed():
    table = rename_table([f"decoder.up.{level}.block.0.conv1.weight" for level in range(4)])
    assert table["decoder.up.3.block.0.conv1.weight"] == "decoder.up_blocks.0.resnets.0.conv1.weight"
    assert table["decoder.up.0.block.0.conv1.weight"] == "decoder.up_blocks.3.resnets.0.conv1.weight"


def test_deprecated_attention_names_are_renamed(model, layouts):
    old = layouts.to_deprecated(model.state_dict())
    table = rename_table(old)
    assert list(table.values()) == list(model.state_dict())
    assert table["encoder.mid_block.attentions.0.proj_attn.bias"] == "encoder.mid_block.attentions.0.to_out.0.bias"


def test_diffusers_own_names_stay(model):
    assert all(old == new for old, new in rename_table(model.state_dict()).items())


def test_flux2s_own_file_keeps_its_convolutions_inside_the_halves():
    names = ["encoder.conv_in.weight", "encoder.quant_conv.weight", "decoder.post_quant_conv.bias", "bn.running_mean"]
    renamed = ["encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.bias", "bn.running_mean"]
    assert list(rename_table(names).values()) == renamed


def test_other_parts_of_a_whole_checkpoint_are_left_out():
    names = [
        "first_stage_model.encoder.conv_in.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.loss.x",
    ]
    assert rename_table(names) == {names[0]: "encoder.conv_in.weight"}
    assert find_prefix(["model.diffusion_model.out.2.weight"]) is None


def test_two_names_for_one_tensor_are_refused():
    names = ["encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.query.weight"]
    with pytest.raises(ValueError, match=r"two tensors are the same one, encoder\.mid_block\.attentions\.0\.to_q"):
        rename_table(names)
