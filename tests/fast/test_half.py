"""Half precision: a model that overflows in eager as SDXL's does, the factors, and rows redone in fp32."""

import copy
import threading

import numpy as np
import pytest
import torch
from fast.small_models import FEWEST, LIBRARIES, ONE_BLOCK, TWO, latents, pixels
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from torch import nn

import fastvae
from fastvae.data.encoding.encoder import MomentEncoder, _placed
from fastvae.fast.accelerate import path_of
from fastvae.fast.fast_path import UNSCALED, Factors
from fastvae.fast.fp32_copy import Fp32Copy
from fastvae.fast.inference_pass import InferencePass

CONFIG = {**TWO, "block_out_channels": (16, 32), "norm_num_groups": 4}
# The interpreter computes in numpy, which warns of the overflows made here on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
NORMS = ("norm1", "group_norm", "conv_norm_out")


def half_model(library="fastvae", gain=1.0, seed=0, **config):
    """Return a small fp16 model well inside fp16's range. eps is large so that an error in it shows; gain of norm2."""
    torch.manual_seed(seed)
    vae = LIBRARIES[library].AutoencoderKL(**{**CONFIG, **config})
    for name, layer in vae.named_modules():
        for weight in layer._parameters.values():
            if weight is not None and weight.ndim == 1:
                nn.init.normal_(weight, mean=1.0 if weight.mean() > 0.9 else 0.0, std=0.2)
        if isinstance(layer, nn.GroupNorm):
            layer.eps = 0.1
            if name.endswith("norm2"):
                layer.weight.data *= gain
    return vae.half().eval().requires_grad_(False)


def blown_up(vae, stream=2.0**16, inner=2.0**16):
    """Return the same function with activations ``stream`` and ``inner`` times larger, which GroupNorm divides out."""
    vae = copy.deepcopy(vae)
    for name, layer in vae.named_modules():
        place = name.split(".")[-1]
        is_first = name in ("encoder.conv_in", "decoder.conv_in")
        if is_first or place == "conv2" or name.endswith("to_out.0"):  # from a normalised input into the stream
            layer.weight *= stream
            layer.bias *= stream
        elif place == "conv_shortcut" or ("samplers" in name and place == "conv"):  # from stream to stream
            layer.bias *= stream
        elif place in NORMS:
            layer.eps *= stream**2
        elif place == "conv1":
            layer.weight *= inner
            layer.bias *= inner
        elif place == "norm2":
            layer.eps *= inner**2
    assert all(weight.isfinite().all() for weight in vae.parameters())
    return vae


def moments_of(vae, x):
    return vae.encode(x).latent_dist.parameters


def images_of(vae, z):
    return vae.decode(z).sample


CALLS = {
    "encoder": (moments_of, lambda vae: pixels(vae, 1, 8, 8)),
    "decoder": (images_of, lambda vae: latents(vae, 1, 4, 3)),
}


def reached(part, call):
    """Return {block: largest |output|} of the residual blocks and samplers of a part while ``call`` runs."""
    found, hooks = {}, []
    for name, layer in part.named_modules():
        if type(layer).__name__.startswith(("ResnetBlock", "Downsample", "Upsample")):
            hooks.append(
                layer.register_forward_hook(lambda *given, name=name: found.update({name: given[2].abs().max()}))
            )
    call()
    for hook in hooks:
        hook.remove()
    return found


def in_channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "library", "shared"),
    short_run(
        [("encoder", "fastvae", True), ("encoder", "diffusers", False), ("decoder", "fastvae", False)],
        [("encoder", "fastvae", True), ("decoder", "fastvae", False)],
    ),
)
def test_a_model_that_overflows_is_as_accurate_as_one_that_does_not(name, library, shared, monkeypatch):
    call, given = CALLS[name]
    sound = half_model(library)
    x, vae = given(sound), blown_up(sound)
    wide, fits = copy.deepcopy(vae).double(), copy.deepcopy(sound).to(memory_format=torch.channels_last)
    beyond = reached(getattr(wide, name), lambda: call(wide, x.double()))
    assert sum(value > 65504 for value in beyond.values()) >= 2, "built to overflow in more than one block"
    eager = reached(getattr(vae, name), lambda: call(vae, x))
    assert sum(not value.isfinite() for value in eager.values()) >= 2, "and eager does"
    truth = call(wide, x.double())
    assert (truth - call(copy.deepcopy(sound).double(), x.double())).abs().max() < 1e-9, "the same function"
    monkeypatch.setattr(InferencePass, "_is_shared", lambda self, layer: shared)
    ours = call(fastvae.accelerate(vae), x)
    assert ours.isfinite().all()
    allowed, error = (values.double() - truth for values in (call(fits, in_channels_last(x)), ours))
    assert error.abs().max() <= 2 * allowed.abs().max()
    assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()
    assert fastvae.fast_report(vae)["non_finite_rows"] == 0


