"""Winograd's convolutions in C against float64 and against the same algorithm in torch; bits, layouts, whole models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fast.small_models import small_model
from fastvae_kernels.cpu import winograd
from fastvae_kernels.cpu.library import library, why_not
from fastvae_kernels.shared.winograd_matrices import FORMS
from support.accuracy import assert_as_accurate

import fastvae
from fastvae.fast.forms.form import Form, Forms
from fastvae.fast.forms.tables import forms_of
from fastvae.latents.autoencoder import ACCELERATED
from fastvae.report.contestants import decoding, encoding
from fastvae.report.correctness import truth_of

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
WINOGRAD = list(FORMS)


def in_torch(x, weight, bias, form):
    """The same algorithm by torch's operators, in the dtype of x."""
    matrices = FORMS[form]
    inward, filters, outward = (torch.tensor(matrix, dtype=x.dtype) for matrix in matrices[:3])
    m, n = matrices.tile, matrices.window
    height, width = x.shape[2:]
    x = F.pad(x, (1, 1 - width % -m, 1, 1 - height % -m))
    windows = inward @ x.unfold(2, n, m).unfold(3, n, m) @ inward.T  # [N, C, h, w, n, n]
    packed = (filters.double() @ weight.double() @ filters.double().T).to(x.dtype)
    products = torch.einsum("nchwij,ocij->nohwij", windows, packed)
    y = (outward @ products @ outward.T).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return y[:, :, :height, :width] + bias[:, None, None]


def convolved(x, packed, bias, form, upsample=False):
    height, width = (side << upsample for side in x.shape[2:])
    size = x.shape[0], packed.shape[1] * packed.shape[3], height, width
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    return winograd.convolve(x, packed, bias, form, y)


def given(batch, inward, outward, height, width):
    generator = torch.Generator().manual_seed(4)
    x, weight, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((batch, inward, height, width), (outward, inward, 3, 3), (outward,))
    )
    return F.silu(x).contiguous(memory_format=torch.channels_last), weight / (3 * inward**0.5), bias


SHAPES = [
    (1, 16, 32, 1, 1),  # one window, mostly outside the image
    (2, 24, 16, 5, 7),  # two images, sizes that no tile divides
    (1, 8, 48, 33, 6),  # several chunks, the last one short
    (1, 264, 16, 9, 12),  # channels past one depth of the products
]


@pytest.mark.parametrize("form", WINOGRAD)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_is_as_accurate_as_the_algorithm_in_torch(shape, form):
    x, weight, bias = given(*shape)
    for upsample in (False, True):
        pixels = F.interpolate(x, scale_factor=2.0) if upsample else x
        truth = F.conv2d(pixels.double(), weight.double(), bias.double(), padding=1)
        y = convolved(x, winograd.pack(weight, form), bias, form, upsample)
        assert_as_accurate(y, in_torch(pixels, weight, bias, form), truth)
        assert torch.allclose(in_torch(pixels.double(), weight.double(), bias.double(), form), truth)


