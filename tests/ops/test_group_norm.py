"""GroupNorm in pieces and as one differentiable op, against float64."""

import pytest
import torch
import torch.nn.functional as F
from fastvae_kernels import group_norm, group_norm_silu
from fastvae_kernels.shared import runtime, statistics
from support.accuracy import assert_as_accurate
from support.thinned import thinned

pytestmark = pytest.mark.usefixtures("on_device")

EPS = 1e-6
# name: shape, groups, mean, deviation
CASES = {
    "two values per group, one pixel": ((9, 16, 1, 1), 8, 0.0, 1.0),
    "three channels per group, groups across blocks of a power of two": ((2, 48, 5, 7), 16, 0.0, 1.0),
    "five channels per group, two blocks of channels": ((1, 160, 3, 5), 32, 1.0, 1.0),
    "1024 channels": ((1, 1024, 1, 2), 32, 0.0, 1.0),
    "one group of all 96 channels": ((1, 96, 3, 3), 1, 0.0, 1.0),
    "a tail of one pixel behind a whole chunk": ((1, 8, 25, 41), 2, 0.0, 1.0),
    "mean a hundred times the deviation": ((2, 8, 9, 11), 2, 100.0, 1.0),
    "huge values, as the SDXL autoencoder has": ((1, 32, 6, 5), 8, 0.0, 1e4),
    "values so small that eps rules": ((1, 32, 6, 5), 8, 0.0, 1e-4),
    "a batch of none": ((0, 32, 4, 4), 8, 0.0, 1.0),
}
each_case = pytest.mark.parametrize(("case", "dtype"), thinned(CASES, statistics.DTYPES))


def inputs(case, dtype):
    shape, groups, mean, deviation = CASES[case]
    x = (torch.randn(shape) * deviation + mean).to(dtype)
    return x, torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype), groups


def double(*tensors):
    return tuple(tensor.double() for tensor in tensors)


def double_norm(x, groups, weight, bias):
    return F.group_norm(x.double(), groups, weight.double(), bias.double(), EPS)


@each_case
def test_the_pieces_together_are_group_norm(case, dtype):
    x, weight, bias, groups = inputs(case, dtype)
    scale, shift = group_norm.group_norm_affine(group_norm.group_norm_statistics(x), weight, bias, groups, EPS)
    eager, truth = F.group_norm(x, groups, weight, bias, EPS), double_norm(x, groups, weight, bias)
    assert_as_accurate(group_norm.scale_shift(x, scale, shift), eager, truth)
    half_of = group_norm.scale_shift_silu(x, scale, shift, 0.5)
    assert_as_accurate(half_of, F.silu(eager) * 0.5, F.silu(truth) * 0.5)


@each_case
def test_the_composite_is_as_accurate_as_torch(case, dtype):
    x, weight, bias, groups = inputs(case, dtype)
    eager = F.group_norm(x, groups, weight, bias, EPS)
    truth = double_norm(x, groups, weight, bias)
    assert_as_accurate(group_norm_silu.group_norm(x, weight, bias, groups, EPS), eager, truth)
    assert_as_accurate(group_norm_silu.group_norm_silu(x, weight, bias, groups, EPS), F.silu(eager), F.silu(truth))


def gradients(function, x, weight, bias, dy):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    return torch.autograd.grad(function(*leaves), leaves, dy)


# The full grid is 60 tests and 40 s under the interpreter: fp32 has the activation, bf16 has none.
@pytest.mark.parametrize(("case", "dtype"), thinned(CASES, [torch.float32, torch.bfloat16]))
def test_gradients_are_as_accurate_as_torch(case, dtype):
    check_gradients(case, dtype, silu=dtype == torch.float32)


def test_gradients_in_fp16_of_huge_values():
    check_gradients("huge values, as the SDXL autoencoder has", torch.float16, silu=True)


def check_gradients(case, dtype, silu):
    x, weight, bias, groups = inputs(case, dtype)
    dy = torch.randn(x.shape).to(dtype)
    op = group_norm_silu.group_norm_silu if silu else group_norm_silu.group_norm

    def eager(x, weight, bias):
        y = F.group_norm(x, groups, weight, bias, EPS)
        return F.silu(y) if silu else y

    ours = gradients(lambda *leaves: op(*leaves, groups, EPS), x, weight, bias, dy)
    plain = gradients(eager, x, weight, bias, dy)
    truth = gradients(eager, *double(x, weight, bias, dy))
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(one, other, true)