def photograph_like(side=16):
    """Return noise at every scale, coarse ones stronger, as in photographs: fp16 [1, 3, side, side] in [-1, 1]."""
    generator = torch.Generator().manual_seed(3)
    sizes = [2**octave for octave in range(1, 6)]
    layers = [torch.randn(1, 3, size, size, generator=generator) / size**0.5 for size in sizes]
    image = sum(nn.functional.interpolate(layer, (side, side), mode="bicubic") for layer in layers)
    return (image / image.abs().amax()).half()


def test_what_the_factor_costs_a_value():
    """For every fp16 value the error is at most fp16's own rounding, or 1.9e-6 if that is larger."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    values = values[values.isfinite()]
    carried = (values * 2**-6).half().double() * 2**6
    assert ((carried - values).abs() <= torch.maximum(values.abs() * 2**-11, torch.tensor(2.0**-19))).all()
    exact = values.abs() >= 2**-8
    assert torch.equal(carried[exact], values[exact])


def test_the_default_factors_cost_a_trained_model_nothing():
    vae = fastvae.AutoencoderKL.from_pretrained("tiny").half().eval().requires_grad_(False)
    x = photograph_like()
    eager, truth = copy.deepcopy(vae).to(memory_format=torch.channels_last), copy.deepcopy(vae).double()
    fastvae.accelerate(vae)
    expected = moments_of(truth, x.double())
    assert_as_accurate(moments_of(vae, x), moments_of(eager, in_channels_last(x)), expected)
    z = expected[:, : vae.config.latent_channels].half()
    assert_as_accurate(images_of(vae, z), images_of(eager, in_channels_last(z)), images_of(truth, z.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_are_carried_as_they_are(dtype):
    vae = fastvae.accelerate(half_model().to(dtype))
    path = path_of(vae)
    for part in (vae.encoder, vae.decoder):
        run = path.pass_for(part, pixels(vae))
        assert (run.stream_factor, run.inner_factor) == UNSCALED


def test_a_block_that_runs_as_a_module_gets_true_values():
    vae = half_model()
    x = pixels(vae, 1, 8, 8)
    eager, truth = copy.deepcopy(vae).to(memory_format=torch.channels_last), copy.deepcopy(vae).double()
    fastvae.accelerate(vae)
    # The first takes the output of a fused downsample, whose bias is still pending.
    for layer in (vae.encoder.down_blocks[1].resnets[0], vae.encoder.mid_block.attentions[0]):
        layer.register_forward_hook(lambda *_: None)
    assert_as_accurate(moments_of(vae, x), moments_of(eager, in_channels_last(x)), moments_of(truth, x.double()))


def test_calibration_carries_what_the_default_does_not():
    sound = half_model(gain=64.0)
    x, z, vae = pixels(sound, 1, 8, 8), latents(sound, 1, 4, 3), blown_up(sound)
    wide, fits = copy.deepcopy(vae).double(), copy.deepcopy(sound).to(memory_format=torch.channels_last)
    truth, expected = moments_of(wide, x.double()), images_of(wide, z.double())
    fastvae.accelerate(vae, freeze=True)
    assert not moments_of(vae, x).isfinite().all()
    found = fastvae.calibrate(vae, x, latents=z * vae.config.scaling_factor)
    report = fastvae.fast_report(vae)
    for name, (call, given) in CALLS.items():
        beyond = reached(getattr(wide, name), lambda call=call, given=given: call(wide, given(vae).double()))
        one = found[name]
        assert max(beyond.values()) <= 1.001 * one.largest_stream
        for place, largest, factor in zip(
            one.factors._fields, (one.largest_stream, one.largest_inner), one.factors, strict=True
        ):
            assert 16 * factor * largest <= 65504 < 32 * factor * largest, "the largest that leaves the headroom"
            assert 2.0 ** report[f"{name}_{place}_log2"] == factor
    assert found["encoder"].factors.stream < Factors().stream
    assert_as_accurate(moments_of(vae, x), moments_of(fits, in_channels_last(x)), truth)
    assert_as_accurate(images_of(vae, z), images_of(fits, in_channels_last(z)), expected)


def test_calibration_leaves_a_model_in_range_unscaled():
    vae = fastvae.accelerate(half_model(**ONE_BLOCK))
    found = fastvae.calibrate(vae, pixels(vae, 1, 8, 8))
    assert [one.factors for one in found.values()] == [UNSCALED, UNSCALED]
    assert 1 < found["encoder"].largest_stream < 100
    assert path_of(vae).pass_for(vae.encoder, pixels(vae)).stream_factor == 1.0


def test_calibration_says_where_it_does_nothing():
    vae = fastvae.accelerate(half_model(**FEWEST).float())
    with pytest.warns(UserWarning, match="activations in torch.float32 need no factors, and none were set"):
        assert fastvae.calibrate(vae, pixels(vae)) == {}
    assert path_of(vae).factors["encoder"] == Factors()
    with pytest.raises(ValueError, match="not accelerated"):
        fastvae.calibrate(half_model(), pixels(vae))
    vae.half()
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        fastvae.calibrate(vae, pixels(vae)[:0])
    vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(ValueError, match="activations of the encoder must be finite, got NaN or infinity in fp32"):
        fastvae.calibrate(vae, pixels(vae, 1, 4, 4))


def dim_and_bright(vae, given):
    """Return three rows of which only the middle one overflows conv_in, and scale the model's conv_in for it."""
    for part in (vae.encoder, vae.decoder):
        part.conv_in.weight *= 2.0**17
    rows = given(vae).repeat(3, 1, 1, 1)
    return rows * torch.tensor([0.01, 1.0, -0.01], dtype=rows.dtype)[:, None, None, None]


