"""winograd_conv: the convolution, its statistics, strips, the padded buffer, and no bit that depends on the batch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastvae_kernels import winograd
from fastvae_kernels.shared import statistics
from fastvae_kernels.shared.winograd_matrices import FORMS
from fastvae_kernels.winograd import transform_weights, winograd_conv
from support.accuracy import assert_as_accurate
from support.short_run import short_run
from support.thinned import thinned

pytestmark = pytest.mark.usefixtures("on_device")
in_both_forms = pytest.mark.parametrize("form", short_run(FORMS, ["winograd4"]))

# name: batch, channels, results, height, width
CASES = {
    "one pixel": (1, 16, 8, 1, 1),
    "channels that fill no block": (2, 24, 40, 5, 6),
    "more than one block of channels": (1, 72, 80, 3, 4),
    "more than one group of tiles, the last one short": (1, 8, 8, 13, 18),
    "one line": (1, 24, 8, 1, 9),
}
# The forms that are as accurate as the direct form in one layer; a whole network decides on the others.
AS_DIRECT = [("winograd4", torch.bfloat16), ("winograd2", torch.bfloat16), ("winograd2", torch.float32)]


def inputs(case: str, dtype: torch.dtype) -> Any:
    batch, channels, results, height, width = CASES[case]
    weight = torch.randn(results, channels, 3, 3) / (9 * channels) ** 0.5
    scale, shift = torch.rand(batch, channels) + 0.5, torch.randn(batch, channels)
    x, residual = torch.randn(batch, channels, height, width), torch.randn(batch, results, height, width)
    bias, other = torch.randn(2, results)
    return x.to(dtype), scale, shift, weight.to(dtype), *(v.to(dtype) for v in (bias, residual, other))


def doubles(given: tuple) -> Any:
    return [value.double() for value in given]


def direct(x, scale, shift, weight, bias, residual, other, pad=0):
    """Return the result as the layers compute it, for weights as the layer holds them."""
    h = F.silu(torch.addcmul(shift[:, :, None, None], x.to(scale.dtype), scale[:, :, None, None])).to(x.dtype)
    y = F.conv2d(h, weight, padding=1) + bias[:, None, None] + (residual + other[:, None, None])
    return F.pad(y, (0, pad, 0, pad))


def transformed(given: tuple, form: str) -> Any:
    x, scale, shift, weight, *rest = given
    return x, scale, shift, *transform_weights(weight, FORMS[form]), *rest


def normalized(y: torch.Tensor, partials: torch.Tensor) -> torch.Tensor:
    """Return GroupNorm(y) with groups of 8 channels, by these statistics, in y's dtype."""
    triples = partials.to(y.dtype).unflatten(-1, (-1, 8)).movedim(2, -2)  # [N, groups of tiles, C / 8, 3, 8]
    count, mean, deviations = statistics.merged_reference(triples, (1, 3))  # [N, 1, C / 8, 1]
    mean, deviation = (value.movedim(1, -1)[..., None] for value in (mean, (deviations / count).sqrt()))
    return ((y.unflatten(1, (-1, 8)) - mean) / deviation).flatten(1, 2)


@pytest.mark.parametrize(("case", "dtype", "pad", "form"), thinned(CASES, statistics.DTYPES, [0, 1], FORMS, keep=1))
def test_the_convolution_and_its_statistics(case, dtype, pad, form):
    given = inputs(case, dtype)
    values = transformed(given, form)
    y, partials = winograd_conv(*values, pad)
    plain, same = winograd.reference(*values, pad)
    truth = direct(*doubles(given), pad)
    assert_as_accurate(y, plain, truth)
    assert y.stride() == plain.stride()
    inner = y[:, :, : y.shape[2] - pad, : y.shape[3] - pad]
    assert y.count_nonzero() <= inner.numel(), "the border is zero"
    assert torch.equal(partials[:, :, 0], same[:, :, 0])
    groups = inner.shape[1] // 8
    eager, truth = (F.group_norm(values, groups, eps=0.0) for values in (inner.float(), inner.double()))
    assert_as_accurate(normalized(inner.double(), partials).float(), eager, truth)


@pytest.mark.parametrize(("form", "dtype"), short_run(AS_DIRECT, AS_DIRECT[:1]), ids=str)
def test_one_layer_is_as_accurate_as_the_direct_form(form, dtype, record_property):
    given = inputs("channels that fill no block", dtype)
    y, _ = winograd_conv(*transformed(given, form))
    eager, truth = direct(*given), direct(*doubles(given))
    assert_as_accurate(y, eager, truth)
    errors = [(values.double() - truth).square().mean().sqrt().item() for values in (y, eager)]
    record_property("rms error as a multiple of the direct form's", errors[0] / errors[1])