@pytest.mark.parametrize("form", WINOGRAD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_accurate_as_torchs_convolution(dtype, form):
    """Products are fp32, so images, weights and results alone are rounded."""
    for shape in SHAPES:
        x, weight, bias = (values.to(dtype) for values in given(*shape))
        residual = torch.randn(shape[0], shape[2], *shape[3:], generator=torch.Generator().manual_seed(5)).to(dtype)
        residual = residual.contiguous(memory_format=torch.channels_last)
        eager = F.conv2d(x, weight, bias, padding=1) + residual
        truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + residual.double()
        y = winograd.convolve(x, winograd.pack(weight, form), bias, form, torch.empty_like(residual), residual)
        assert_as_accurate(y, eager, truth)
        assert torch.equal(winograd.pack(weight, form), winograd.pack(weight.float(), form))


def test_memory_of_the_caller_is_used_and_not_read():
    x, weight, bias = given(2, 16, 32, 9, 10)
    size = winograd.packed_size(weight, "winograd4")
    memory = torch.full((size + 5,), torch.nan)
    packed = winograd.pack(weight, "winograd4", memory)
    assert packed.data_ptr() == memory.data_ptr()
    assert memory[size:].isnan().all()
    y = torch.empty(2, 32, 9, 10, memory_format=torch.channels_last)
    size = winograd.workspace_size(16, y.shape, "winograd4")
    workspace = torch.full((size + 5,), torch.nan)
    winograd.convolve(x, packed, bias, "winograd4", y, workspace=workspace)
    assert torch.equal(y, convolved(x, winograd.pack(weight, "winograd4"), bias, "winograd4"))
    assert workspace[size:].isnan().all()


@pytest.mark.parametrize("form", WINOGRAD)
def test_the_result_is_added_in_place_and_without_a_bias(form):
    x, weight, bias = given(2, 16, 32, 9, 10)
    packed = winograd.pack(weight, form)
    alone = convolved(x, packed, None, form)
    residual = torch.randn_like(alone)
    y = residual.clone()
    assert winograd.convolve(x, packed, bias, form, y, residual=y) is y
    assert torch.equal(y, (alone + bias[:, None, None]) + residual)


@pytest.mark.parametrize("form", WINOGRAD)
def test_no_bit_depends_on_the_batch_the_threads_or_the_chunks(form, monkeypatch):
    x, weight, bias = given(3, 16, 32, 30, 22)
    packed = winograd.pack(weight, form)
    y = convolved(x, packed, bias, form)
    assert torch.equal(y, torch.cat([convolved(row, packed, bias, form) for row in x.split(1)]))
    monkeypatch.setattr(winograd, "_most_tiles", lambda channels: 6)
    assert torch.equal(y, convolved(x, packed, bias, form))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(y, convolved(x, packed, bias, form))
    assert torch.equal(packed, winograd.pack(weight, form))


@pytest.mark.skipif(not library().has_avx512, reason="this CPU has no AVX512")
@pytest.mark.parametrize("form", WINOGRAD)
def test_avx512_gives_the_bits_of_avx2(form, monkeypatch):
    for shape in ((1, 16, 48, 1, 1), (2, 32, 32, 23, 18), (1, 272, 16, 9, 12), (1, 64, 80, 33, 40)):
        x, weight, bias = given(*shape)
        results = []
        for has in (True, False):
            monkeypatch.setattr(library(), "has_avx512", has)
            packed = winograd.pack(weight, form)
            images = x, x.bfloat16(), x.half()
            results.append((packed, *(convolved(x, packed, bias, form, up) for x in images for up in (False, True))))
        assert all(map(torch.equal, *results)), shape


@pytest.mark.parametrize("form", WINOGRAD)
def test_a_packed_weight_is_rounded_once(form):
    _, weight, _ = given(1, 24, 32, 1, 1)
    filters = torch.tensor(FORMS[form].weight, dtype=torch.float64)
    truth = (filters @ weight.double() @ filters.T).permute(2, 3, 0, 1)  # [n, n, O, C]
    truth = truth.unflatten(2, (-1, winograd.PANEL)).transpose(-1, -2).flatten(0, 1)
    packed = winograd.pack(weight, form)
    half_a_unit = 2.0 ** (torch.frexp(packed).exponent.double() - 25)  # in the last place of fp32
    sums_in_fp64 = 16 * torch.finfo(torch.float64).eps * truth.abs().amax()
    assert ((packed.double() - truth).abs() <= half_a_unit + sums_in_fp64).all()


def test_a_weight_in_any_strides_is_read_as_it_is():
    _, weight, _ = given(1, 16, 32, 1, 1)
    expected = winograd.pack(weight, "winograd4")
    for strided in (weight.contiguous(memory_format=torch.channels_last), torch.stack([weight, -weight], -1)[..., 0]):
        assert not strided.is_contiguous()
        assert torch.equal(winograd.pack(strided, "winograd4"), expected)


@pytest.mark.parametrize("form", WINOGRAD)
def test_a_batch_of_none(form):
    """Division by the tiles of a chunk would end the process."""
    x, weight, bias = given(1, 16, 32, 9, 10)
    packed = winograd.pack(weight, form)
    assert convolved(x[:0], packed, bias, form).shape == (0, 32, 9, 10)
    assert winograd.workspace_size(16, torch.Size((0, 32, 9, 10)), form) > 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": lambda x: x.contiguous()}, r"x must be in channels_last, got \(1, 16, 9, 10\) with the strides"),
        ({"x": lambda x: torch.cat([x, x], 1)[:, :16]}, "x must be in channels_last"),
        ({"y": lambda y: y[:, :, :, ::2]}, "y must be in channels_last"),
        ({"y": lambda y: y.bfloat16()}, "x and y and residual must have one dtype of .* got y of torch.bfloat16"),
        ({"residual": lambda y: y.double()}, "got residual of torch.float64"),
        ({"workspace": lambda memory: memory[1:]}, "workspace must be fp32 memory for at least [0-9]+ values, got"),
        ({"workspace": lambda memory: memory.double()}, "got [0-9]+ of torch.float64"),
    ],
)
def test_images_and_memory_that_c_would_read_past_are_refused(changed, words):
    x, weight, bias = given(1, 16, 32, 9, 10)
    y = torch.empty(1, 32, 9, 10, memory_format=torch.channels_last)
    workspace = torch.empty(winograd.workspace_size(16, y.shape, "winograd4"))
    taken = {"x": x, "y": y, "residual": y, "workspace": workspace}
    taken |= {name: change(taken[name]) for name, change in changed.items()}
    with pytest.raises(ValueError, match=words):
        winograd.convolve(packed=winograd.pack(weight, "winograd4"), bias=bias, form="winograd4", **taken)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x00800000 + 1], ids=hex)
