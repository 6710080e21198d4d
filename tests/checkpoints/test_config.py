"""Configs: diffusers' keys and defaults, frozen; bad values are refused by name before anything is allocated."""

import copy
import inspect
import json
import pickle
import time
import tracemalloc

import diffusers
import pytest
import torch

from fastvae.checkpoints import (
    ACTIVATIONS,
    CONFIG_DEFAULTS,
    DOWN_BLOCK_TYPES,
    UP_BLOCK_TYPES,
    FrozenConfig,
    unknown_keys,
    validate_config,
)
from fastvae.checkpoints.config_rules import parameter_count
from fastvae.models import AutoencoderKL


@pytest.mark.parametrize("name", CONFIG_DEFAULTS)
def test_keys_defaults_and_order_are_those_of_diffusers(name):
    signature = inspect.signature(getattr(diffusers, name).__init__)
    theirs = {key: parameter.default for key, parameter in signature.parameters.items() if key != "self"}
    assert list(CONFIG_DEFAULTS[name].items()) == list(theirs.items())


@pytest.mark.parametrize("name", CONFIG_DEFAULTS)
def test_our_constructor_takes_the_same(name):
    import fastvae

    signature = inspect.signature(getattr(fastvae, name).__init__)
    ours = {key: parameter.default for key, parameter in signature.parameters.items() if key != "self"}
    assert list(ours.items()) == list(CONFIG_DEFAULTS[name].items())


def test_a_frozen_config_reads_by_attribute_and_item_and_survives_copies():
    config = FrozenConfig(scaling_factor=0.5, block_out_channels=(1, 2))
    assert config.scaling_factor == config["scaling_factor"] == 0.5
    assert hasattr(config, "scaling_factor")
    assert not hasattr(config, "shift_factor")
    assert "shift_factor" not in config
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is FrozenConfig
        assert other == config
        assert other.block_out_channels == (1, 2)
    assert json.loads(json.dumps(config)) == {"scaling_factor": 0.5, "block_out_channels": [1, 2]}


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.__setitem__("a", 2),
        lambda c: c.__delitem__("a"),
        lambda c: setattr(c, "a", 2),
        lambda c: delattr(c, "a"),
        lambda c: c.update(a=2),
        lambda c: c.setdefault("b", 2),
        lambda c: c.pop("a"),
        lambda c: c.popitem(),
        lambda c: c.clear(),
        lambda c: c.__ior__({"a": 2}),
    ],
)
def test_a_frozen_config_refuses_every_change(change):
    config = FrozenConfig(a=1)
    with pytest.raises(TypeError, match="register_to_config"):
        change(config)
    assert config == {"a": 1}
    assert config.a == 1


def test_an_old_config_gets_defaults_tuples_and_loses_private_and_unknown_keys():
    old = {"_class_name": "FlaxAutoencoderKL", "_diffusers_version": "0.3", "block_out_channels": [64], "foo": 1}
    values = validate_config(old, "AutoencoderKL", "config.json")
    assert values == {**CONFIG_DEFAULTS["AutoencoderKL"], "block_out_channels": (64,)}
    assert unknown_keys(old, "AutoencoderKL") == ("foo",)


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("AutoencoderKL", {"_class_name": "AutoencoderKLFlux2"}, "load it with fastvae.AutoencoderKLFlux2"),
        ("AutoencoderKLFlux2", {"_class_name": "AutoencoderKL"}, "load it with fastvae.AutoencoderKL"),
        ("AutoencoderKL", {"_class_name": "AutoencoderTiny"}, "which fastvae does not have"),
        ("AutoencoderKL", {"_class_name": "UNet2DConditionModel"}, "which fastvae does not have"),
        (
            "AutoencoderKL",
            {"_class_name": "PaellaVQModel", "latent_channels": 4},
            "a PaellaVQModel, which fastvae does",
        ),
        (
            "AutoencoderKL",
            {"_class_name": "CausalVideoAutoencoder"},
            "a CausalVideoAutoencoder, which fastvae does not",
        ),
        ("AutoencoderKLFlux2", {"_class_name": "MyVae"}, "a MyVae, which fastvae does not have"),
        ("AutoencoderKL", {"_class_name": 3}, "must be a string"),
    ],
)
def test_another_class_is_refused(name, config, words):
    with pytest.raises(ValueError, match=words):
        validate_config(config, name, "config.json")


def test_a_users_own_subclass_passes():
    full = CONFIG_DEFAULTS["AutoencoderKL"]
    assert validate_config({**full, "_class_name": "MyVae"}, "AutoencoderKL", "x") == full


