"""Checkpoints of several dtypes, and of FLUX.2 with the small decoder."""

import pytest
import torch

from fastvae.checkpoints import names
from fastvae.checkpoints.presets import PRESETS, candidates
from fastvae.models import AutoencoderKLFlux2


@pytest.mark.parametrize(
    ("encoder", "decoder", "expected"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float32),
    ],
)
def test_weights_of_several_dtypes_or_float8_become_one_dtype(model, tmp_path, layouts, encoder, decoder, expected):
    state = {
        name: tensor.to(encoder if name.startswith("encoder.") else decoder)
        for name, tensor in model.state_dict().items()
    }
    model.save_config(tmp_path)
    layouts.write(tmp_path / "diffusion_pytorch_model.safetensors", state)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {expected}
    assert loaded.load_report.dtype == str(expected).removeprefix("torch.")
    assert f"all are {loaded.load_report.dtype} now" in str(loaded.load_report)
    layouts.assert_same_state(loaded.state_dict(), state, expected)
    loaded(torch.zeros(1, 3, 16, 16, dtype=expected))


SMALL = {
    "block_out_channels": (8, 16),
    "decoder_block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def flux2():
    torch.manual_seed(0)
    return AutoencoderKLFlux2(**SMALL).eval()


@pytest.mark.parametrize("widths", [(4, 8), None], ids=["its own decoder", "a config with another decoder"])
def test_the_encoder_loads_whatever_the_decoder_is(flux2, widths, tmp_path, layouts):
    path = layouts.write(tmp_path / "ae.safetensors", layouts.to_ldm(flux2.state_dict()))
    config = {**SMALL, "decoder_block_out_channels": widths}
    loaded = AutoencoderKLFlux2.from_single_file(path, config=config, parts=("encoder",))
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.encode(x).latent_dist.mean, flux2.encode(x).latent_dist.mean)
    assert loaded.decoder is None
    with pytest.raises(ValueError, match="decoder_block_out_channels"):
        AutoencoderKLFlux2.from_single_file(path, config={**SMALL, "decoder_block_out_channels": None})


def test_a_decoder_alone_of_the_small_kind_loads(flux2, tmp_path, layouts):
    path = layouts.write(tmp_path / "ae.safetensors", layouts.to_ldm(flux2.state_dict()))
    loaded = AutoencoderKLFlux2.from_single_file(path, config=SMALL, parts=("decoder",))
    z = torch.rand(1, 4, 4, 4)
    assert torch.equal(loaded.decode(z).sample, flux2.decode(z).sample)


def test_presets_of_flux2_are_distinguished_by_the_decoder():
    shapes = {}
    for name in ("flux2", "flux2-small-decoder"):
        with torch.device("meta"):
            state = AutoencoderKLFlux2(**PRESETS[name].config).state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        assert [preset.name for preset in candidates(shapes)] == [name]
        for half in ("encoder", "decoder"):
            part = {key: shape for key, shape in shapes.items() if names.part_of(key, (half,))}
            assert [preset.name for preset in candidates(part)] == ["flux2" if half == "encoder" else name]
