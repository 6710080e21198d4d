"""pixels_conv_in: bytes and floats, NCHW and NHWC, borders, and the statistics of what it wrote."""

import pytest
import torch
import torch.nn.functional as F
from fastvae_kernels import pixels as conv_in
from fastvae_kernels.group_norm import group_norm_statistics
from fastvae_kernels.pixels import pixels_conv_in
from fastvae_kernels.shared import statistics
from support.accuracy import assert_as_accurate

pytestmark = pytest.mark.usefixtures("on_device")

# name: [N, H, W, colours], channels, bytes
CASES = {
    "one pixel: all of its neighbours are padding": ((2, 1, 1, 3), 16, True),
    "one row, narrower than a window": ((1, 1, 2, 3), 16, True),
    "channels that fill no block": ((2, 4, 5, 3), 48, True),
    "two blocks of channels, the second ragged": ((1, 5, 4, 3), 80, False),
    "a tail of one pixel behind a whole chunk, rows across chunks": ((1, 25, 41, 3), 32, True),
    "grey: a product narrower than its tile": ((1, 4, 5, 1), 8, True),
    "four colours: a product wider than 32": ((1, 4, 5, 4), 8, False),
    "a batch of none": ((0, 4, 5, 3), 16, True),
}


def inputs(case, dtype, as_bytes=None):
    shape, channels, is_bytes = CASES[case]
    if is_bytes if as_bytes is None else as_bytes:
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        # Black and white, which map to exactly -1 and 1.
        pixels.view(-1)[:2] = torch.tensor([0, 255])[: pixels.numel()]
    else:
        pixels = torch.rand(shape) * 2 - 1
    weight, bias = torch.randn(channels, shape[3], 3, 3) / 3, torch.randn(channels)
    return pixels.permute(0, 3, 1, 2), weight.to(dtype), bias.to(dtype)


def eager(pixels, weight, bias, dtype):
    """Return the convolution as pipelines compute it: bytes to [-1, 1] in fp32, then in the network's dtype."""
    values = pixels.to(torch.promote_types(dtype, torch.float32))
    if pixels.dtype == torch.uint8:
        values = values / 127.5 - 1
    return F.conv2d(values.to(dtype), weight.to(dtype), bias.to(dtype), padding=1)