def test_the_convolutions_bias_folds_into_the_affine():
    """Statistics without the bias, and a bias far larger than the deviation: the result is the norm of the sum."""
    x, weight, bias, conv_bias = torch.randn(2, 24, 5, 6), torch.randn(24), torch.randn(24), 20 * torch.randn(24)
    scale, shift = group_norm.group_norm_affine(group_norm.group_norm_statistics(x), weight, bias, 8, EPS, conv_bias)
    eager = F.group_norm(x + conv_bias[:, None, None], 8, weight, bias, EPS)
    truth = double_norm(x.double() + conv_bias.double()[:, None, None], 8, weight, bias)
    assert_as_accurate(group_norm.scale_shift(x, scale, shift), eager, truth)


@pytest.mark.parametrize(
    ("dtype", "shape", "groups"),
    [(torch.float32, (2, 48, 5, 7), 16), (torch.bfloat16, (3, 96, 9, 5), 1)],
    ids=["fp32, three channels a group", "bf16, one group"],
)
def test_the_gradient_of_the_convolutions_bias_comes_with_the_norms(dtype, shape, groups):
    """A bias larger than the deviation, given to the norm or added before it."""
    x, dy = torch.randn(2, *shape).to(dtype).unbind()
    vectors = [torch.randn(shape[1]).to(dtype) for _ in range(2)] + [(3 * torch.randn(shape[1])).to(dtype)]

    def fused(x, weight, bias, conv_bias):
        partials = group_norm.group_norm_statistics(x.detach())
        return group_norm_silu.group_norm_silu(x, weight, bias, groups, EPS, partials, conv_bias)

    def eager(x, weight, bias, conv_bias):
        return F.silu(F.group_norm(x + conv_bias[:, None, None], groups, weight, bias, EPS))

    found = []
    for function, wide in ((fused, dtype), (eager, dtype), (eager, torch.float64)):
        leaves = [value.to(wide, copy=True).requires_grad_() for value in (x, *vectors)]
        y = function(*leaves)
        found.append((y, *torch.autograd.grad(y, leaves, dy.to(wide))))
    for ours, plain, truth in zip(*found, strict=True):
        assert_as_accurate(ours.detach(), plain.detach(), truth.detach())


def test_a_scaled_stream_gives_the_same_norm():
    """x stored times s: the same bits, because s is a power of two and eps is scaled too."""
    x, weight, bias, conv_bias = torch.randn(1, 24, 5, 6) / 300, torch.randn(24), torch.randn(24), torch.randn(24) / 300
    ys = []
    for factor in (1.0, 0.25):
        carried = x * factor
        partials = group_norm.group_norm_statistics(carried)
        affine = group_norm.group_norm_affine(partials, weight, bias, 8, EPS, conv_bias, factor)
        ys.append(group_norm.scale_shift(carried, *affine))
    assert torch.equal(*ys)


def test_many_chunks_fold_before_the_group(monkeypatch):
    """Folding two to one tests folding 64 to one, which would need an image of 2^21 values."""
    monkeypatch.setattr(statistics, "FOLD", 2)
    monkeypatch.setattr(statistics, "MERGED", 2)
    monkeypatch.setattr(statistics, "group_block", lambda per_group: (per_group, 1))  # more than one step for a group
    x, weight, bias, dy = torch.randn(2, 64, 50, 21) + 3, torch.randn(64), torch.randn(64), torch.randn(2, 64, 50, 21)
    partials = group_norm.group_norm_statistics(x)
    assert partials.shape[1] == 5, "three folds, with an odd chunk left in two of them"
    saved = group_norm_silu.moments_reference(x, 32, EPS, weight)
    ours = (
        *group_norm.group_norm_affine(partials, weight, bias, 32, EPS),
        *group_norm_silu.launch_backward(dy, x, weight, bias, *saved, True, weight),
    )
    plain, truth = (
        (
            *group_norm.affine_reference(partials.to(t), weight.to(t), bias.to(t), 32, EPS),
            *group_norm_silu.backward_reference(*(v.to(t) for v in (dy, x, weight, bias, *saved)), True, weight.to(t)),
        )
        for t in (torch.float32, torch.float64)
    )
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert_as_accurate(one, other, true)


