"""residual_add: the sum, its statistics, the padded buffer, and no write outside."""

import pytest
import torch
import torch.nn.functional as F
from fastvae_kernels import residual
from fastvae_kernels.group_norm import group_norm_statistics
from fastvae_kernels.residual import residual_add
from fastvae_kernels.shared import statistics
from support.accuracy import assert_as_accurate
from support.thinned import thinned

pytestmark = pytest.mark.usefixtures("on_device")

# name: shape, mean, deviation
CASES = {
    "one pixel, which is both last column and last row": ((2, 16, 1, 1), 0.0, 1.0),
    "one row: every pixel has the border below": ((1, 48, 1, 9), 0.0, 1.0),
    "one column: every pixel has the border beside": ((1, 48, 9, 1), 0.0, 1.0),
    "channels that fill no block": ((2, 80, 4, 5), 0.0, 1.0),
    "1024 channels": ((1, 1024, 2, 3), 0.0, 1.0),
    "a tail of one pixel behind a whole chunk, rows across chunks": ((1, 8, 25, 41), 0.0, 1.0),
    "mean a hundred times the deviation": ((1, 96, 4, 5), 100.0, 1.0),
    "huge values, as the SDXL autoencoder has": ((1, 32, 6, 5), 0.0, 1e4),
    "a batch of none": ((0, 32, 4, 4), 0.0, 1.0),
}


def inputs(case, dtype):
    shape, mean, deviation = CASES[case]
    # At most two deviations from the mean: the sum of four huge ones is then below fp16's 65,504, whatever is drawn.
    h, other = ((torch.randn(shape).clamp(-2, 2) * deviation + mean).to(dtype) for _ in range(2))
    return h, other, *(torch.randn(2, shape[1]).clamp(-1, 1) * deviation).to(dtype).unbind()


def eager(h, other, bias, other_bias):
    """Return the sum as the layers compute it: each convolution adds its bias first."""
    return (h + bias[:, None, None]) + (other + other_bias[:, None, None])


@pytest.mark.parametrize(("case", "dtype", "pad"), thinned(CASES, statistics.DTYPES, [0, 1], keep=3))
def test_the_sum_and_its_statistics(case, dtype, pad):
    given = inputs(case, dtype)
    y, partials = residual_add(*given, pad)
    plain, truth = (F.pad(eager(*values), (0, pad, 0, pad)) for values in (given, [v.double() for v in given]))
    assert_as_accurate(y, plain, truth)
    height, width = given[0].shape[2:]
    inner = y[:, :, :height, :width]
    if y.numel():
        assert y.count_nonzero() <= inner.numel(), "the border is zero"
    want = group_norm_statistics(inner)
    assert torch.equal(partials[:, :, 0], want[:, :, 0])
    truth = statistics.reference(inner.double())
    for part in (1, 2):
        assert_as_accurate(partials[:, :, part], want[:, :, part], truth[:, :, part])


@pytest.mark.parametrize("biases", ["none", "first", "second"])
def test_biases_may_be_missing(biases):
    h, other, bias, other_bias = inputs("channels that fill no block", torch.float32)
    given = (bias if biases == "first" else None, other_bias if biases == "second" else None)
    zeros = torch.zeros_like(bias)
    y, partials = residual_add(h, other, *given)
    filled = residual_add(h, other, *(zeros if vector is None else vector for vector in given))
    assert torch.equal(y, filled[0])
    assert torch.equal(partials, filled[1])


@pytest.mark.parametrize("pad", [0, 1])
def test_nothing_outside_the_view_is_touched(pad):
    """A view into a wider, taller, deeper buffer with more channels: every value around it stays."""
    h, other, bias, other_bias = inputs("channels that fill no block", torch.float32)
    batch, channels, height, width = h.shape
    buffer = torch.full((batch + 2, height + pad + 2, width + pad + 2, channels + 5), 7.0)
    y = buffer.permute(0, 3, 1, 2)[1:-1, 2:-3, 1:-1, 1:-1]
    partials = residual.launch_into(y, h, other, bias, other_bias, pad)
    want = residual_add(h, other, bias, other_bias, pad)
    assert torch.equal(y, want[0])
    assert torch.equal(partials, want[1])
    y.fill_(7.0)
    assert (buffer == 7.0).all()


