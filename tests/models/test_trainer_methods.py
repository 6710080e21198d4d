"""Methods, attributes and arguments of diffusers' AutoencoderKL that trainers use, on fastvae's class."""

import json

import diffusers
import pytest
import torch

from fastvae import AutoencoderKL

CONFIG = {
    "block_out_channels": (8,),
    "norm_num_groups": 2,
    "shift_factor": 0.5,
    "latents_mean": (0.0, 1.0, 2.0, 3.0),
    "latents_std": (1.0, 1.0, 2.0, 2.0),
}


@pytest.fixture(scope="module")
def pair():
    return AutoencoderKL(**CONFIG), diffusers.AutoencoderKL(**CONFIG)


@pytest.fixture(scope="module")
def saved(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    pair[0].save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["latents_mean", "latents_std", "latent_channels", "shift_factor", "scaling_factor"])
def test_numbers_of_scaling_are_attributes(pair, name):
    assert getattr(pair[0], name) == pair[0].config[name]


@pytest.mark.parametrize("name", ["force_upcast", "block_out_channels", "sample_size"])
def test_other_config_values_are_attributes_with_diffusers_warning(pair, name):
    for model in pair:
        with pytest.warns(FutureWarning):
            assert getattr(model, name) == model.config[name]


def test_an_unknown_attribute_is_an_attribute_error(pair):
    with pytest.raises(AttributeError, match="'AutoencoderKL' object has no attribute 'does_not_exist'"):
        pair[0].does_not_exist  # noqa: B018


def test_counts_of_parameters_and_bytes(pair):
    ours, theirs = pair
    ours.quant_conv.requires_grad_(False)
    theirs.quant_conv.requires_grad_(False)
    for trainable in (False, True):
        assert ours.num_parameters(only_trainable=trainable) == theirs.num_parameters(only_trainable=trainable)
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()


def test_attention_settings_of_trainers_change_no_result(pair):
    vae, x = pair[0], torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        before = vae(x).sample
        for call in (
            lambda: vae.set_use_memory_efficient_attention_xformers(True),
            vae.enable_xformers_memory_efficient_attention,
            vae.disable_xformers_memory_efficient_attention,
            lambda: vae.set_attention_backend("native"),
            vae.reset_attention_backend,
        ):
            call()
            assert torch.equal(vae(x).sample, before)


def test_other_attention_is_refused_in_a_sentence_that_names_accelerate(pair):
    with pytest.raises(ValueError, match=r"backend must be 'native', got 'flash': .*fastvae\.accelerate"):
        pair[0].set_attention_backend("flash")
    with pytest.raises(ValueError, match=r"attention_op must be left out.*fastvae\.accelerate"):
        pair[0].enable_xformers_memory_efficient_attention(attention_op=object)


def test_loading_arguments_of_diffusers(saved):
    ours, info = AutoencoderKL.from_pretrained(saved, low_cpu_mem_usage=False, output_loading_info=True)
    theirs, expected = diffusers.AutoencoderKL.from_pretrained(saved, output_loading_info=True)
    assert {name: list(found) for name, found in info.items()} == {name: [*found] for name, found in expected.items()}
    assert ours.num_parameters() == theirs.num_parameters()


def test_a_config_is_saved_as_diffusers_reads_it(pair, tmp_path):
    pair[0].save_config(tmp_path)
    assert json.loads(pair[0].to_json_string()) == json.loads((tmp_path / "config.json").read_text())
    theirs = diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(tmp_path))
    assert theirs.config.shift_factor == 0.5
    with pytest.raises(ValueError, match="this is a file"):
        pair[0].save_config(tmp_path / "config.json")


def test_from_config_takes_changed_values(pair):
    assert AutoencoderKL.from_config(pair[0].config, shift_factor=1.0).config.shift_factor == 1.0
    with pytest.raises(TypeError, match="takes values of the config, got shift"):
        AutoencoderKL.from_config(pair[0].config, shift=1.0)
