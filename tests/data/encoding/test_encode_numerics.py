"""Models and dtypes of encode: classes, half precision, rows that are not finite."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.latent_checks import assert_half_equal, expected, latents
from support.small_store import SIDE, small_vae, write_pictures

import fastvae
import fastvae.system.atomic_files
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.encoding.encode import encode
from fastvae.data.images.crop import to_bucket
from fastvae.data.images.read import read_image
from fastvae.data.store.errors import StoreError

SMALL_CONFIG = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")


OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}


@pytest.mark.parametrize("batch", [1, 3])
def test_bf16_states_its_error_over_the_first_batch_that_can_be_read(tmp_path, batch):
    names = write_pictures(tmp_path / "in", 5)
    if batch == 1:
        (tmp_path / "in" / names.pop(0)).write_bytes(b"spoilt")
    for dtype in ("fp32", "bf16"):
        options = {**OPTIONS, "dtype": dtype, "batch": batch, "store_dtype": "fp32", "workers": 1}
        report = encode(tmp_path / "in", tmp_path / dtype, vae=small_vae(), **options)
    exact, rounded = (
        np.stack([latents(tmp_path / dtype)[name][:4] for name in names[:batch]]).astype(np.float64)
        for dtype in ("fp32", "bf16")
    )
    measured = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert measured > 0
    # The report sums in fp32: at most one step of it for each of the values.
    assert abs(measured - report.dtype_error) <= exact.size * np.finfo(np.float32).eps


FAMILIES = {
    "AutoencoderKL": {},
    "AutoencoderKLFlux2": {"latent_channels": 8, "layers_per_block": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_own_model_gives_the_same_store(tmp_path, family):
    """The same weights in either class: equal rows and one identity, so each may continue the other's store."""
    names = write_pictures(tmp_path / "in", 3)
    config = {key: small_vae().config[key] for key in SMALL_CONFIG} | FAMILIES[family]
    torch.manual_seed(0)
    theirs = getattr(diffusers, family)(**config).eval()
    ours = getattr(fastvae, family)(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    encode(tmp_path / "in", tmp_path / "theirs", vae=theirs, **OPTIONS)
    encode(tmp_path / "in", tmp_path / "ours", vae=ours, limit=2, **OPTIONS)
    report = encode(tmp_path / "in", tmp_path / "ours", vae=theirs, **OPTIONS)
    assert (report.ok, report.resumed) == (1, 2)
    ours_rows, their_rows = latents(tmp_path / "ours"), latents(tmp_path / "theirs")
    assert sorted(their_rows) == names
    for name in names:
        assert np.array_equal(ours_rows[name], their_rows[name])
    # Against the model, called by its own methods.
    pixels, _ = to_bucket(read_image(tmp_path / "in" / names[0], at_least=SIDE), SIDE)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        posterior = theirs.encode(x).latent_dist
    assert_half_equal(their_rows[names[0]], torch.cat([posterior.mean[0], posterior.logvar[0]]).numpy())
    if family == "AutoencoderKLFlux2":
        with pytest.raises(StoreError, match=r"pass what is sampled through fastvae\.scale_latents"):
            LatentDataset(tmp_path / "theirs", scaled=True)


def test_weights_in_half_precision_are_the_same_model_as_their_file(tmp_path):
    write_pictures(tmp_path / "in", 2)
    vae = small_vae().bfloat16()
    vae.save_pretrained(tmp_path / "model")
    encode(tmp_path / "in", tmp_path / "out", vae=vae, limit=1, **OPTIONS)
    report = encode(tmp_path / "in", tmp_path / "out", vae=tmp_path / "model", **OPTIONS)
    assert (report.ok, report.resumed) == (1, 1)


class Poisoned(torch.nn.Module):
    """A conv_in whose output is NaN where the first pixel is black: in half precision only, or always."""

    def __init__(self, convolution, always):
        super().__init__()
        self.convolution, self.always = convolution, always
        self.weight = convolution.weight

    def forward(self, x):
        result = self.convolution(x)
        black = (x[:, :, 0, 0].float() < -0.99).all(1)
        if self.always or x.dtype != torch.float32:
            result = torch.where(black[:, None, None, None], torch.full_like(result, float("nan")), result)
        return result


@pytest.mark.parametrize("always", [False, True], ids=["in half precision", "always"])
def test_row_19_rows_that_are_not_finite_are_redone_and_else_quarantined(tmp_path, always):
    names = write_pictures(tmp_path / "in", 4)
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / names[2])
    vae = small_vae()
    vae.encoder.conv_in = Poisoned(vae.encoder.conv_in, always)
    options = {**OPTIONS, "dtype": "bf16"}
    report = encode(tmp_path / "in", tmp_path / "out", vae=vae, batch=4, **options)
    assert report.redone_fp32 == 1
    assert np.isfinite(report.dtype_error)  # of the other three
    stored = latents(tmp_path / "out")
    assert all(np.isfinite(value).all() for value in stored.values())
    if always:
        assert report.reasons == {"non_finite": 1}
        assert sorted(stored) == [names[0], names[1], names[3]]
    else:
        assert report.failed == 0
        with torch.no_grad():
            assert_half_equal(stored[names[2]], expected(vae, tmp_path / "in" / names[2]))


def test_a_mean_beyond_half_precision_is_refused_or_stored_in_single(tmp_path):
    write_pictures(tmp_path / "in", 2)
    vae = small_vae()
    with torch.no_grad():
        vae.quant_conv.bias[:4] = 70_000.0  # fp16 ends at 65504
        vae.quant_conv.bias[4:] = 90.0
    report = encode(tmp_path / "in", tmp_path / "half", vae=vae, **OPTIONS)
    assert report.reasons == {"overflow": 2}
    with pytest.raises(StoreError, match="holds no committed latents"):
        LatentDataset(tmp_path / "half")
    encode(tmp_path / "in", tmp_path / "single", vae=vae, store_dtype="fp32", **OPTIONS)
    item = LatentDataset(tmp_path / "single")[0]
    assert item["mean"].dtype == torch.float32
    assert item["mean"].min() > 65_504
    assert (item["logvar"] == 20).all()  # clamped, as the posterior clamps it


def test_the_callers_model_is_left_alone(tmp_path):
    write_pictures(tmp_path / "in", 1)
    vae = small_vae()
    weight = vae.encoder.conv_in.weight
    before = weight.clone()
    encode(tmp_path / "in", tmp_path / "out", vae=vae, **{**OPTIONS, "dtype": "bf16"})
    assert vae.decoder is not None
    assert vae.encoder.conv_in.weight is weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, before)
