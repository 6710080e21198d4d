"""GroupNorm and SiLU of the CPU's pass against float64: sizes, means, pictures, dtypes, threads; whole models too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fast.small_models import small_model
from fastvae_kernels.cpu import group_norm as c_norm
from fastvae_kernels.cpu.group_norm import BandNorm
from fastvae_kernels.cpu.library import library, why_not
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from support.small_store import small_vae
from torch import nn

import fastvae
from fastvae.fast.capture.compiled_passes import wide_group_norm
from fastvae.fast.cpu import group_norm
from fastvae.fast.cpu.group_norm import ContiguousGroupNorm, group_norm_silu

slow = pytest.mark.slow
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _as_a_users_cpu(monkeypatch):
    monkeypatch.setattr("fastvae.fast.fallback_reasons.KERNEL_DEVICES", ())


def norm_of(channels, groups, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    norm = nn.GroupNorm(groups, channels, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.randn(channels, generator=generator))
    norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm.to(dtype)


def plain(norm, x):
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


def check(norm, x):
    """``x`` [N, C, H, W] in its dtype: out of place, in place, and both the same."""
    eager, truth = plain(norm, x), plain(copy.deepcopy(norm).double(), x.double())
    given = x.contiguous(memory_format=torch.channels_last).clone(memory_format=torch.preserve_format)
    before = given.clone()
    ours = group_norm_silu(norm, given, into=torch.empty_like(given))
    assert torch.equal(given, before)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(ours, eager, truth)
    if given.numel() < 2**20:  # the path without the C kernel and that of a trace, at sizes that cost little
        assert_as_accurate(group_norm._group_norm_silu_in_torch(norm, given, torch.empty_like(given)), eager, truth)
        traced = wide_group_norm(given, norm.num_groups, norm.weight, norm.bias, norm.eps)
        assert_as_accurate(F.silu(traced), eager, truth)
    assert torch.equal(group_norm_silu(norm, given, into=given), ours)


def noise(*shape, mean=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) + mean


def one_pixel(channels, side, level):
    """Flat pictures, in each of which one pixel is another: eight at once, so that no single rounding decides."""
    x = torch.full((8, channels, side * side), level)
    for row, place in enumerate((0, 1, side, side * side // 8, side * side // 2, side * side // 2 + 3, -2, -1)):
        x[row, :, place] = level - 0.4 - 0.37 * row
    return x.view(8, channels, side, side)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0, 1, 30, 10_000])
def test_any_mean_is_within_the_tolerance(mean, dtype):
    check(norm_of(32, 8, dtype), noise(1, 32, 96, 88, mean=mean).to(dtype))


@pytest.mark.parametrize(
    ("channels", "groups", "dtype"),
    [
        (16, 16, torch.float32),
        (24, 1, torch.float32),
        (32, 8, torch.float16),
        pytest.param(16, 16, torch.bfloat16, marks=slow),
        pytest.param(32, 8, torch.float32, marks=slow),
        pytest.param(32, 8, torch.bfloat16, marks=slow),
        pytest.param(24, 1, torch.float16, marks=slow),
    ],
    ids=str,
)
def test_flat_and_one_pixel_pictures_are_within_the_tolerance(channels, groups, dtype):
    for side, level in ((33, 0.7), (128, 0.3), (96, 12345.678)):
        check(norm_of(channels, groups, dtype), one_pixel(channels, side, level).to(dtype))
        check(norm_of(channels, groups, dtype), torch.full((1, channels, side, side), level).to(dtype))


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 32, 8, 8), 8),
        ((2, 32, 1, 1), 8),
        ((1, 4096, 9, 5), 32),  # a row wider than ROW
        ((3, 64, 127, 113), 16),  # no divisor: one pixel a row, and a last strip that is shorter
        ((70, 64, 17, 16), 16),  # several images a strip, and a last strip of fewer
        ((1, 16, 512, 512), 4),
        pytest.param((1, 32, 512, 512), 8, marks=slow),
        pytest.param((1, 8, 1024, 1024), 8, marks=slow),
        pytest.param((1, 128, 512, 512), 32, marks=slow),
        pytest.param((1, 16, 2048, 2048), 4, marks=slow),
        pytest.param((1, 4, 4096, 4096), 1, marks=slow),
    ],
    ids=str,
)
def test_any_size_and_batch_is_within_the_tolerance(shape, groups):
    check(norm_of(shape[1], groups), noise(*shape, mean=0.5))


@slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("picture", ["noisy", "flat", "one pixel"])
def test_pictures_of_2048_pixels_are_within_the_tolerance(picture, dtype):
    """Two of the eight one-pixel pictures: all take 10 GB in float64."""
    make = {
        "noisy": lambda: noise(1, 8, 2048, 2048, mean=1.0),
        "flat": lambda: torch.full((1, 8, 2048, 2048), 0.7),
        "one pixel": lambda: one_pixel(8, 2048, 0.3)[3:5],
    }
    check(norm_of(8, 4, dtype), make[picture]().to(dtype))


@pytest.mark.parametrize("threads", [1, 2, pytest.param(3, marks=slow), 4])
def test_any_number_of_threads_is_within_the_tolerance(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(norm_of(32, 8), noise(1, 32, 128, 96, mean=20.0))
        check(norm_of(32, 8, torch.bfloat16), noise(1, 32, 128, 96, mean=2.0).bfloat16())
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_no_bit_of_the_c_norm_depends_on_the_threads(monkeypatch):
    x = noise(1, 32, 128, 96, mean=20.0).contiguous(memory_format=torch.channels_last)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(group_norm_silu(norm_of(32, 8), x, torch.empty_like(x)))
    assert torch.equal(*results)


@pytest.mark.skipif(not library().has_avx512, reason="this CPU has no AVX512")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_avx512_gives_the_bits_of_avx2(dtype, monkeypatch):
    x = noise(2, 48, 67, 33, mean=3.0)
    x[0, 17, 5, 6], x[0, 29, 7, 8], x[1, :16] = torch.inf, torch.nan, 7.0
    x[1, 32:] *= 100
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for has in (True, False):
        monkeypatch.setattr(library(), "has_avx512", has)
        results.append(group_norm_silu(norm_of(48, 6, dtype), x, torch.empty_like(x)))
    assert torch.equal(*(values.isnan() for values in results))
    assert torch.equal(*(values.nan_to_num(nan=9.0) for values in results))


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda x: x.contiguous(), "y must be in channels_last"), (lambda x: x.half(), "got y of torch.float16")],
)
def test_images_that_c_would_write_past_are_refused(change, words):
    x, norm = noise(1, 32, 9, 5).contiguous(memory_format=torch.channels_last), norm_of(32, 8)
    with pytest.raises(ValueError, match=words):
        c_norm.group_norm_silu(x, change(x), norm.weight, norm.bias, 8, 1e-6)


def test_float64_values_that_are_not_finite_and_empty_batches():
    norm = norm_of(32, 8).double()
    x = noise(1, 32, 96, 64, mean=5.0).double()
    given = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(group_norm_silu(norm, given, torch.empty_like(given)), plain(norm, x), rtol=1e-12, atol=1e-12)
    x[0, 5, 7, 7] = torch.inf
    given = x.contiguous(memory_format=torch.channels_last)
    ours = group_norm_silu(norm, given, torch.empty_like(given))
    assert torch.equal(ours.isfinite(), plain(norm, x).isfinite())
    assert group_norm_silu(norm, given[:0], given[:0]).shape == (0, 32, 96, 64)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_of_any_value_is_torchs(dtype):
    """The values pass the norm through its bias: x is 0 and the weight 0."""
    values = torch.cat([torch.linspace(-110, 110, 9976), torch.tensor([-1e-30, 0.0, -0.0, 1e-30, 3e38, -3e38])])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf])]).to(dtype)
    norm = nn.GroupNorm(1, len(values)).requires_grad_(False).to(dtype)
    norm.weight.zero_()
    norm.bias.copy_(values)
    x = torch.zeros(1, len(values), 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    ours = group_norm_silu(norm, x, into=x)[0, :, 1, 1]
    eager, truth = F.silu(values), F.silu(values.double())
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.isinf(), eager.isinf())
    finite = eager.isfinite()
    assert_as_accurate(ours[finite], eager[finite], truth[finite])
    # Relative too, to two roundings, where e^-x does not overflow and the result is a normal number.
    kept = finite & (values > -88) & (truth.abs() > torch.finfo(dtype).tiny * 8)
    assert ((ours.double() - truth).abs() / truth.abs())[kept].max() <= 2 * torch.finfo(dtype).eps


def test_torchs_norm_in_channels_last_fails_this_test():
    """The reason for a norm of our own. If this test fails, torch's kernel has become accurate."""
    norm, x = norm_of(32, 8), noise(1, 32, 256, 256, mean=30.0)
    wrong, truth = plain(norm, x.contiguous(memory_format=torch.channels_last)), plain(norm.double(), x.double())
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(wrong.contiguous(), plain(norm.float(), x), truth)
    with ContiguousGroupNorm():
        right = plain(norm, x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(right, plain(norm, x))


def narrow_model(dtype=torch.float32):
    """f = 8, one channel a group, as few operations a pixel as a model can have."""
    options = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8, "layers_per_block": 1}
    return small_vae(mid_block_add_attention=False, **options).requires_grad_(False).to(dtype)