def test_a_row_that_overflows_is_encoded_again_in_fp32():
    vae = half_model(**FEWEST)
    x = dim_and_bright(vae, CALLS["encoder"][1])
    exact = copy.deepcopy(vae).float().encode(x[1:2].float()).latent_dist.mean * vae.config.scaling_factor
    fastvae.accelerate(vae)
    path_of(vae).factors = {"encoder": UNSCALED, "decoder": UNSCALED}
    plain = fastvae.latents.convert.encode_moments(vae, x).chunk(2, 1)[0] * vae.config.scaling_factor
    assert [bool(row.isfinite().all()) for row in plain] == [True, False, True]
    assert {
        **fastvae.fast_report(vae),
        "rows": 3,
        "non_finite_rows": 1,
        "rows_again_in_fp32": 0,
    } == fastvae.fast_report(vae)
    ours = fastvae.encode_latents(vae, x, posterior="mode")
    assert torch.equal(ours[::2], plain[::2]), "the other rows keep their bits"
    assert torch.allclose(ours[1:2], exact.half(), rtol=2**-9)
    assert {
        **fastvae.fast_report(vae),
        "rows": 6,
        "non_finite_rows": 2,
        "rows_again_in_fp32": 1,
    } == fastvae.fast_report(vae)
    trained = threading.Event()

    def batches():
        yield {"image": x, "key": ["a", "b", "c"]}
        assert trained.wait(60), "a batch that is redone must not wait for the next one"

    loading = iter(fastvae.LatentLoader(batches(), vae, posterior="mean", images="image"))
    loaded = next(loading)["latents"]
    trained.set()
    assert torch.equal(loaded, ours), "a loader checks after the launch and redoes the same row"
    assert next(loading, None) is None
    assert {
        **fastvae.fast_report(vae),
        "rows": 9,
        "non_finite_rows": 3,
        "rows_again_in_fp32": 2,
    } == fastvae.fast_report(vae), "a redone batch counts once"


