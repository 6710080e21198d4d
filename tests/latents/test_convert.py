"""Images to latents and back: the scaling of every family, every form of image, and refusals."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.accuracy import assert_as_accurate

import fastvae

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
STATISTICS = {"latents_mean": (-1.6, 1.8, -1.3, 2.5), "latents_std": (8.4, 5.9, 6.5, 5.2)}
FAMILIES = {
    "scaled": {"scaling_factor": 0.13025},
    "shifted": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "normalised": {"scaling_factor": 0.5, **STATISTICS},
}


def model(cls=fastvae.AutoencoderKL, **config):
    return cls(**{**SMALL, **config}).eval()


def random_images(batch=2, height=12, width=20):
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", [fastvae.AutoencoderKL, diffusers.AutoencoderKL], ids=["ours", "diffusers"])
def test_latents_are_scaled_as_in_the_pipelines(cls, family):
    """Compare with the formulas of diffusers' pipelines, for fastvae's class and for diffusers'."""
    vae = model(cls, **FAMILIES[family])
    c = vae.config
    z = torch.randn(2, 4, 3, 5)
    if family == "normalised":
        mean, std = (torch.tensor(c[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
        expected, back = (z - mean) * c.scaling_factor / std, z * std / c.scaling_factor + mean
    else:
        shift = c.shift_factor or 0.0
        expected, back = (z - shift) * c.scaling_factor, z / c.scaling_factor + shift
    assert torch.equal(fastvae.scale_latents(vae, z), expected)
    assert torch.equal(fastvae.unscale_latents(vae, z), back)


@torch.no_grad()
def test_flux2_latents_are_scaled_as_in_its_pipeline():
    """Compare with the steps of diffusers' Flux2Pipeline, written out, since importing it needs transformers."""
    vae = model(fastvae.AutoencoderKLFlux2, latent_channels=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    z = torch.randn(2, 4, 6, 10)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    patches = z.view(2, 4, 3, 2, 5, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 16, 3, 5)
    scaled = fastvae.scale_latents(vae, z)
    assert torch.equal(scaled, (patches - mean) / std)
    back = (scaled * std + mean).view(2, 4, 2, 2, 3, 5).permute(0, 1, 4, 2, 5, 3).reshape(2, 4, 6, 10)
    assert torch.equal(fastvae.unscale_latents(vae, scaled), back)
    latents = vae.encode_latents(random_images(2, 12, 20), seeds=[1, 2])
    assert latents.shape == (2, 16, 3, 5)
    assert vae.decode_latents(latents).shape == (2, 3, 12, 20)
    with pytest.raises(ValueError, match="multiples of 4, got 14 x 20"):
        vae.encode_latents(random_images(2, 14, 20))


@torch.no_grad()
def test_encode_latents_is_encode_sample_scale():
    vae = model(**FAMILIES["shifted"])
    images = random_images()
    x = images.float() / 127.5 - 1
    posterior = vae.encode(x).latent_dist
    assert torch.equal(vae.encode_latents(images, posterior="mode"), vae.scale_latents(posterior.mode()))
    assert torch.equal(vae.encode_latents(images, seeds=[5, 6]), vae.scale_latents(posterior.sample(seeds=[5, 6])))
    drawn = vae.encode_latents(images, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn, vae.scale_latents(posterior.sample(torch.Generator().manual_seed(4))))


@torch.no_grad()
def test_every_form_of_an_image_gives_the_same_latents():
    vae = model()
    images = random_images()
    expected = vae.encode_latents(images, posterior="mode")
    # The float64 model takes the same rounded pixels.
    rounded = (images.float() / 127.5 - 1).double()
    truth = copy.deepcopy(vae).double().encode_latents(rounded, posterior="mode")
    array = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(picture) for picture in array]
    readonly = array.copy()
    readonly.flags.writeable = False
    forms = {
        "NHWC": torch.from_numpy(array),
        "array": array,
        "read-only array": readonly,
        "channels_last": images.contiguous(memory_format=torch.channels_last),
        "mirrored view": np.ascontiguousarray(array[..., ::-1])[..., ::-1],
        "big-endian": (array.astype(np.float32) / 127.5 - 1).astype(">f4"),
        "float": images.float() / 127.5 - 1,
        "float NHWC": torch.from_numpy(array).float() / 127.5 - 1,
        "float array": array.astype(np.float32) / 127.5 - 1,
        "PIL": pictures,
    }
    for form in forms.values():
        got = vae.encode_latents(form, posterior="mode")
        # By tolerance: the layout of the input selects one of torch's convolutions.
        assert_as_accurate(got, expected, truth)
    assert_as_accurate(vae.encode_latents(pictures[0], posterior="mode"), expected[:1], truth[:1])


@torch.no_grad()
def test_decode_latents_returns_pixels():
    vae = model(**FAMILIES["normalised"])
    z = vae.encode_latents(random_images(), posterior="mode")
    floats = vae.decode_latents(z, output="float")
    assert torch.equal(floats, vae.decode(vae.unscale_latents(z)).sample)
    expected = diffusers.image_processor.VaeImageProcessor().postprocess(floats, output_type="pil")
    for ours, theirs in zip(vae.decode_latents(z, output="pil"), expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    pixels = vae.decode_latents(z)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), np.asarray(expected[0]))


@torch.no_grad()
def test_one_channel_images():
    vae = model(in_channels=1, out_channels=1)
    z = vae.encode_latents([Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12))], posterior="mode")
    assert vae.decode_latents(z, output="pil")[0].mode == "L"