@in_both_forms
def test_strips_and_the_batch_change_no_bit(form, monkeypatch):
    """A strip ends within an image and may hold parts of two; the partials go with it."""
    values = transformed(inputs("channels that fill no block", torch.float32), form)
    x, scale, shift, weights, gain, bias, residual, other = values
    want = winograd_conv(*values)
    assert len(winograd._strips(x, weights, 1)) == x.shape[0] * winograd._tiling(x, weights)[1].groups
    for one, two in zip(winograd_conv(*values, workspace=1), want, strict=True):
        assert torch.equal(one, two)
    for row in range(x.shape[0]):
        part = slice(row, row + 1)
        alone = winograd_conv(x[part], scale[part], shift[part], weights, gain, bias, residual[part], other)
        for one, two in zip(alone, want, strict=True):
            assert torch.equal(one[0], two[row])


@pytest.mark.parametrize("pad", [0, 1])
@in_both_forms
def test_nothing_outside_the_outputs_is_touched(form, pad):
    """V, M, y and the partials as views of longer buffers: every value before and behind them stays."""
    x, scale, shift, weights, gain, bias, residual, other = transformed(inputs("one line", torch.float32), form)
    x, residual = statistics.same_layout(x), statistics.same_layout(residual)
    size = winograd.winograd_tiles.tiling(FORMS[form], 1, 9).size
    shapes = (len(weights), size, 24), (len(weights), size, 8), (1, 1 + pad, 9 + pad, 8), (1, 1, 3, 8)
    margin = 512  # more than a line
    buffers = [torch.full((math.prod(shape) + 2 * margin,), 7.0) for shape in shapes]
    v, m, y, partials = (buffer[margin:-margin].view(shape) for buffer, shape in zip(buffers, shapes, strict=True))
    y = y.permute(0, 3, 1, 2)
    winograd.winograd_input.transform(v, x, scale, shift, 0)
    torch.bmm(v, weights, out=m)
    winograd.winograd_output.transform_back(y, partials, m, gain, bias, residual, other, pad, 1.0, 0)
    for buffer in buffers:
        assert (torch.cat([buffer[:margin], buffer[-margin:]]) == 7.0).all()
    want = winograd_conv(x, scale, shift, weights, gain, bias, residual, other, pad)
    assert torch.equal(y, want[0])
    assert torch.equal(partials, want[1])


def test_strides_of_inputs_change_no_bit():
    x, scale, shift, weights, gain, bias, residual, other = transformed(
        inputs("channels that fill no block", torch.float32), "winograd2"
    )
    want = winograd_conv(x, scale, shift, weights, gain, bias, residual, other)
    vectors = torch.stack([gain, bias, other], 1).unbind(1)
    pairs = torch.stack([scale, shift], 2).unbind(2)
    found = winograd_conv(
        x.contiguous(memory_format=torch.channels_last), *pairs, weights.mT.contiguous().mT, *vectors[:2],
        residual.transpose(2, 3).contiguous().transpose(2, 3), vectors[2],
    )  # fmt: skip
    for one, two in zip(found, want, strict=True):
        assert torch.equal(one, two)


def test_a_batch_of_none():
    x, scale, shift, *rest, residual, other = transformed(inputs("one pixel", torch.bfloat16), "winograd4")
    y, partials = winograd_conv(x[:0], scale[:0], shift[:0], *rest, residual[:0], other, 1)
    assert y.shape == (0, 8, 2, 2)
    assert partials.shape == (0, 1, 3, 8)


def test_a_scaled_result_keeps_its_bits():
    """Residual and statistics stored times a power of two: the sum is too, to the last bit."""
    *first, bias, residual, other = transformed(inputs("one line", torch.float32), "winograd4")
    y, partials = winograd_conv(*first, bias, residual, other)
    scaled = winograd_conv(*first, bias, residual / 64, other, 0, 1 / 64)
    assert torch.equal(scaled[0] * 64, y)
    assert torch.equal(scaled[1][:, :, 1] * 64, partials[:, :, 1])


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_any_size_fit_in_fp16(form):
    """Channels of tiny, huge and zero weights: all in the same range, and gain has their size."""
    weight = torch.randn(4, 8, 3, 3) * torch.tensor([1e-20, 1e20, 0.0, 1.0])[:, None, None, None]
    weights, gain = transform_weights(weight.bfloat16(), FORMS[form])
    assert weights.dtype == torch.float16
    assert gain.dtype == torch.float32
    assert torch.equal(torch.frexp(gain).mantissa, torch.full((4,), 0.5))
    largest = weights.abs().amax((0, 1))
    assert ((largest > 2**-5.01) & (largest <= 2**-4)).tolist() == [True, True, False, True]
    assert largest[2] == 0


def test_huge_activations_do_not_overflow_the_products():
    """512 channels of activations of a thousand, all alike, behind equal weights: the largest product there is."""
    x, weight = torch.full((1, 512, 4, 4), 1.0).bfloat16(), torch.full((8, 512, 3, 3), 2.0**-9).bfloat16()
    weights, gain = transform_weights(weight, FORMS["winograd4"])
    scale, shift = torch.full((1, 512), 1000.0), torch.zeros(1, 512)
    y, _ = winograd.reference(x, scale, shift, weights, gain)
    assert y.isfinite().all()


