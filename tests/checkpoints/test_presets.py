"""Presets: diffusers builds the same tensors from each, and random weights depend on a seed alone."""

import diffusers
import pytest
import torch

import fastvae
from fastvae.checkpoints import CONFIG_DEFAULTS, PRESETS, validate_config
from fastvae.models import AutoencoderKL

KNOWN = ["sd15", "sdxl", "sdxl-fp16-fix", "sd3", "flux", "flux2", "playground-v2.5", "cogview4"]
# Total number of parameters, counted in the published models.
PARAMETERS = {"sd15": 83_653_863, "sdxl": 83_653_863, "flux": 83_819_683, "sd3": 83_819_683}


@pytest.mark.parametrize("name", PRESETS)
def test_state_dict_keys_and_shapes_are_those_of_diffusers(name):
    preset = PRESETS[name]
    config = validate_config(preset.config, preset.class_name, name)
    assert config == dict(preset.config)
    with torch.device("meta"):
        ours = getattr(fastvae, preset.class_name)(**config).state_dict()
        theirs = getattr(diffusers, preset.class_name)(**config).state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(key, v.shape) for key, v in theirs.items()]
    if name in PARAMETERS:
        assert sum(value.numel() for value in ours.values()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_source(name):
    preset = PRESETS[name]
    assert preset.name == name
    assert preset.config.keys() == CONFIG_DEFAULTS[preset.class_name].keys()
    assert ("from memory" in preset.source) == (not preset.verified)


def test_known_models_have_presets():
    assert set(KNOWN) <= set(PRESETS)
    assert PRESETS["sdxl"].config["scaling_factor"] == 0.13025
    assert (PRESETS["flux"].config["scaling_factor"], PRESETS["flux"].config["shift_factor"]) == (0.3611, 0.1159)
    assert (PRESETS["sd3"].config["scaling_factor"], PRESETS["sd3"].config["shift_factor"]) == (1.5305, 0.0609)
    assert not any("GLM" in preset.models for preset in PRESETS.values())


@pytest.fixture
def small_preset(monkeypatch, layouts):
    from fastvae.checkpoints import presets

    config = {**CONFIG_DEFAULTS["AutoencoderKL"], **layouts.small}
    made = presets.Preset("small", "AutoencoderKL", "a test", config, "this test")
    monkeypatch.setitem(presets.PRESETS, "small", made)


def test_a_seed_decides_the_weights_and_does_not_change_the_generator(small_preset, layouts):
    before = torch.get_rng_state()
    first = AutoencoderKL.from_preset("small", seed=3)
    torch.randn(5)
    second = AutoencoderKL.from_preset("small", seed=3)
    other = AutoencoderKL.from_preset("small", seed=4)
    layouts.assert_same_state(first.state_dict(), second.state_dict())
    assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)
    torch.set_rng_state(before)
    AutoencoderKL.from_preset("small", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.training


def test_a_seed_does_not_change_the_generators_of_gpus(small_preset, monkeypatch):
    """torch.manual_seed reseeds them, which a machine without a GPU does not show: it must not be called."""
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("every generator was reseeded"))
    AutoencoderKL.from_preset("small", seed=3)


def test_without_a_seed_the_global_generator_decides(small_preset):
    torch.manual_seed(1)
    first, second = (AutoencoderKL.from_preset("small") for _ in range(2))
    torch.manual_seed(1)
    again = AutoencoderKL.from_preset("small")
    assert torch.equal(first.encoder.conv_in.weight, again.encoder.conv_in.weight)
    assert not torch.equal(first.encoder.conv_in.weight, second.encoder.conv_in.weight)


def test_half_a_preset_has_the_weights_of_the_whole(small_preset):
    whole = AutoencoderKL.from_preset("small", seed=3, torch_dtype=torch.bfloat16)
    half = AutoencoderKL.from_preset("small", seed=3, dtype=torch.bfloat16, parts=("encoder",))
    assert half.decoder is None
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.encoder.conv_out.weight, whole.encoder.conv_out.weight)


def test_an_unknown_preset_or_another_class_is_refused():
    with pytest.raises(ValueError, match=r"preset: there is no 'glm-image'.*there are sd15, "):
        AutoencoderKL.from_preset("glm-image")
    with pytest.raises(ValueError, match=r"'flux2' is a AutoencoderKLFlux2.*use fastvae\.AutoencoderKLFlux2"):
        AutoencoderKL.from_preset("flux2")
