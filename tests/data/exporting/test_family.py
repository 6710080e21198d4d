"""The family of kohya's caches follows from a store's channels and scaling; a contradiction is refused."""

import json

import pytest
from click.testing import CliRunner
from support.small_store import write_store

from fastvae.checkpoints.presets import PRESETS
from fastvae.cli.main import cli
from fastvae.data.exporting.export import export
from fastvae.data.exporting.kohya import FAMILIES, family_of

SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
PLAYGROUND = {"scaling_factor": 0.5, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}


@pytest.mark.parametrize(
    ("channels", "scaling", "family"),
    [
        (4, {"scaling_factor": 0.18215}, "sd"),
        (4, {"scaling_factor": 0.13025}, "sdxl"),
        (16, SD3, "sd3"),
        (16, FLUX, "flux"),
    ],
)
def test_the_family_follows_from_channels_and_scaling(channels, scaling, family):
    for given in (None, family):
        assert family_of(channels, scaling, given) == (family, None)


@pytest.mark.parametrize(
    ("channels", "scaling", "given", "words"),
    [
        (
            4,
            {"scaling_factor": 0.18215},
            "sdxl",
            "family must be 'sd' for latents of 4 channels, scaling_factor 0.18",
        ),
        (16, FLUX, "sdxl", "family must be 'flux' for latents of 16 channels"),
        (16, FLUX, "sd3", "family must be 'flux' for latents of 16 channels"),
        (16, {"scaling_factor": 0.7}, None, "family must be given for latents of 16 channels.*: 'sd3' or 'flux'"),
        (16, {"scaling_factor": 0.7}, "sd", "family must be 'sd3' or 'flux' for latents of 16 channels"),
        (4, {"scaling_factor": 0.7}, "flux", "family must be 'sd' or 'sdxl' for latents of 4 channels"),
        (4, PLAYGROUND, None, "to must be another than npz-kohya: no family .* latents_mean \\(those of Playground"),
        (4, PLAYGROUND, "sdxl", "to must be another than npz-kohya"),
        (16, {"scaling_factor": 1.0}, "flux", "to must be another than npz-kohya.*CogView4"),
        (32, {"batch_norm": True}, None, "to must be another than npz-kohya"),
        (8, {"scaling_factor": 0.18215}, "sd", "to must be another than npz-kohya"),
    ],
)
def test_a_family_of_other_latents_is_refused(channels, scaling, given, words):
    with pytest.raises(ValueError, match=words):
        family_of(channels, scaling, given)


def test_the_numbers_of_the_families_are_those_of_the_presets():
    for name, preset in {"sd": "sd15", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux"}.items():
        family, config = FAMILIES[name], PRESETS[preset].config
        assert (family.channels, family.scaling_factor) == (config["latent_channels"], config["scaling_factor"])
        assert family.shift_factor == (config["shift_factor"] or 0.0)


def test_the_command_follows_the_store(tmp_path):
    store = write_store(tmp_path / "store", {(32, 32): ["a.png"]}, channels=16, **SD3)
    command = ["export", str(store), str(tmp_path / "out"), "--to", "npz-kohya", "--json"]
    refused = CliRunner().invoke(cli, [*command, "--family", "sdxl"])
    assert (refused.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "family must be 'sd3' for latents of 16 channels, scaling_factor 1.5305, shift_factor 0.06" in refused.stderr
    done = CliRunner().invoke(cli, command)
    assert json.loads(done.stdout)["about"]["family"] == "sd3"
    assert [path.name for path in (tmp_path / "out").glob("*.npz")] == ["a_0032x0032_sd3.npz"]


def test_latents_of_an_unknown_model_are_exported_with_a_note(tmp_path, capsys):
    store = write_store(tmp_path / "store", {(32, 32): ["a.png"]}, scaling_factor=0.7)
    about = export(store, tmp_path / "out", to="npz-kohya").about
    assert about["family"] == "sdxl"
    assert about["note"] == (
        "latents of 4 channels, scaling_factor 0.7, exported as sdxl's, which have scaling_factor 0.13025"
    )
    assert about["note"] in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "export.json").read_text())["note"] == about["note"]