def test_any_nan_stays_nan_in_bf16(bits):
    """The largest mantissas overflow where they are rounded as numbers: to 0, or to infinity."""
    x, weight, bias = (values.bfloat16() for values in given(1, 16, 32, 4, 4))
    bias = bias.float()
    bias[3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    y = convolved(x, winograd.pack(weight, "winograd4"), bias, "winograd4")
    assert torch.equal(y.isnan(), torch.isnan(bias)[None, :, None, None].expand_as(y))


def test_channels_that_do_not_fill_vectors_are_not_taken():
    assert winograd.takes(torch.empty(16, 8, 3, 3))
    assert not winograd.takes(torch.empty(16, 12, 3, 3))
    assert not winograd.takes(torch.empty(8, 16, 3, 3))
    assert not winograd.takes(torch.empty(16, 8, 3, 3, dtype=torch.float64))


def with_form(vae, form, *, freeze=True):
    fastvae.accelerate(vae, freeze=freeze)
    vars(vae)[ACCELERATED].forms = Forms(otherwise=form)
    return vae


def check(vae, side, parts=("encoder", "decoder")):
    """The whole network in each form, against eager torch and float64."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(1, 3, side, side, generator=generator) * 2 - 1).to(vae.dtype)
    small = side // vae.downsample_factor
    z = torch.randn(1, vae.config.latent_channels, small, small, generator=generator).to(vae.dtype)
    tasks = {"encoder": ("encode", encoding, x), "decoder": ("decode", decoding, z)}
    with torch.no_grad():
        for part in parts:
            task, make, given = tasks[part]
            truth, eager = truth_of(vae, task, given), make(vae)(given)
            for form in WINOGRAD:
                ours = make(with_form(copy.deepcopy(vae), Form(form)))(given)
                assert not torch.equal(ours, eager)
                assert truth.judge(ours)[2] is None, (part, form, truth.errors(ours), truth.allowed, truth.allowed_rms)


@pytest.mark.usefixtures("users_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_a_narrow_model_is_within_the_tolerance(side, dtype):
    """64 channels: of fewer, F(4x4) errs up to 1.6 times as much as is allowed, so the tables begin at 128."""
    options = {"block_out_channels": (64, 64), "norm_num_groups": 8, "layers_per_block": 1}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    check(fastvae.AutoencoderKL(**options, **types).eval().requires_grad_(False).to(dtype), side)


@pytest.mark.slow
@pytest.mark.usefixtures("users_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [64, 256])
def test_a_model_of_sd_size_is_within_the_tolerance(side, dtype):
    vae = fastvae.AutoencoderKL.from_preset("sd15", seed=0).eval().requires_grad_(False).to(dtype)
    check(vae, side, ("encoder", "decoder") if side == 64 else ("encoder",))


@pytest.mark.usefixtures("users_cpu")
@pytest.mark.parametrize("freeze", [False, True], ids=["free", "frozen"])
def test_a_change_of_weights_is_seen(freeze):
    """Free weights at the next call, frozen ones after refresh."""
    vae = small_model("SD")
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    fast = with_form(copy.deepcopy(vae), Form.WINOGRAD4, freeze=freeze)
    first = fast.encode(x).latent_dist.parameters
    for model in (fast, vae):
        model.encoder.mid_block.resnets[0].conv1.weight.data.mul_(1.5)
    assert torch.equal(fast.encode(x).latent_dist.parameters, first) == freeze
    changed = with_form(vae, Form.WINOGRAD4, freeze=freeze).encode(x).latent_dist.parameters
    assert torch.equal(fastvae.refresh(fast).encode(x).latent_dist.parameters, changed)
    assert not torch.equal(first, changed)


def test_avx2_has_a_table_for_the_layers_of_stable_diffusion():
    """Its form is Winograd's in fp32 alone, from images of 16 x 16 on."""
    from fastvae.fast.forms.tables import SHIPPED, read

    forms = Forms(read(SHIPPED / "cpu-x86-64-avx2.json"))
    weight = torch.empty(1).expand(512, 512, 3, 3)
    assert forms.of(weight, 256) is Form.WINOGRAD4
    assert forms.of(weight, 255) is Form.DIRECT
    assert forms.of(weight.bfloat16(), 4096) is Form.DIRECT
    assert isinstance(forms_of(torch.device("cpu")), Forms)


@pytest.mark.parametrize("upsample", [False, True], ids=["same-size", "enlarged"])
@pytest.mark.parametrize("form", WINOGRAD)
def test_bands_with_their_halo_have_the_bits_of_the_whole_image(form, upsample):
    x, weight, bias = given(1, 24, 32, 21, 13)
    packed = winograd.pack(weight, form)
    whole = convolved(x, packed, bias, form, upsample)
    rows = F.pad(x, (0, 0, 1, 1))
    for height in (4, 8, 12):
        for first in range(0, 21, height):
            count = min(height, 21 - first)
            band = rows[:, :, first : first + count + 2].contiguous(memory_format=torch.channels_last)
            expected = whole[:, :, first << upsample : first + count << upsample]
            y = torch.empty_like(expected, memory_format=torch.channels_last)
            winograd.convolve(band, packed, bias, form, y, halo=True)
            assert torch.equal(y, expected), (height, first)