def test_the_producers_statistics_replace_a_pass():
    x, weight, bias = torch.randn(2, 24, 5, 6), torch.randn(24), torch.randn(24)
    partials = group_norm.group_norm_statistics(x)
    want = group_norm_silu.group_norm_silu(x, weight, bias, 8, EPS)
    assert torch.equal(group_norm_silu.group_norm_silu(x, weight, bias, 8, EPS, partials), want)


def test_weights_may_be_wider_than_x():
    x, weight, bias = torch.randn(2, 24, 5, 6).bfloat16(), torch.randn(24), torch.randn(24)
    y = group_norm_silu.group_norm_silu(x, weight, bias, 8, EPS)
    eager = F.silu(F.group_norm(x.float(), 8, weight, bias, EPS)).bfloat16()
    assert_as_accurate(y, eager, group_norm_silu.reference(*double(x, weight, bias), 8, EPS))


def test_strides_do_not_matter_and_outputs_are_channels_last():
    x, weight, bias = torch.randn(2, 24, 5, 6), torch.randn(24), torch.randn(24)
    wide = torch.zeros(2, 24, 5, 12)
    wide[..., ::2] = x
    scale, shift = torch.randn(2, 24), torch.randn(24, 2).t()
    want = group_norm.scale_shift_silu(x, scale, shift), group_norm_silu.group_norm_silu(x, weight, bias, 8, EPS)
    for other in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(group_norm.scale_shift_silu(other, scale, shift), want[0])
        assert torch.equal(group_norm_silu.group_norm_silu(other, weight, bias, 8, EPS), want[1])
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in want)


def test_a_row_does_not_depend_on_its_batch():
    x, weight, bias, dy = torch.randn(3, 24, 9, 8), torch.randn(24), torch.randn(24), torch.randn(3, 24, 9, 8)

    def run(x, dy):
        leaf = x.clone().requires_grad_()
        y = group_norm_silu.group_norm_silu(leaf, weight, bias, 8, EPS)
        affine = group_norm.group_norm_affine(group_norm.group_norm_statistics(x), weight, bias, 8, EPS)
        return *affine, group_norm.scale_shift_silu(x, *affine), y.detach(), *torch.autograd.grad(y, leaf, dy)

    together = run(x, dy)
    for row in range(3):
        for alone, all_rows in zip(run(x[row : row + 1], dy[row : row + 1]), together, strict=True):
            assert torch.equal(alone[0], all_rows[row])