def test_the_copy_in_fp32_is_kept_and_follows_the_weights(monkeypatch):
    """One deep copy, not one a batch; a write into a weight shows, and a replaced layer needs a new copy."""
    vae, made = half_model(**FEWEST), []
    monkeypatch.setattr("fastvae.fast.fast_path.Fp32Copy", lambda *given: made.append(given) or Fp32Copy(*given))
    x = dim_and_bright(vae, CALLS["encoder"][1])
    fastvae.accelerate(vae)
    path_of(vae).factors = {"encoder": UNSCALED, "decoder": UNSCALED}

    def redone():
        wanted = copy.deepcopy(vae).float().encode(x[1:2].float()).latent_dist.mean * vae.config.scaling_factor
        ours = fastvae.encode_latents(vae, x, posterior="mode")[1:2]
        return torch.allclose(ours, wanted.half(), rtol=2**-9)

    assert redone()
    vae.encoder.conv_out.weight.data.mul_(0.5)
    assert redone()
    assert len(made) == 1
    vae.encoder.conv_norm_out = copy.deepcopy(vae.encoder.conv_norm_out)
    vae.encoder.conv_norm_out.weight.data.mul_(2)
    assert redone()
    assert len(made) == 2
    weights = sum(weight.numel() for name, weight in vae.named_parameters() if not name.startswith("decoder"))
    assert fastvae.fast_report(vae)["fp32_copy_bytes"] == 4 * weights
    assert not copy.deepcopy(vae)._fastvae.fp32_copies
    fastvae.refresh(vae)
    assert fastvae.fast_report(vae)["fp32_copy_bytes"] == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_row_that_overflows_is_decoded_again_in_fp32(library):
    """precision="exact" overflows where eager does."""
    vae = half_model(library)
    vae.post_quant_conv.bias.zero_()
    z = dim_and_bright(vae, lambda vae: latents(vae, 1, 4, 3))
    fastvae.accelerate(vae, precision="exact")
    plain = images_of(vae, z)
    assert [bool(row.isfinite().all()) for row in plain] == [True, False, True]
    ours = fastvae.decode_latents(vae, z * vae.config.scaling_factor, output="float")
    wide = images_of(
        copy.deepcopy(vae).float(), (z * vae.config.scaling_factor / vae.config.scaling_factor)[1:2].float()
    )
    assert ours.dtype == torch.float16
    assert torch.equal(ours[1:2], wide.half())
    assert fastvae.fast_report(vae)["rows_again_in_fp32"] == 1


def test_the_command_lines_encoder_takes_the_fast_path():
    """The encoder copies and freezes the model; the settings of an accelerated model stay."""
    vae = half_model()
    for device in (torch.device("meta"), torch.device("cpu")):
        placed = _placed(vae, torch.float16, device)
        assert path_of(placed).packed.frozen
        assert vars(placed.encoder)["_fastvae"] is path_of(placed)
        assert "_fastvae" not in vars(vae)
        exact = _placed(fastvae.accelerate(copy.deepcopy(vae), precision="exact"), torch.float16, device)
        assert path_of(exact).precision == "exact"


@pytest.mark.parametrize("fast", [False, True])
def test_the_command_lines_encoder_does_such_rows_again(fast, monkeypatch):
    if not fast:
        monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())
    vae = blown_up(half_model())
    photo = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    if fast:
        fastvae.accelerate(vae, freeze=True)
        vae.encode(pixels(vae, 1, 4, 4))  # what is packed here is packed for fp16, and the copy for fp32 is not misled
    moments, again = MomentEncoder(vae, "fp16", torch.device("cpu")).moments(photo)
    assert np.isfinite(moments).all()
    assert again == (0 if fast else 1)


def test_rows_that_are_not_finite_in_fp32_either_are_refused():
    vae = half_model()
    vae.encoder.conv_out.bias[0] = vae.decoder.conv_out.bias[0] = float("nan")
    fastvae.accelerate(vae, precision="exact")
    with pytest.raises(ValueError, match=r"the latents must be finite.*rows \[0\] of 1, computed in torch.float16"):
        fastvae.encode_latents(vae, pixels(vae, 1, 8, 8))
    for output in ("uint8", "float"):
        with pytest.raises(ValueError, match="the decoded images must be finite"):
            fastvae.decode_latents(vae, latents(vae, 1, 4, 3), output=output)
    assert fastvae.fast_report(vae)["rows_again_in_fp32"] == 3