PICTURES = {
    "noisy": lambda side: noise(1, 3, side, side).clamp(-1, 1),
    "white": lambda side: torch.ones(1, 3, side, side),
    "grey": lambda side: torch.full((1, 3, side, side), 1 / 255),
    "one pixel": lambda side: one_pixel(3, side, 0.9)[5:6].clamp(-1, 1),
    "dark": lambda side: noise(1, 3, side, side) * 0.001 - 0.99,
}


@pytest.mark.parametrize(
    ("side", "dtype", "picture"),
    [
        *short_run(
            [(64, dtype, picture) for dtype in DTYPES for picture in PICTURES],
            [(64, DTYPES[number % 3], picture) for number, picture in enumerate([*PICTURES, "noisy", "grey"])],
        ),
        (256, torch.float32, "grey"),
        pytest.param(512, torch.float32, "noisy", marks=slow),
        pytest.param(512, torch.float32, "grey", marks=slow),
        pytest.param(512, torch.bfloat16, "white", marks=slow),
        *(pytest.param(1024, torch.float32, picture, marks=slow) for picture in PICTURES),
        pytest.param(2048, torch.float32, "dark", marks=slow),
    ],
    ids=str,
)
def test_an_accelerated_model_is_within_the_tolerance_at_sizes_people_use(side, dtype, picture):
    stock = narrow_model(dtype)
    fast, wide = fastvae.accelerate(copy.deepcopy(stock), freeze=True), copy.deepcopy(stock).double()
    x = PICTURES[picture](side).to(dtype)
    moments = [vae.encode(x.to(vae.dtype)).latent_dist.parameters for vae in (fast, stock, wide)]
    assert_as_accurate(*moments)
    z = moments[1].chunk(2, dim=1)[0].contiguous()
    assert_as_accurate(*(vae.decode(z.to(vae.dtype)).sample for vae in (fast, stock, wide)))