@torch.no_grad()
def test_sides_that_do_not_fit():
    vae = model()
    images = random_images(2, 13, 21)
    with pytest.raises(ValueError, match="multiples of 2, got 13 x 21: say pad='crop' or pad='reflect'"):
        vae.encode_latents(images)
    cropped = vae.encode_latents(images, posterior="mode", pad="crop")
    assert torch.equal(cropped, vae.encode_latents(images[:, :, :12, :20], posterior="mode"))
    reflected = vae.encode_latents(images, posterior="mode", pad="reflect")
    by_hand = np.pad(images.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)), mode="reflect")
    assert torch.equal(reflected, vae.encode_latents(torch.from_numpy(by_hand), posterior="mode"))
    assert vae.decode_latents(reflected, size=(13, 21)).shape == (2, 3, 13, 21)
    with pytest.raises(ValueError, match="within the decoded 14 x 22"):
        vae.decode_latents(reflected, size=(15, 21))
    with pytest.raises(ValueError, match="too small to be reflected"):
        vae.encode_latents(random_images(1, 1, 4), pad="reflect")
    with pytest.raises(ValueError, match="cannot be cropped"):
        vae.encode_latents(random_images(1, 1, 4), pad="crop")


@torch.no_grad()
@pytest.mark.parametrize("pad", ["error", "crop", "reflect"])
def test_no_images_give_no_latents(pad):
    vae = model().bfloat16()
    z = vae.encode_latents(torch.empty(0, 3, 16, 8, dtype=torch.uint8), pad=pad)
    assert z.shape == (0, 4, 8, 4)
    assert z.dtype == torch.bfloat16
    assert vae.decode_latents(z).shape == (0, 3, 16, 8)


