"""Offsets that the sampler and the divergence read and write at, beyond 32 bits too."""

import pytest
import torch
from fastvae_kernels import divergence
from fastvae_kernels.parts import moments
from fastvae_kernels.shared import philox
from fastvae_kernels.shared.runtime import tl, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("NCHW", "NHWC")
# The fast sine of a GPU is off by a little more than numpy's.
NOISE_TOLERANCE = 2e-6 if DEVICE == "cpu" else 1e-5


@triton.jit(do_not_specialize=["program", "pixels"])
def _latents_kernel(
    scalar_ptr, place_ptr, program, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    row, size, inside, element, latent_place, mean_place, logvar_place = moments.locate_latents(
        program, pixels, CHANNELS, CHANNELS_LAST, BLOCK
    )
    # A row counted in 32 bits would be stored correctly; its products would not.
    tl.store(scalar_ptr, row * 65536 * 65536)
    tl.store(scalar_ptr + 1, size)
    place_ptr += tl.arange(0, BLOCK)
    tl.store(place_ptr, inside.to(tl.int64))
    tl.store(place_ptr + BLOCK, element)
    tl.store(place_ptr + 2 * BLOCK, latent_place)
    tl.store(place_ptr + 3 * BLOCK, mean_place)
    tl.store(place_ptr + 4 * BLOCK, logvar_place)


# row, block of the row, pixels and channels of the latents; programs are counted in 32 bits, as Triton counts them
BEYOND = {
    "many rows": (70_000, 1, 128 * 128, 16),
    "one huge row": (0, 2**21 + 3, 2**27 + 1, 17),
    "pixels beyond 32 bits": (0, 2**30, 2**40 + 1, 4),
    "a size just under 32 bits": (2, 2**21 - 1, 2**31 - 1, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BEYOND)
def test_latents_beyond_32_bits(case, form):
    """One helper computes the offset of every load and store; run on numbers alone, it needs no memory."""
    row, block, pixels, channels = BEYOND[case]
    size = pixels * channels
    program = row * -(-size // moments.BLOCK) + block
    scalar, place = torch.zeros(2, dtype=torch.int64), torch.zeros(5, moments.BLOCK, dtype=torch.int64)
    scalar, place = scalar.to(DEVICE), place.to(DEVICE)
    _latents_kernel[(1,)](
        scalar, place, program, pixels, CHANNELS=channels, CHANNELS_LAST=form == "NHWC", BLOCK=moments.BLOCK
    )
    assert scalar.tolist() == [row * 2**32, size]
    local = [block * moments.BLOCK + i for i in range(moments.BLOCK)]
    pixel = [i // channels if form == "NHWC" else i % pixels for i in local]
    channel = [i % channels if form == "NHWC" else i // pixels for i in local]
    both = list(zip(pixel, channel, strict=True))
    mean = [row * size * 2 + (p * 2 * channels + c if form == "NHWC" else c * pixels + p) for p, c in both]
    to_logvar = channels if form == "NHWC" else size
    expected = [
        [int(i < size) for i in local],
        [c * pixels + p for p, c in both],
        [row * size + i for i in local],
        mean,
        [i + to_logvar for i in mean],
    ]
    assert place.tolist() == expected


@triton.jit(do_not_specialize=["program", "pixels"])
def _moments_kernel(place_ptr, program, pixels, CHANNELS: tl.constexpr, SPAN: tl.constexpr):
    row, size, start = moments.locate_moments(program, pixels, CHANNELS, SPAN)
    tl.store(place_ptr, row * 65536 * 65536)
    tl.store(place_ptr + 1, size)
    tl.store(place_ptr + 2, start)


@pytest.mark.parametrize("span", [divergence.CHUNK, moments.BLOCK], ids=["forward", "backward"])
@pytest.mark.parametrize("case", BEYOND)
def test_moments_beyond_32_bits(case, span):
    """The offsets of the divergence and its gradient."""
    row, block, pixels, channels = BEYOND[case]
    block = min(block, pixels * channels // span)
    place = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    program = row * -(-pixels * channels // span) + block
    _moments_kernel[(1,)](place, program, pixels, CHANNELS=channels, SPAN=span)
    assert place.tolist() == [row * 2**32, pixels * channels, block * span]


@triton.jit(do_not_specialize=["size", "threads", "seeds_step"])
def _normal_kernel(
    seeds_ptr, offsets_ptr, element_ptr, normal_ptr, size, threads, seeds_step, ROW: tl.constexpr, STREAM: tl.constexpr
):
    row, index = tl.full([], ROW, tl.int64), tl.arange(0, 4)
    element = tl.load(element_ptr + index)
    normal = philox.draw_normal(seeds_ptr, offsets_ptr, row, element, size, threads, seeds_step, STREAM)
    tl.store(normal_ptr + index, normal)


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_a_stream_beyond_32_bits(stream):
    """Element and step by all their bits: of a row of 2^33, of the third row of a batch with one stream."""
    size, threads, row, seed = 2**33, 270_336, 2 if stream else 0, 2**63 + 11
    element = torch.tensor([0, 2**32 + 5, 2**32 + 3 * threads + 7, 2**33 - 1])
    offset, normal = torch.tensor([8], device=DEVICE), torch.zeros(4, device=DEVICE)
    _normal_kernel[(1,)](
        philox.seed_tensor([seed], DEVICE),
        offset,
        element.to(DEVICE),
        normal,
        size,
        threads,
        int(not stream),
        ROW=row,
        STREAM=stream,
    )
    if stream:
        counted = element + row * size
        lane = counted % (4 * threads) // threads
        counter = philox._counter(2 + counted // (4 * threads), counted % threads)
        words = philox.words(philox.split_seed(seed), counter)
        pair = torch.where((lane >= 2)[:, None], words[:, 2:], words[:, :2])
        expected = philox._normal(pair, cosine=lane % 2 == 1)
    else:
        words = philox.words(philox.split_seed(seed), philox._counter(torch.tensor(0), element))
        expected = philox._normal(words[:, :2])
    assert (normal.cpu() - expected).abs().max() < NOISE_TOLERANCE