def test_1024_pixels_are_within_the_tolerance():
    """The encoder of a model of one level alone: truth in float64 of more takes seconds."""
    one = {"block_out_channels": (2,), "norm_num_groups": 2, "layers_per_block": 1, "mid_block_add_attention": False}
    options = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    stock = small_vae(**one, **options).requires_grad_(False)
    fast, wide = fastvae.accelerate(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    x = noise(1, 3, 1024, 1024) * 0.02 + 0.9
    assert_as_accurate(*(vae.encode(x.to(vae.dtype)).latent_dist.parameters for vae in (fast, stock, wide)))


def test_a_block_with_a_hook_and_a_gradient_are_within_the_tolerance():
    """A block that runs as a module, and a pass with a gradient, run torch's layers in channels_last."""
    stock = small_model("SD")
    x = noise(1, 3, 128, 128) * 0.01 + 0.9
    truth = copy.deepcopy(stock).double().encode(x.double()).latent_dist.parameters
    eager = stock.encode(x).latent_dist.parameters
    fast = fastvae.accelerate(copy.deepcopy(stock))
    for block in fast.encoder.down_blocks:
        block.register_forward_hook(lambda module, given, result: None)
    assert_as_accurate(fast.encode(x).latent_dist.parameters, eager, truth)
    fast = fastvae.accelerate(copy.deepcopy(stock)).requires_grad_(True)
    assert_as_accurate(fast.encode(x).latent_dist.parameters.detach(), eager, truth)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_bands_of_rows_have_the_bits_of_the_whole_image(dtype):
    norm = norm_of(24, 3, dtype)
    x = noise(1, 24, 75, 67, mean=5.0).to(dtype).contiguous(memory_format=torch.channels_last)
    whole = group_norm_silu(norm, x, into=torch.empty_like(x))
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 24)
    truth = F.group_norm(x.double(), 3, norm.weight.double(), norm.bias.double(), norm.eps)
    eager = F.group_norm(x.contiguous(), 3, norm.weight, norm.bias, norm.eps)
    for height in (1, 8, 75):
        bands = BandNorm(dtype, len(pixels), norm.weight, norm.bias, norm.num_groups, norm.eps)
        for band in pixels.split(67 * height):
            bands.add(band)
        bands.close()
        y = torch.empty_like(pixels)
        bands.apply(pixels, y)
        assert torch.equal(y, whole[0].permute(1, 2, 0).reshape(-1, 24)), height
        bands.apply(pixels, y, silu=False)
        assert_as_accurate(y.view(75, 67, 24).permute(2, 0, 1)[None], eager, truth)
