"""upsample_conv: the folded form computes the same function, and each weight is folded correctly."""

import pytest
import torch
from fastvae_kernels import upsample
from fastvae_kernels.shared import statistics
from fastvae_kernels.upsample import fold_upsample_weights, upsample_conv
from support.accuracy import assert_as_accurate
from support.upsampling import eager, random_input

pytestmark = pytest.mark.usefixtures("on_device")

# name: shape of x, channels of y
CASES = {
    "one pixel: all of its neighbours are padding": ((2, 8, 1, 1), 8),
    "one row": ((1, 8, 1, 5), 16),
    "odd sizes, other channels": ((2, 24, 5, 3), 48),
    "one channel, whose strides say nothing": ((1, 1, 4, 4), 1),
    "a batch of none": ((0, 8, 4, 4), 8),
}
each_case = pytest.mark.parametrize("case", CASES)


def inputs(case, dtype):
    shape, channels = CASES[case]
    return *random_input(shape, channels, dtype), torch.randn(channels).to(dtype)


@each_case
@pytest.mark.parametrize("dtype", statistics.DTYPES, ids=str)
def test_the_same_as_doubling_and_convolving(case, dtype):
    x, weight, bias = inputs(case, dtype)
    if x.shape[0] == 0:
        assert upsample_conv(x, weight, bias).shape == (0, 8, 8, 8)
        return
    truth = [value.double() for value in (x, weight, bias)]
    assert_as_accurate(upsample_conv(x, weight, bias), eager(x, weight, bias), eager(*truth))
    assert_as_accurate(upsample_conv(x, weight), eager(x, weight, None), eager(*truth[:2], None))


@each_case
def test_exact_in_real_arithmetic(case):
    """Small integers: nothing is rounded, so every bit must be the same."""
    shape, channels = CASES[case]
    if shape[0] == 0:
        pytest.skip("a batch of none has no bits")
    x, weight = torch.randint(-8, 9, shape).float(), torch.randint(-8, 9, (channels, shape[1], 3, 3)).float()
    assert torch.equal(upsample_conv(x, weight), eager(x, weight, None))


def test_the_fold_row_by_row():
    """One weight at a time: the positions of each of the nine among the sixteen."""
    for line in range(3):
        for column in range(3):
            weight = torch.zeros(1, 1, 3, 3)
            weight[0, 0, line, column] = 1
            want = torch.zeros(4, 4)
            # Output o reads doubled pixel o + k - 1; by the transposed convolution it reads x at (o + 1 - u) / 2.
            for u in (2 - line, 3 - line):
                for v in (2 - column, 3 - column):
                    want[u, v] = 1
            assert torch.equal(fold_upsample_weights(weight)[0, 0], want)


def test_the_fold_adds_in_fp32():
    """1 + 2^-8 - 1 is lost when added in bfloat16."""
    weight = torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)
    weight[0, 0, 0, :2] = torch.tensor([1, 2.0**-8])
    weight[0, 0, 1, 0] = -1
    # In whichever order the rows and columns are added.
    assert fold_upsample_weights(weight)[0, 0, 2, 2] == 2.0**-8
    assert fold_upsample_weights(weight.mT)[0, 0, 2, 2] == 2.0**-8


@pytest.mark.parametrize("case", [name for name in CASES if "none" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_accurate_as_torch(case, dtype):
    given = inputs(case, dtype)
    dy = torch.randn(eager(*given).shape).to(dtype)

    def gradients(function, *values):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        return torch.autograd.grad(function(*leaves), leaves, dy.to(leaves[0].dtype))

    ours, plain = gradients(upsample_conv, *given), gradients(eager, *given)
    truth = gradients(eager, *(value.double() for value in given))
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(one, other, true)


def test_gradients_of_a_batch_of_none_are_zero():
    leaves = [value.requires_grad_() for value in inputs("a batch of none", torch.float32)]
    grads = torch.autograd.grad(upsample_conv(*leaves).sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert not any(grad.any() for grad in grads)


def test_launcher_strides_and_layout():
    x, weight, bias = inputs("odd sizes, other channels", torch.float32)
    want = upsample_conv(x, weight, bias)
    assert torch.equal(upsample.launch(x, fold_upsample_weights(weight), bias), want)
    assert torch.equal(upsample_conv(x.contiguous(memory_format=torch.channels_last), weight, bias), want)
    assert want.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: upsample_conv(torch.zeros(1, 8, 4), torch.zeros(8, 8, 3, 3)), r"x must be \[N, C, H, W\]"),
        (
            lambda: upsample_conv(torch.zeros(1, 8, 4, 4), torch.zeros(8, 7, 3, 3)),
            r"weight must be torch.float32 \[D, 8, 3, 3\]",
        ),
        (lambda: upsample_conv(torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3).half()), "got torch.float16 of shape"),
        (
            lambda: upsample_conv(torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 3, 3), torch.zeros(7)),
            "bias must have one value",
        ),
    ],
)
def test_other_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_opcheck_and_one_graph():
    leaves = [value.requires_grad_() for value in inputs("odd sizes, other channels", torch.float32)]
    torch.library.opcheck(upsample_conv, tuple(leaves))
    torch.library.opcheck(upsample_conv, (*leaves[:2], None))
    compiled = torch.compile(upsample_conv, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), upsample_conv(*leaves))