@pytest.mark.parametrize("dtype", statistics.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_convolution_and_its_statistics(case, dtype):
    given = inputs(case, dtype)
    y, partials = pixels_conv_in(*given)
    assert_as_accurate(y, eager(*given, dtype), eager(*given, torch.float64))
    want, truth = group_norm_statistics(y), statistics.reference(y.double())
    assert torch.equal(partials[:, :, 0], want[:, :, 0])
    for part in (1, 2):
        assert_as_accurate(partials[:, :, part], want[:, :, part], truth[:, :, part])


def test_every_byte_maps_as_torch_maps_it():
    """A convolution that copies its middle pixel: all 256 bytes, to the bit."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    weight = torch.zeros(16, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    y, _ = pixels_conv_in(pixels, weight, torch.zeros(16))
    # As a CPU divides: on a GPU torch multiplies by the reciprocal, which has other bits for 111 of them.
    assert torch.equal(y[:, :1].cpu(), pixels.cpu() / 127.5 - 1)
    for dtype in (torch.float16, torch.bfloat16):
        y, _ = pixels_conv_in(pixels, weight.to(dtype), torch.zeros(16, dtype=dtype))
        assert torch.equal(y[:, :1].cpu(), (pixels.cpu() / 127.5 - 1).to(dtype))


def test_padding_is_zero_after_the_mapping():
    """No byte maps to 0: padding with bytes of 0 would give -1, with 128 nearly 0."""
    pixels = torch.full((1, 3, 3, 3), 255, dtype=torch.uint8)
    y, _ = pixels_conv_in(pixels, torch.ones(16, 3, 3, 3), torch.zeros(16))
    assert torch.equal(y[0, 0], torch.tensor([[12.0, 18.0, 12.0], [18.0, 27.0, 18.0], [12.0, 18.0, 12.0]]))


@pytest.mark.parametrize("as_bytes", [True, False])
def test_the_layout_of_pixels_does_not_matter(as_bytes):
    pixels, weight, bias = inputs("channels that fill no block", torch.float32, as_bytes)
    wide = pixels.new_zeros(2, 3, 4, 15)
    wide[..., ::3] = pixels
    want = pixels_conv_in(pixels, weight, bias)
    for other in (pixels.contiguous(), wide[..., ::3], pixels.flip(3).contiguous().flip(3)):
        for one, two in zip(pixels_conv_in(other, weight, bias), want, strict=True):
            assert torch.equal(one, two)
    transposed = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels_conv_in(pixels, transposed, bias)[0], want[0])
    assert want[0].is_contiguous(memory_format=torch.channels_last)


def test_the_batch_and_the_launcher_change_no_bit():
    given = inputs("channels that fill no block", torch.float32)
    together = pixels_conv_in(*given)
    for one, two in zip(conv_in.launch(*given), together, strict=True):
        assert torch.equal(one, two)
    for row in range(2):
        for alone, rows in zip(pixels_conv_in(given[0][row : row + 1], *given[1:]), together, strict=True):
            assert torch.equal(alone[0], rows[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_torch(dtype):
    pixels, weight, bias = inputs("two blocks of channels, the second ragged", dtype)
    dy = torch.randn(1, 80, 5, 4).to(dtype)

    def gradients(function, *values):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        return torch.autograd.grad(function(*leaves), leaves, dy.to(leaves[1].dtype))

    ours = gradients(lambda *values: pixels_conv_in(*values)[0], pixels, weight, bias)
    plain = gradients(lambda *values: eager(*values, dtype), pixels, weight, bias)
    truth = gradients(lambda *values: eager(*values, torch.float64), pixels.double(), weight.double(), bias.double())
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(one, other, true)


def test_bytes_have_no_gradient_and_weights_do():
    pixels, weight, bias = inputs("channels that fill no block", torch.float32)
    y, partials = pixels_conv_in(pixels, weight.requires_grad_(), bias)
    assert not partials.requires_grad
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    (want,) = torch.autograd.grad(eager(pixels, weight, bias, torch.float32).sum(), weight)
    torch.testing.assert_close(dweight, want)


def weight():
    return torch.zeros(16, 3, 3, 3)


def bias():
    return torch.zeros(16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: pixels_conv_in(torch.zeros(1, 4, 4, 3), weight(), bias()),
            r"pixels must be \[N, 3, H, W\].*permute\(0, 3, 1, 2\)",
        ),
        (
            lambda: pixels_conv_in(torch.zeros(1, 3, 4, 4, dtype=torch.int32), weight(), bias()),
            "pixels must be uint8 or floating",
        ),
        (
            lambda: pixels_conv_in(torch.zeros(1, 3, 4, 4), weight()[..., :1], bias()),
            r"weight must be \[C, colours, 3, 3\]",
        ),
        (
            lambda: pixels_conv_in(torch.zeros(1, 3, 4, 4), weight(), bias()[1:]),
            "bias must have one value for each of 16",
        ),
        (
            lambda: pixels_conv_in(torch.zeros(1, 3, 4, 4), weight().int(), bias()),
            "weight must be float32, float16 or bfloat16",
        ),
        (
            lambda: conv_in.launch(torch.zeros(1, 3, 4, 4), weight().double(), bias()),
            "weight must be float32, float16 or bfloat16 on",
        ),
    ],
)
def test_other_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_opcheck_and_one_graph():
    pixels, weight, bias = inputs("channels that fill no block", torch.float32)
    torch.library.opcheck(pixels_conv_in, (pixels, weight.clone().requires_grad_(), bias.clone().requires_grad_()))
    compiled = torch.compile(pixels_conv_in, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels, weight, bias)[0], pixels_conv_in(pixels, weight, bias)[0])


def test_a_factor_scales_the_result_to_the_bit():
    """The factor comes before the rounding: a result that overflows half precision alone does not overflow with it."""
    picture = torch.randint(0, 256, (1, 3, 6, 7), dtype=torch.uint8)
    weight, bias = torch.randn(16, 3, 3, 3), torch.randn(16)
    assert torch.equal(pixels_conv_in(picture, weight, bias, 1 / 64)[0] * 64, pixels_conv_in(picture, weight, bias)[0])
    huge = (weight * 1e4).half()
    assert not pixels_conv_in(picture, huge, bias.half())[0].isfinite().all()
    assert pixels_conv_in(picture, huge, bias.half(), 1 / 64)[0].isfinite().all()


def test_the_gradients_have_the_factor():
    pixels, weight, bias = torch.randn(1, 3, 6, 7), torch.randn(16, 3, 3, 3), torch.randn(16)
    given = [value.requires_grad_() for value in (pixels, weight, bias)]
    plain = torch.autograd.grad(pixels_conv_in(*given)[0].square().sum(), given)
    scaled = torch.autograd.grad(pixels_conv_in(*given, 0.25)[0].square().sum(), given)
    for ours, eager in zip(scaled, plain, strict=True):
        assert torch.equal(ours * 16, eager)
