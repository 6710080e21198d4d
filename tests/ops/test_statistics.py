"""Partial statistics: layout, merging, and addresses beyond 2^31 values."""

import pytest
import torch
from fastvae_kernels.group_norm import group_norm_statistics, launch_statistics
from fastvae_kernels.shared import statistics, tiles
from fastvae_kernels.shared.runtime import tl, triton
from support.accuracy import assert_as_accurate

pytestmark = pytest.mark.usefixtures("on_device")

CASES = {
    "one value: no deviation at all": (1, 8, 1, 1, 0.0, 1.0),
    "a tail of one pixel behind a whole chunk": (1, 8, 25, 41, 0.0, 1.0),
    "channels that fill no block": (2, 48, 5, 7, 0.0, 1.0),
    "two blocks of channels, the second ragged": (2, 80, 3, 5, 1.0, 1.0),
    "many channels, several chunks": (1, 1024, 5, 8, 0.0, 1.0),
    "mean a thousand times the deviation": (2, 8, 19, 20, 1000.0, 1.0),
    "huge values": (1, 96, 6, 6, 0.0, 1e4),
    "tiny values": (1, 8, 6, 6, 0.0, 1e-4),
    "a batch of none": (0, 16, 4, 4, 0.0, 1.0),
}


@pytest.mark.parametrize("dtype", statistics.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_partials_are_as_accurate_as_torch(case, dtype, monkeypatch):
    *shape, mean, deviation = CASES[case]
    x = (torch.randn(shape) * deviation + mean).to(dtype)
    ours, truth = group_norm_statistics(x), statistics.reference(x.double())
    # Half-precision values add up exactly in torch's order, so they are compared with the fp32 kernel on the same tile,
    # which decides the order of the sums.
    choose = tiles.choose
    monkeypatch.setattr(tiles, "choose", lambda op, **asked: choose(op, **asked | {"dtype": dtype}))
    plain = statistics.reference(x) if dtype == torch.float32 else group_norm_statistics(x.float())
    assert torch.equal(ours[:, :, 0].double(), truth[:, :, 0]), "counts are exact"
    for part in (1, 2):
        assert_as_accurate(ours[:, :, part], plain[:, :, part], truth[:, :, part])


@pytest.mark.parametrize("channels", [1, 3, 32, 48, 128, 512, 1024, 40_000])
def test_a_chunk_depends_on_the_channels_alone(channels):
    chunk = statistics.chunk_pixels(channels)
    assert chunk & (chunk - 1) == 0
    assert 32 <= chunk <= 256
    assert chunk * channels <= 65_536 or chunk == 32
    assert statistics.chunk_count(chunk, channels) == 1
    assert statistics.chunk_count(chunk + 1, channels) == 2


def test_strides_do_not_matter():
    x = torch.randn(2, 24, 9, 8)
    want = group_norm_statistics(x)
    wide = torch.randn(2, 24, 9, 16)
    wide[..., ::2] = x
    odd = torch.empty(x.numel() + 1)[1:].view(2, 9, 8, 24).permute(0, 3, 1, 2).copy_(x)
    for other in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(group_norm_statistics(other), want)
    if x.is_cuda:  # values not aligned to 16 bytes are read and added in another order
        assert_as_accurate(group_norm_statistics(odd), want, statistics.reference(x.double()))
    else:
        assert torch.equal(group_norm_statistics(odd), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_the_statistics(value):
    """The variance of a channel with such a value is not finite: GroupNorm's result must show it."""
    x = torch.randn(1, 16, 5, 40)
    x[0, 3, 2, 2] = value
    deviations = group_norm_statistics(x)[0, :, 2]
    assert not deviations[:, 3].isfinite().any()
    assert deviations[:, :3].isfinite().all()


def test_a_row_does_not_depend_on_its_batch():
    x = torch.randn(3, 24, 9, 8)
    together = group_norm_statistics(x)
    for row in range(3):
        assert torch.equal(group_norm_statistics(x[row : row + 1])[0], together[row])


def test_op_and_launcher_give_the_same_bits():
    x = torch.randn(2, 24, 9, 8)
    assert torch.equal(group_norm_statistics(x), launch_statistics(x))


@pytest.mark.parametrize("chunks", [1024, 1025, 4097])
def test_folding_keeps_the_statistics(chunks):
    """Chunks of unequal counts far from 0, the last of one pixel, unfolded, in one fold and in a longer one."""
    count = torch.randint(1, 9, (2, chunks, 1, 5)).float()
    count[:, -1] = 1
    mean, deviations = 300 + torch.randn(2, chunks, 1, 5), torch.rand(2, chunks, 1, 5)
    partials = torch.cat([count, mean, deviations], 2)
    folded, plain = statistics.fold_chunks(partials), partials
    while plain.shape[1] > statistics.MERGED:
        pieces = plain.split(statistics.FOLD, dim=1)
        plain = torch.cat([torch.stack(statistics.merged_reference(piece, (1,)), 2) for piece in pieces], 1)
    assert folded.shape == plain.shape
    merged = [statistics.merged_reference(part.double(), (1,)) for part in (folded, plain, partials)]
    for ours, eager, truth in zip(*merged, strict=True):
        assert_as_accurate(ours.float(), eager.float(), truth)


def test_partials_are_those_of_the_image_or_folded_from_them():
    """4,194,305 chunks, which fold to 65,537, 1025 and 17; no other number of chunks is this image's."""
    x = torch.empty(2, 2048, 32 * 4_194_305, 1, device="meta")
    for chunks in (4_194_305, 65_537, 1025, 17):
        statistics.check_partials(torch.empty(2, chunks, 3, 2048, device="meta"), x)
    for chunks in (0, 1, 16, 18, 1024, 65_536, 4_194_304, 4_194_306):
        with pytest.raises(ValueError, match=r"partials must be .* 4194305 or 65537 or 1025 or 17, 3, 2048\] for such"):
            statistics.check_partials(torch.empty(2, chunks, 3, 2048, device="meta"), x)
    few = torch.empty(2, 2048, 32 * 1000, 1, device="meta")
    with pytest.raises(ValueError, match="1000, 3, 2048"):  # folding leaves 1000 chunks as they are
        statistics.check_partials(torch.empty(2, 16, 3, 2048, device="meta"), few)


@triton.jit(do_not_specialize=["program", "chunks", "pixels"])
def _place_kernel(place_ptr, program, chunks, pixels, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    image, chunk, block = statistics.locate(program, chunks, 2)
    tl.store(place_ptr, image)
    tl.store(place_ptr + 1, chunk)
    tl.store(place_ptr + 2, block.to(tl.int64))
    tl.store(place_ptr + 3, statistics.first_value(image, pixels, chunk * CHUNK, CHANNELS))
    tl.store(place_ptr + 4, statistics.rows_inside(chunk, pixels, CHUNK).to(tl.int64))
    # An image counted in 32 bits would be stored correctly; its products would not.
    tl.store(place_ptr + 5, image * 65536 * 65536)


@pytest.mark.parametrize(
    ("image", "chunk", "pixels", "channels"),
    [(40_000, 3, 1000, 512), (0, 35_000_000, 35_000_000 * 128 + 5, 512), (1, 9, 2**40, 128), (7, 0, 1, 1024)],
    ids=["many images", "one huge image", "pixels beyond 32 bits", "one pixel"],
)
def test_addresses_beyond_32_bits(image, chunk, pixels, channels):
    """The same helpers compute the offset of every load and store; run on numbers alone, they need no memory."""
    size = statistics.chunk_pixels(channels)
    chunks = min(statistics.chunk_count(pixels, channels), 2**30 - 1)
    place = torch.zeros(6, dtype=torch.int64)
    _place_kernel[(1,)](place, (image * chunks + chunk) * 2 + 1, chunks, pixels, CHANNELS=channels, CHUNK=size)
    rows = min(size, pixels - chunk * size)
    first = (image * pixels + chunk * size) * channels
    assert place.tolist() == [image, chunk, 1, first, rows, image * 2**32]


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 3, 4), torch.float32, r"x must be \[N, C, H, W\].*got shape \(2, 3, 4\)"),
        ((2, 3, 0, 4), torch.float32, r"x must be .* at least 1, got shape \(2, 3, 0, 4\)"),
        ((2, 3, 4, 4), torch.int32, "x must be float32, float16 or bfloat16, got torch.int32"),
        ((2, 3, 4, 4), torch.float64, "x must be float32, float16 or bfloat16 on .*, got torch.float64"),
    ],
)
def test_other_arguments_are_refused(shape, dtype, words):
    with pytest.raises(ValueError, match=words):
        group_norm_statistics(torch.zeros(shape, dtype=dtype))


def test_opcheck():
    for shape in ((2, 24, 5, 6), (0, 8, 2, 2)):
        torch.library.opcheck(group_norm_statistics, (torch.randn(shape),))
