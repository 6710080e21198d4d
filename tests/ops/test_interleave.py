"""upsample_interleave: with the four-tap weights an upsampling convolution, its statistics, no write outside."""

import pytest
import torch
import torch.nn.functional as F
from fastvae_kernels import interleave
from fastvae_kernels.group_norm import group_norm_statistics
from fastvae_kernels.interleave import upsample_interleave
from fastvae_kernels.shared import statistics
from fastvae_kernels.shared.runtime import tl, triton
from fastvae_kernels.upsample import four_tap_weights
from support.accuracy import assert_as_accurate
from support.upsampling import eager, random_input

pytestmark = pytest.mark.usefixtures("on_device")

# name: shape of x, channels of y
CASES = {
    "one pixel: all of its neighbours are padding": ((2, 8, 1, 1), 8),
    "one row": ((1, 8, 1, 5), 16),
    "one column": ((1, 8, 5, 1), 16),
    "odd sizes, channels that fill no block": ((2, 24, 5, 3), 80),
    "one channel, whose strides say nothing": ((1, 1, 4, 4), 1),
    "a tail of two pixels behind a whole chunk, rows across chunks": ((1, 8, 3, 43), 8),
    "a batch of none": ((0, 8, 4, 4), 8),
}
each_case = pytest.mark.parametrize("case", CASES)


def inputs(case, dtype=torch.float32):
    return random_input(*CASES[case], dtype)


def phases_of(x, weight):
    return F.conv2d(x, four_tap_weights(weight), padding=1)


@each_case
@pytest.mark.parametrize("dtype", statistics.DTYPES, ids=str)
def test_the_same_as_doubling_and_convolving(case, dtype):
    x, weight = inputs(case, dtype)
    y, partials = upsample_interleave(phases_of(x, weight))
    if x.shape[0] == 0:
        assert (y.shape, partials.shape) == ((0, 8, 8, 8), (0, 1, 3, 8))
        return
    assert_as_accurate(y, eager(x, weight), eager(x.double(), weight.double()))
    want, truth = group_norm_statistics(y), statistics.reference(y.double())
    assert torch.equal(partials[:, :, 0], want[:, :, 0])
    for part in (1, 2):
        assert_as_accurate(partials[:, :, part], want[:, :, part], truth[:, :, part])


@each_case
def test_exact_in_real_arithmetic(case):
    """Small integers: nothing is rounded, so every bit must be the same."""
    shape, channels = CASES[case]
    if shape[0] == 0:
        pytest.skip("a batch of none has no bits")
    x, weight = torch.randint(-8, 9, shape).float(), torch.randint(-8, 9, (channels, shape[1], 3, 3)).float()
    for compute in (upsample_interleave, interleave.reference):
        assert torch.equal(compute(phases_of(x, weight))[0], eager(x, weight))


def test_each_weight_of_each_phase():
    """One weight at a time: the phases and taps that it reaches, by the doubled pixels that it meets."""
    for line in range(3):
        for column in range(3):
            weight = torch.zeros(1, 1, 3, 3)
            weight[0, 0, line, column] = 1
            want = torch.zeros(2, 2, 2, 2)  # [phase of the row, of the column, tap of the row, of the column]
            # The result of doubled row o reads doubled row o + line - 1, pixel (o + line - 1) // 2. Phase p of a cell
            # between pixels -1 and 0 is row p - 1, and tap t is pixel t - 1.
            for p in range(2):
                for q in range(2):
                    want[p, q, (p + line - 2) // 2 + 1, (q + column - 2) // 2 + 1] = 1
            assert torch.equal(four_tap_weights(weight).view(2, 2, 2, 2), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_added_in_fp64(dtype):
    """1 + 2^-30 - 1 is lost when added in fp32."""
    weight = torch.zeros(1, 1, 3, 3, dtype=dtype)
    weight[0, 0, 1, :2] = torch.tensor([1, 2.0**-30])
    weight[0, 0, 2, 0] = -1
    # Added in either order: rows 1 and 2 of an even row's lower pixel, columns 0 and 1 of an odd column's left one.
    assert four_tap_weights(weight)[2, 0, 1, 0] == 2.0**-30
    assert four_tap_weights(weight.mT)[1, 0, 0, 1] == 2.0**-30


def test_the_batch_and_strides_change_no_bit():
    phases = phases_of(*inputs("odd sizes, channels that fill no block"))
    y, partials = upsample_interleave(phases)
    assert y.is_contiguous(memory_format=torch.channels_last)
    turned = phases.transpose(2, 3).contiguous().transpose(2, 3)
    assert all(map(torch.equal, upsample_interleave(turned), (y, partials)))
    for row in range(2):
        alone = upsample_interleave(phases[row : row + 1])
        assert all(map(torch.equal, alone, (y[row : row + 1], partials[row : row + 1])))


def test_nothing_outside_the_result_is_written(monkeypatch):
    """Memory before and behind both results keeps its values."""
    phases = phases_of(*inputs("odd sizes, channels that fill no block"))
    buffers = []

    def surrounded(values):
        buffers.append((torch.full((values.numel() + 512,), 7.0), values.numel()))
        return buffers[-1][0][256:-256].as_strided(values.shape, values.stride())

    image, partials = statistics.new_channels_last, statistics.new_partials
    monkeypatch.setattr(statistics, "new_channels_last", lambda *given, **named: surrounded(image(*given, **named)))
    monkeypatch.setattr(statistics, "new_partials", lambda x: surrounded(partials(x)))
    ours = interleave.launch(phases)
    assert all((memory[:256] == 7).all() and (memory[256 + count :] == 7).all() for memory, count in buffers)
    monkeypatch.undo()
    assert all(map(torch.equal, ours, upsample_interleave(phases)))


@triton.jit
def _place_kernel(place_ptr, line, column, across):
    tl.store(place_ptr, interleave.phase_of(line.to(tl.int64), column, across))


def test_addresses_beyond_32_bits():
    """Run on numbers alone, which need no memory."""
    line, column, across = 2**31 + 6, 2**20 + 5, 2**20
    place = torch.zeros(1, dtype=torch.int64)
    _place_kernel[(1,)](place, line, column, across)
    assert place.item() == ((2**30 + 3) * across + 2**19 + 3) * 4 + 2


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        (torch.zeros(1, 8, 4), r"phases must be \[N, C, H, W\]"),
        (torch.zeros(1, 6, 4, 4), r"phases must be \[N, 4 D, H \+ 1, W \+ 1\] .*got \(1, 6, 4, 4\)"),
        (torch.zeros(1, 8, 1, 4), r"with H, W of at least 1, got \(1, 8, 1, 4\)"),
        (torch.zeros(1, 8, 4, 1), r"with H, W of at least 1, got \(1, 8, 4, 1\)"),
        (torch.zeros(1, 8, 4, 4, dtype=torch.float64), "phases must be float32, float16 or bfloat16 on .*float64"),
    ],
)
def test_other_arguments_are_refused(phases, words):
    with pytest.raises(ValueError, match=words):
        upsample_interleave(phases)


def test_opcheck_and_one_graph():
    phases = phases_of(*inputs("one row"))
    torch.library.opcheck(upsample_interleave, (phases,))
    compiled = torch.compile(upsample_interleave, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(phases), upsample_interleave(phases)))