def test_strides_beyond_32_bits():
    """Images 2^31 values apart, in memory that is reserved and never filled: only the pages written exist."""
    h, other, bias, other_bias = inputs("one column: every pixel has the border beside", torch.bfloat16)
    h, other = h.expand(2, -1, -1, -1), other.expand(2, -1, -1, -1)
    if h.device.type != "cpu":
        pytest.skip("reserves memory without filling it, which a GPU does not")
    step = 2**31 + 5
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(step + 9 * 48, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    y = memory.as_strided((2, 48, 9, 1), (step, 1, 48, 48))
    residual.launch_into(y, h, other, bias, other_bias)
    assert torch.equal(y, residual_add(h, other, bias, other_bias)[0])


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_torch(dtype, pad):
    given = inputs("channels that fill no block", dtype)

    def gradients(function, values, dy):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        return torch.autograd.grad(function(*leaves), leaves, dy)

    def padded(*values):
        return F.pad(eager(*values), (0, pad, 0, pad))

    dy = torch.randn(padded(*given).shape).to(dtype)
    ours = gradients(lambda *values: residual_add(*values, pad)[0], given, dy)
    plain = gradients(padded, given, dy)
    truth = gradients(padded, [value.double() for value in given], dy.double())
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(one, other, true)


def test_only_required_gradients_are_computed():
    h, other, bias, _ = inputs("channels that fill no block", torch.float32)
    bias.requires_grad_()
    y, partials = residual_add(h, other, bias)
    assert not partials.requires_grad
    (dbias,) = torch.autograd.grad(y.sum(), bias)
    assert torch.equal(dbias, torch.full_like(dbias, h.numel() / len(bias)))


def test_strides_of_inputs_and_the_batch_change_no_bit():
    h, other, bias, other_bias = inputs("channels that fill no block", torch.float32)
    want = residual_add(h, other, bias, other_bias)
    inverse = h.contiguous(memory_format=torch.channels_last), other.transpose(2, 3).contiguous().transpose(2, 3)
    vectors = torch.stack([bias, other_bias], 1).unbind(1)
    for one, two in zip(residual_add(*inverse, *vectors), want, strict=True):
        assert torch.equal(one, two)
    for row in range(2):
        for alone, together in zip(
            residual_add(h[row : row + 1], other[row : row + 1], bias, other_bias), want, strict=True
        ):
            assert torch.equal(alone[0], together[row])


def test_op_and_launcher_give_the_same_bits():
    given = inputs("channels that fill no block", torch.float32)
    for one, other in zip(residual_add(*given, 1), residual.launch(*given, 1), strict=True):
        assert torch.equal(one, other)


def image(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: residual_add(image(2, 8, 3, 3), image(2, 8, 3, 4)),
            r"residual must be as h, .*\(2, 8, 3, 3\), got .*\(2, 8, 3, 4\)",
        ),
        (
            lambda: residual_add(image(2, 8, 3, 3), image(2, 8, 3, 3).half()),
            "residual must be as h, torch.float32 .* got torch.float16",
        ),
        (lambda: residual_add(image(8, 3, 3), image(8, 3, 3)), r"h must be \[N, C, H, W\]"),
        (
            lambda: residual_add(image(1, 8, 3, 3), image(1, 8, 3, 3), image(7)),
            "bias must have one value for each of 8 channels",
        ),
        (
            lambda: residual_add(image(1, 8, 3, 3), image(1, 8, 3, 3), None, image(7)),
            "residual_bias must have one value",
        ),
        (lambda: residual_add(image(1, 8, 3, 3), image(1, 8, 3, 3), pad=2), "pad must be 0 or 1, got 2"),
        (
            lambda: residual.launch_into(image(1, 8, 3, 3), image(1, 8, 3, 3), image(1, 8, 3, 3), None, None),
            "y must be .* with stride 1 between",
        ),
    ],
)
def test_other_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_opcheck_and_one_graph():
    h, other, bias, other_bias = (
        value[:, :16] if value.ndim == 4 else value[:16]
        for value in inputs("channels that fill no block", torch.float32)
    )
    leaves = [value.contiguous().requires_grad_() for value in (h, other, bias, other_bias)]
    torch.library.opcheck(residual_add, (*leaves, 1))
    compiled = torch.compile(residual_add, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for one, two in zip(compiled(*leaves, 1), residual_add(*leaves, 1), strict=True):
            assert torch.equal(one, two)


def test_a_scaled_stream_keeps_its_bits():
    """Inputs stored times a power of two: the sum is too, to the last bit."""
    h, shortcut, bias, residual_bias = torch.randn(2, 24, 5, 6), torch.randn(2, 24, 5, 6), *torch.randn(2, 24)
    plain, plain_partials = residual_add(h, shortcut, bias, residual_bias)
    ours, partials = residual_add(h / 64, shortcut / 64, bias, residual_bias, 0, 1 / 64)
    assert torch.equal(ours * 64, plain)
    assert torch.equal(partials[:, :, 1] * 64, plain_partials[:, :, 1])
    reference, _ = residual.reference(h / 64, shortcut / 64, bias, residual_bias, 0, 1 / 64)
    assert torch.equal(reference * 64, residual.reference(h, shortcut, bias, residual_bias)[0])