TWO = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
BAD = {
    "in_channels_zero": {"in_channels": 0},
    "in_channels_negative": {"in_channels": -3},
    "in_channels_bool": {"in_channels": True},
    "in_channels_float": {"in_channels": 3.0},
    "in_channels_text": {"in_channels": "3"},
    "out_channels_null": {"out_channels": None},
    "latent_channels_huge": {"latent_channels": 10**9},
    "latent_channels_beyond_printing": {"latent_channels": 10**5000},
    "block_out_channels_huge": {"block_out_channels": [10**9]},
    "block_out_channels_zero": {"block_out_channels": [0]},
    "block_out_channels_empty": {"block_out_channels": []},
    "block_out_channels_nested": {"block_out_channels": [[64]]},
    "block_out_channels_number": {"block_out_channels": 64},
    "block_out_channels_endless": {"block_out_channels": [64] * 1_000_000},
    "block_out_channels_indivisible": {"block_out_channels": [48]},
    "down_block_types_longer": {**TWO, "down_block_types": ["DownEncoderBlock2D"] * 3},
    "up_block_types_shorter": {**TWO, "up_block_types": ["UpDecoderBlock2D"]},
    "down_block_types_unknown": {"down_block_types": ["CrossAttnDownBlock2D"]},
    "up_block_types_unknown": {"up_block_types": ["DownEncoderBlock2D"]},
    "up_block_types_text": {"up_block_types": "UpDecoderBlock2D"},
    "layers_per_block_huge": {"layers_per_block": 10**6},
    "layers_per_block_zero": {"layers_per_block": 0},
    "norm_num_groups_zero": {"norm_num_groups": 0},
    "norm_num_groups_negative": {"norm_num_groups": -32},
    "act_fn_unknown": {"act_fn": "snake"},
    "act_fn_list": {"act_fn": ["silu"]},
    "sample_size_zero": {"sample_size": 0},
    "sample_size_triple": {"sample_size": [64, 64, 64]},
    "scaling_factor_zero": {"scaling_factor": 0},
    "scaling_factor_infinite": {"scaling_factor": float("inf")},
    "scaling_factor_nan": {"scaling_factor": float("nan")},
    "scaling_factor_null": {"scaling_factor": None},
    "scaling_factor_text": {"scaling_factor": "0.18"},
    "shift_factor_nan": {"shift_factor": float("nan")},
    "latents_mean_short": {"latents_mean": [0.0, 0.0], "latents_std": [1.0] * 4},
    "latents_std_zero": {"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]},
    "latents_std_nan": {"latents_mean": [0.0] * 4, "latents_std": [1.0, float("nan"), 1.0, 1.0]},
    "latents_mean_alone": {"latents_mean": [0.0] * 4},
    "force_upcast_number": {"force_upcast": 1},
    "use_quant_conv_text": {"use_quant_conv": "yes"},
    "mid_block_add_attention_null": {"mid_block_add_attention": None},
}
BAD_FLUX2 = {
    "decoder_block_out_channels_length": {"decoder_block_out_channels": [64, 64]},
    "decoder_block_out_channels_fewer": {
        "decoder_block_out_channels": [64, 64],
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "decoder_block_out_channels_indivisible": {"decoder_block_out_channels": [64, 64, 64, 48]},
    "batch_norm_eps_zero": {"batch_norm_eps": 0.0},
    "batch_norm_momentum_above_one": {"batch_norm_momentum": 1.5},
    "patch_size_single": {"patch_size": [2]},
    "patch_size_oblong": {"patch_size": [2, 4]},
    "patch_size_huge": {"patch_size": [2, 10**6]},
}
CASES = [("AutoencoderKL", case, BAD[case]) for case in BAD]
CASES += [("AutoencoderKLFlux2", case, BAD_FLUX2[case]) for case in BAD_FLUX2]


@pytest.mark.parametrize(("name", "case", "config"), CASES, ids=[case for _, case, _ in CASES])
def test_an_absurd_value_is_refused_by_name_at_once(name, case, config):
    keys = [key for key in CONFIG_DEFAULTS[name] if case.startswith(key)]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        with pytest.raises(ValueError, match=max(keys, key=len)) as refusal:
            validate_config(config, name, "some/config.json")
        seconds.append(time.process_time() - start)
    message = str(refusal.value)
    assert message.startswith("some/config.json: ")
    assert len(message) < 400
    assert "\n" not in message
    assert min(seconds) < 0.1


def test_too_many_parameters_are_refused_without_an_allocation():
    wide = {**TWO, "block_out_channels": [65536, 65536], "layers_per_block": 64}
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"describes about [\d,]+ parameters .* at most 4,000,000,000 are taken"):
        AutoencoderKL.from_config(wide)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("AutoencoderKL", {}),
        ("AutoencoderKL", {**TWO, "layers_per_block": 3, "in_channels": 4, "use_post_quant_conv": False}),
        ("AutoencoderKL", {**TWO, "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}),
        ("AutoencoderKL", {**TWO, "up_block_types": ["AttnUpDecoderBlock2D"] * 2, "mid_block_add_attention": False}),
        ("AutoencoderKLFlux2", {"decoder_block_out_channels": [96, 192, 384, 384]}),
    ],
)
def test_parameters_are_counted_exactly(name, config):
    with torch.device("meta"):
        theirs = getattr(diffusers, name)(**config)
    # The batch norm's running statistics are buffers.
    tensors = [*theirs.parameters(), *(buffer for buffer in theirs.buffers() if buffer.is_floating_point())]
    assert parameter_count(validate_config(config, name, "x")) == sum(tensor.numel() for tensor in tensors)


def test_activations_and_blocks_are_those_of_diffusers():
    from diffusers.models import activations
    from diffusers.models.unets import unet_2d_blocks

    assert {key: kind.__name__ for key, kind in activations.ACT2CLS.items()} == ACTIVATIONS
    for act_fn in (*ACTIVATIONS, "SiLU"):  # diffusers takes any case
        assert validate_config({"act_fn": act_fn}, "AutoencoderKL", "x")["act_fn"] == act_fn
    for block in (*DOWN_BLOCK_TYPES, *UP_BLOCK_TYPES):
        assert hasattr(unet_2d_blocks, block)


@pytest.mark.parametrize("sample_size", [64, [64, 96], (64, 96)])
def test_sample_size_may_be_a_pair(sample_size):
    values = validate_config({"sample_size": sample_size}, "AutoencoderKL", "x")
    assert values["sample_size"] == (64 if sample_size == 64 else (64, 96))


def test_from_config_takes_a_models_own_config(model):
    again = AutoencoderKL.from_config(model.config)
    assert again.config == model.config