def image(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def call(**given):
    values = {
        "x": image(1, 8, 3, 3), "scale": image(1, 8), "shift": image(1, 8), "weights": image(36, 8, 4),
        "gain": image(4),
    }  # fmt: skip
    return winograd_conv(**(values | given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"x": image(8, 3, 3)}, r"x must be \[N, C, H, W\]"),
        ({"scale": image(1, 7)}, r"scale must be torch.float32 \[N, C\] = \(1, 8\), got torch.float32 .*\(1, 7\)"),
        ({"shift": image(1, 8, dtype=torch.half)}, "shift must be torch.float32 .* got torch.float16"),
        ({"weights": image(25, 8, 4)}, r"weights must be torch.float32 \[16 or 36, 8, D\], .* got .*\(25, 8, 4\)"),
        ({"x": image(1, 8, 3, 3, dtype=torch.bfloat16)}, "weights must be torch.float16 .* got torch.float32"),
        ({"gain": image(5)}, "gain must have one value for each of 4 channels"),
        ({"bias": image(5)}, "bias must have one value"),
        (
            {"residual": image(1, 8, 3, 3)},
            r"residual must be torch.float32 of shape \(1, 4, 3, 3\), got .*\(1, 8, 3, 3",
        ),
        ({"pad": 2}, "pad must be 0 or 1, got 2"),
    ],
)
def test_other_arguments_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        call(**given)


# Without the compiled call, which test_one_graph makes.
OPCHECKS = "test_schema", "test_autograd_registration", "test_faketensor"


def test_opcheck():
    values = transformed(inputs("one pixel", torch.float32), "winograd2")
    torch.library.opcheck(winograd_conv, (*values, 1), test_utils=OPCHECKS)
    wide = transformed(doubles(inputs("one pixel", torch.float32)), "winograd2")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        dtypes = [result.dtype for result in winograd_conv(*wide, 1)]
    assert dtypes == [result.dtype for result in winograd.reference(*wide, 1)] == [torch.float64] * 2


@pytest.mark.slow
def test_one_graph():
    values = transformed(inputs("one pixel", torch.float32), "winograd2")
    compiled = torch.compile(winograd_conv, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*values, 1), winograd_conv(*values, 1), strict=True):
        assert torch.equal(one, two)


def test_strips_cover_all_groups_within_the_workspace():
    strips = winograd.winograd_tiles.strips
    assert strips(10, 100, 350) == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert strips(10, 100, 99) == [(group, 1) for group in range(10)]
    assert strips(0, 100, 350) == []


@in_both_forms
def test_lines_of_other_images_are_not_read(form):
    """Three images of one batch; the first and the last of NaN: the one between them stays finite, bit for bit."""
    x, scale, shift, *rest, residual, other = transformed(inputs("one line", torch.float32), form)
    want = winograd_conv(x, scale, shift, *rest, residual, other)[0]
    x, residual = torch.cat([x * torch.nan, x, x * torch.nan]), residual.expand(3, -1, -1, -1)
    y, _ = winograd_conv(x, scale.expand(3, -1), shift.expand(3, -1), *rest, residual, other)
    assert torch.equal(y[1], want[0])


def test_addresses_beyond_32_bits():
    """The first group of an image 2^31 values behind the first, in memory that is reserved and hardly filled."""
    form, channels, width = FORMS["winograd4"], 8, 2**20
    weight = torch.randn(channels, channels, 3, 3)
    if weight.device.type != "cpu":
        pytest.skip("reserves memory without filling it, which a GPU does not")
    (weights, gain), images = transform_weights(weight, form), 2**31 // (channels * width) + 1
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        x, y, residual = (torch.empty(images * width, channels, dtype=torch.bfloat16) for _ in range(3))
        groups = winograd.winograd_tiles.tiling(form, 1, width).groups
        partials = torch.empty(images, groups, 3, channels)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    x[-width:][:64], residual[-width:][:64] = torch.randn(2, 64, channels).bfloat16().unbind()
    x, y, residual = (v.view(images, 1, width, channels).permute(0, 3, 1, 2) for v in (x, y, residual))
    scale, shift = torch.rand(2, images, channels)
    v, m = torch.empty(2, 36, 8, channels, dtype=torch.float16).unbind()
    winograd.winograd_input.transform(v, x, scale, shift, (images - 1) * groups)
    torch.bmm(v, weights.half(), out=m)
    winograd.winograd_output.transform_back(y, partials, m, gain, None, residual, None, 0, 1.0, (images - 1) * groups)
    part = x[-1:, :, :, :64], scale[-1:], shift[-1:], weights.half(), gain, None, residual[-1:, :, :, :64]
    want = winograd_conv(*part)
    assert torch.equal(y[-1:, :, :, :32], want[0][:, :, :, :32])
    assert torch.equal(partials[-1, 0], want[1][0, 0])