def test_op_and_launcher_give_the_same_bits():
    x, weight, bias = torch.randn(2, 24, 5, 6), torch.randn(24), torch.randn(24)
    partials = group_norm.group_norm_statistics(x)
    affine = group_norm.group_norm_affine(partials, weight, bias, 8, EPS, bias)
    for one, other in zip(affine, group_norm.launch_affine(partials, weight, bias, 8, EPS, bias), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(group_norm.scale_shift(x, *affine), group_norm.launch_scale_shift(x, *affine))
    ours = group_norm.scale_shift_silu(x, *affine, 2.0)
    assert torch.equal(ours, group_norm.launch_scale_shift_silu(x, *affine, 2.0))
    forward = group_norm_silu.group_norm_forward(x, weight, bias, 8, EPS, True)
    launched = group_norm_silu.launch_forward(x, weight, bias, 8, EPS, True)
    backward = group_norm_silu.group_norm_backward(x, x, weight, bias, *forward[1:], True)
    launched += group_norm_silu.launch_backward(x, x, weight, bias, *forward[1:], True)
    for one, other in zip((*forward, *backward), launched, strict=True):
        assert torch.equal(one, other)


def image():
    return torch.zeros(2, 24, 5, 6)


def row():
    return torch.zeros(2, 24)


def vector():
    return torch.zeros(24)


def partials():
    return torch.ones(2, 1, 3, 24)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: group_norm.group_norm_affine(partials(), vector(), vector(), 7, EPS),
            "groups must divide the 24 channels, got 7",
        ),
        (
            lambda: group_norm.group_norm_affine(partials(), vector()[1:], vector(), 8, EPS),
            r"weight must have .* 24 channels, got \(23,\)",
        ),
        (
            lambda: group_norm.group_norm_affine(partials(), vector(), vector(), 8, EPS, vector()[1:]),
            "conv_bias must have",
        ),
        (
            lambda: group_norm.group_norm_affine(partials()[0], vector(), vector(), 8, EPS),
            r"partials must be \[N, chunks, 3, C\]",
        ),
        (
            lambda: group_norm.scale_shift(image(), row()[:1], row()),
            r"scale must be \[N, C\] = \(2, 24\), got shape \(1, 24\)",
        ),
        (lambda: group_norm.scale_shift_silu(image(), row(), row().half()), "shift must be float32, got torch.float16"),
        (
            lambda: group_norm.scale_shift(image().double(), row().double(), row().double()),
            "x must be float32, float16 or bfloat16 on",
        ),
        (
            lambda: group_norm_silu.group_norm_silu(image(), vector(), vector(), 5, EPS),
            "groups must divide the 24 channels of x, got 5",
        ),
        (lambda: group_norm_silu.group_norm(image()[0], vector(), vector(), 8, EPS), r"x must be \[N, C, H, W\]"),
        (
            lambda: group_norm_silu.group_norm(image(), vector(), vector()[1:], 8, EPS),
            "bias must have one value for each of 24",
        ),
        (
            lambda: group_norm_silu.group_norm_silu(image(), vector(), vector(), 8, EPS, None, vector()[1:]),
            "conv_bias must have one value for each of 24",
        ),
    ],
)
def test_other_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_opcheck():
    x, weight, bias = torch.randn(2, 16, 3, 4), torch.randn(16), torch.randn(16)
    affine = torch.randn(2, 16), torch.randn(2, 16)
    torch.library.opcheck(group_norm.group_norm_affine, (statistics.reference(x), weight, bias, 8, EPS, bias))
    torch.library.opcheck(group_norm.scale_shift, (x, *affine))
    torch.library.opcheck(group_norm.scale_shift_silu, (x, *affine, 0.5))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(group_norm_silu.group_norm_forward, (*leaves, 8, EPS, True, None, bias))
    moments = torch.randn(2, 8), torch.rand(2, 8)
    plain = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(group_norm_silu.group_norm_backward, (plain[0], *plain, *moments, True))
    torch.library.opcheck(group_norm_silu.group_norm_backward, (plain[0], *plain, *moments, True, plain[1]))


def test_compiles_as_one_graph():
    x, weight, bias = torch.randn(2, 16, 3, 4), torch.randn(16), torch.randn(16)

    def block(x):
        affine = group_norm.group_norm_affine(group_norm.group_norm_statistics(x), weight, bias, 8, EPS)
        return group_norm_silu.group_norm_silu(group_norm.scale_shift_silu(x, *affine), weight, bias, 8, EPS)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), block(x))
    y = torch.randn(1, 16, 7, 5)
    assert torch.equal(compiled(y), block(y))


@pytest.mark.skipif(not runtime.INTERPRETED, reason="one program alone is launched on the CPU")
def test_a_group_writes_its_own_channels_alone():
    """One program runs: the next one would repair what this one overwrites; on a GPU that is a race."""
    channels, groups = 24, 8
    partials = group_norm.group_norm_statistics(torch.randn(1, channels, 4, 4))
    scale, shift = (torch.full((1, channels), 7.0) for _ in range(2))
    columns, step = statistics.group_block(channels // groups)
    vector = torch.ones(channels)
    group_norm._affine_kernel[(1,)](
        partials, vector, vector, None, scale, shift, partials.shape[1], 1e-6, 1.0,
        CHANNELS=channels, GROUPS=groups, COLUMNS=columns, STEP=step, num_warps=1, num_stages=1,
    )  # fmt: skip
    for values in (scale, shift):
        assert torch.equal(values[0, 3:], torch.full((channels - 3,), 7.0))
        assert (values[0, :3] != 7.0).all()