def broken(index, value):
    images = torch.zeros(3, 3, 8, 8)
    images[index] = value
    return images


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (torch.zeros(3, 8, 8), {}, "images must have 4 dimensions"),
        (torch.zeros(1, 4, 8, 8), {}, "images must have 3 channels, got shape"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), {}, "uint8 or floating point, got torch.int32"),
        (torch.full((1, 3, 8, 8), 255.0), {}, "must lie in \\[-1, 1\\], got values up to 255"),
        (broken(1, float("nan")), {}, "images must be finite, got NaN or infinity in rows \\[1\\] of 3"),
        (broken(2, float("inf")), {}, "in rows \\[2\\] of 3"),
        (torch.zeros(1, 3, 8, 3), {}, "can be read both ways: say layout"),
        (torch.zeros(1, 3, 0, 8), {}, "at least one pixel"),
        ([], {}, "got an empty list"),
        (["a.png"], {}, "tensor, an array or PIL images, got a builtins.str in a list"),
        (np.zeros((1, 8, 8, 3), dtype=object), {}, "got an array of object"),
        (np.zeros((1, 8, 8, 3), dtype=np.longdouble), {}, "got an array of"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], {}, "must have one size"),
        ([Image.new("RGBA", (8, 8))], {}, "got \\['RGBA'\\]: convert them first"),
        ([Image.new("I;16", (8, 8))], {}, "got \\['I;16'\\]"),
        (torch.zeros(0, 3, 8, 8), {"seeds": [1]}, "for each of the 0 rows, got 1"),
        (torch.zeros(1, 3, 8, 8), {"seeds": 7}, "seeds must be a list of integers or a vector, got 7"),
        (torch.zeros(1, 3, 8, 8), {"seeds": torch.tensor(7)}, "seeds must be a vector of integers"),
        (torch.zeros(1, 3, 8, 8), {"seeds": torch.tensor([True])}, "got torch.bool"),
        (torch.zeros(1, 3, 8, 8), {"generator": "x"}, "generator must be a torch.Generator or a list of them, got str"),
        (torch.zeros(1, 3, 8, 8), {"posterior": "mode", "seeds": [1]}, "the mode has no noise"),
        (torch.zeros(0, 3, 8, 8), {"posterior": "zzz"}, "posterior must be 'sample' or 'mode', got 'zzz'"),
        (torch.zeros(1, 3, 8, 8), {"posterior": "mean"}, "posterior must be 'sample' or 'mode', got 'mean'"),
        (torch.zeros(1, 3, 8, 8), {"pad": "zero"}, "pad must be"),
        (torch.zeros(1, 3, 8, 8), {"layout": "CHW"}, "layout must be"),
        (torch.zeros(1, 3, 8, 8), {"seeds": [1, 2]}, "for each of the 1 rows, got 2"),
    ],
)
def test_bad_images_are_named(images, options, words):
    with pytest.raises(ValueError, match=words):
        model().encode_latents(images, **options)


@pytest.mark.parametrize(
    ("z", "options", "words"),
    [
        (torch.zeros(1, 3, 4, 4), {}, r"z must be a tensor \[B, 4, h, w\], got shape \(1, 3, 4, 4\)"),
        (np.zeros((1, 4, 4, 4)), {}, r"z must be a tensor \[B, 4, h, w\], got a numpy.ndarray"),
        (torch.zeros(4, 4, 4), {}, r"z must be a tensor \[B, 4, h, w\]"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), {}, "z must be floating point"),
        (torch.full((1, 4, 4, 4), float("nan")), {}, "z must be finite"),
        (torch.zeros(1, 4, 4, 4), {"output": "png"}, "output must be"),
        (torch.zeros(1, 4, 4, 4), {"size": 8}, r"size must be \(height, width\)"),
    ],
)
def test_bad_latents_are_named(z, options, words):
    with pytest.raises(ValueError, match=words):
        model().decode_latents(z, **options)


@pytest.mark.parametrize("function", [fastvae.scale_latents, fastvae.unscale_latents])
def test_scaling_refuses_other_channels(function):
    with pytest.raises(ValueError, match=r"z must be a tensor \[B, 4, h, w\], got shape \(1, 3, 4, 4\)"):
        function(model(), torch.zeros(1, 3, 4, 4))


def test_latents_that_overflow_are_refused():
    vae = model().half()
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(60000)
    with pytest.raises(ValueError, match=r"the latents must be finite.*computed in torch.float16"):
        vae.encode_latents(random_images(), posterior="mode")


def test_latents_have_no_autograd_graph():
    assert not model().encode_latents(random_images()).requires_grad
