"""Single files: LDM names and prefixes, presets where shapes do not decide the scaling, Playground's statistics."""

import diffusers
import pytest
import torch

from fastvae.checkpoints import PRESETS
from fastvae.checkpoints.presets import candidates
from fastvae.models import AutoencoderKL, AutoencoderKLFlux2


@pytest.mark.parametrize("dimensions", [0, 1, 2], ids=["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_ldm_names_load(model, prefix, dimensions, tmp_path, layouts):
    state = layouts.to_ldm(model.state_dict(), prefix=prefix, dimensions=dimensions)
    if prefix:
        state["model.diffusion_model.out.2.weight"] = torch.zeros(4, 8, 3, 3)
        state[f"{prefix}loss.logvar"] = torch.zeros(())
    path = layouts.write(tmp_path / "vae.safetensors", state)
    loaded = AutoencoderKL.from_single_file(path, config=model.config, torch_dtype=torch.float16)
    layouts.assert_same_state(loaded.state_dict(), model.state_dict(), torch.float16)
    assert loaded.config.scaling_factor == model.config.scaling_factor
    report = loaded.load_report
    assert len(report.dropped) == (2 if prefix else 0)
    assert len(report.reshaped) == (8 if dimensions else 0)
    assert report.renamed[f"{prefix}encoder.norm_out.weight"] == "encoder.conv_norm_out.weight"


def test_diffusers_reads_the_same_weights_from_the_same_file(model, saved, tmp_path, layouts):
    state = layouts.to_ldm(model.state_dict(), prefix="first_stage_model.")
    path = layouts.write(tmp_path / "vae.safetensors", state)
    theirs = diffusers.AutoencoderKL.from_single_file(str(path), config=str(saved))
    ours = AutoencoderKL.from_single_file(path, config=saved)
    layouts.assert_same_state(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_file_of_one_half_loads_as_that_half(model, half, tmp_path, layouts):
    roots = (f"{half}.", "quant_conv." if half == "encoder" else "post_quant_conv.")
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(roots)}
    path = layouts.write(tmp_path / "half.safetensors", layouts.to_ldm(state))
    loaded = AutoencoderKL.from_single_file(path, config=model.config, parts=(half,))
    layouts.assert_same_state(loaded.state_dict(), state)
    with pytest.raises(ValueError, match="tensors are missing"):
        AutoencoderKL.from_single_file(path, config=model.config)


def _shapes_of(preset):
    values = PRESETS[preset]
    with torch.device("meta"):
        state = getattr(diffusers, values.class_name)(**values.config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("preset", "fitting"),
    [
        ("sd15", {"sd15", "sd21", "sdxl", "playground-v2.5", "kolors"}),
        ("flux", {"sd3", "flux"}),
        ("cogview4", {"cogview4"}),
        ("x4-upscaler", {"x4-upscaler"}),
        ("ldm3d", {"ldm3d"}),
        ("flux2", {"flux2"}),
    ],
)
def test_shapes_select_the_presets_that_fit(preset, fitting):
    names = {found.name for found in candidates(_shapes_of(preset))}
    assert fitting <= names
    if len(fitting) < 4:
        assert names == fitting
    one_half = {name: shape for name, shape in _shapes_of(preset).items() if name.startswith(("decoder", "post", "bn"))}
    assert preset in {found.name for found in candidates(one_half)}


@pytest.fixture
def tiny_presets(monkeypatch, layouts, model):
    """Patch the presets: two of the same shapes, one of other shapes, one with statistics, all of small models."""
    from fastvae.checkpoints import presets

    def small(name, **changes):
        config = {**model.config, "scaling_factor": 0.5, "shift_factor": None, **changes}
        return presets.Preset(name, "AutoencoderKL", name, config, "made for this test")

    statistics = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    made = [
        small("one", scaling_factor=0.25),
        small("two"),
        small("playground-v2.5", **statistics),
        small("wide", latent_channels=8),
    ]
    monkeypatch.setattr(presets, "_ALL", tuple(made))
    monkeypatch.setattr(presets, "PRESETS", {preset.name: preset for preset in made})
    return made


def test_a_preset_is_required_if_shapes_fit_several(model, tiny_presets, tmp_path, layouts):
    path = layouts.write(tmp_path / "vae.safetensors", layouts.to_ldm(model.state_dict()))
    words = r"pass preset= \(--preset\) one of 'one' \(scaling_factor 0.25\), 'two' \(scaling_factor 0.5\)"
    with pytest.raises(ValueError, match=words):
        AutoencoderKL.from_single_file(path)
    loaded = AutoencoderKL.from_single_file(path, preset="one")
    assert loaded.config.scaling_factor == 0.25
    assert "preset 'one'" in str(loaded.load_report)


def test_the_only_preset_that_fits_is_used_and_reported(tiny_presets, tmp_path, layouts):
    wide = AutoencoderKL(**{**layouts.small, "latent_channels": 8})
    path = layouts.write(tmp_path / "vae.safetensors", layouts.to_ldm(wide.state_dict()))
    loaded = AutoencoderKL.from_single_file(path)
    assert loaded.config.latent_channels == 8
    assert "preset 'wide' (made for this test), chosen by what the file holds" in loaded.load_report.notes


def test_an_unverified_preset_is_never_chosen_silently(tiny_presets, tmp_path, layouts, monkeypatch):
    import dataclasses

    from fastvae.checkpoints import presets

    unsure = dataclasses.replace(tiny_presets[-1], verified=False)
    monkeypatch.setattr(presets, "_ALL", (unsure,))
    wide = AutoencoderKL(**{**layouts.small, "latent_channels": 8})
    path = layouts.write(tmp_path / "vae.safetensors", wide.state_dict())
    with pytest.raises(ValueError, match=r"pass preset= \(--preset\) one of 'wide'"):
        AutoencoderKL.from_single_file(path)


def test_edm_statistics_decide_for_playground(model, tiny_presets, tmp_path, layouts):
    mean, std = torch.tensor([-1.5, 2.0, -1.25, 2.5]), torch.tensor([8.5, 6.0, 6.5, 5.0])
    state = layouts.to_ldm(model.state_dict(), prefix="first_stage_model.")
    state |= {"edm_mean": mean.view(1, 4, 1, 1), "edm_std": std.view(1, 4, 1, 1)}
    path = layouts.write(tmp_path / "playground.safetensors", state)
    for options in ({}, {"config": {**model.config, "scaling_factor": 3.0}}):
        config = AutoencoderKL.from_single_file(path, **options).config
        assert config.latents_mean == tuple(mean.tolist())
        assert config.latents_std == tuple(std.tolist())
        assert config.scaling_factor == 0.5
    with pytest.raises(ValueError, match=r"carries edm_mean and edm_std.*pass preset=\"playground-v2.5\""):
        AutoencoderKL.from_single_file(path, preset="one")
    state["edm_std"] = std[:2]
    with pytest.raises(ValueError, match="latents_std must be null, or 4 finite numbers"):
        AutoencoderKL.from_single_file(layouts.write(path, state), preset="playground-v2.5")


def test_a_preset_or_config_that_does_not_fit_is_refused(model, tiny_presets, tmp_path, layouts):
    path = layouts.write(tmp_path / "vae.safetensors", model.state_dict())
    words = "the file holds latent_channels=4, the config says latent_channels=8; presets that fit: one, two"
    with pytest.raises(ValueError, match=words):
        AutoencoderKL.from_single_file(path, preset="wide")
    with pytest.raises(ValueError, match="the file holds layers_per_block=2, the config says layers_per_block=3"):
        AutoencoderKL.from_single_file(path, config={**model.config, "layers_per_block": 3})


def test_arguments_that_contradict_or_are_unknown(model, tmp_path, layouts):
    path = layouts.write(tmp_path / "vae.safetensors", model.state_dict())
    with pytest.raises(ValueError, match="preset and config were both given"):
        AutoencoderKL.from_single_file(path, preset="sdxl", config={})
    with pytest.raises(ValueError, match=r"there is no 'sdlx' \(did you mean 'sdxl'\?\)"):
        AutoencoderKL.from_single_file(path, preset="sdlx")
    with pytest.raises(ValueError, match="'flux2' is a AutoencoderKLFlux2"):
        AutoencoderKL.from_single_file(path, preset="flux2")
    with pytest.raises(ValueError, match=r"fits no preset \(latent_channels=4.*pass config="):
        AutoencoderKL.from_single_file(path)


def test_flux2s_original_layout_loads_without_its_step_counter(tmp_path, layouts):
    config = {**layouts.small, "latent_channels": 4}
    for key in ("scaling_factor", "shift_factor"):
        config.pop(key)
    built = AutoencoderKLFlux2(**config)
    built.bn.running_var.uniform_(0.5, 2.0)
    state = layouts.to_ldm(built.state_dict())
    moved = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    state = {
        ".".join([moved.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): t
        for name, t in state.items()
    }
    del state["bn.num_batches_tracked"]
    path = layouts.write(tmp_path / "ae.safetensors", state)
    loaded = AutoencoderKLFlux2.from_single_file(path, config=config)
    layouts.assert_same_state(loaded.state_dict(), built.state_dict())
    with pytest.raises(ValueError, match=r"unknown to the model: bn\.running_mean"):
        AutoencoderKL.from_single_file(path, config=layouts.small)


def test_a_file_without_a_vae_is_refused(tmp_path, layouts):
    path = layouts.write(tmp_path / "unet.safetensors", {"model.diffusion_model.out.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"unet\.safetensors: holds no VAE: model\.diffusion_model\.out\.weight"):
        AutoencoderKL.from_single_file(path, preset="sdxl")


def test_a_directory_or_a_missing_file_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="this is a directory; from_pretrained takes directories"):
        AutoencoderKL.from_single_file(saved, preset="sdxl")
    with pytest.raises(FileNotFoundError, match="no such file, and not the address of a file on the Hub"):
        AutoencoderKL.from_single_file(tmp_path / "none.safetensors", preset="sdxl")
    with pytest.raises(ValueError, match="this is a file; a model directory is taken here"):
        AutoencoderKL.from_pretrained(saved / "diffusion_pytorch_model.safetensors")
