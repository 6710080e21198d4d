"""The counter-based generator: the kernel against its twin, both against known answers, and tests of the noise."""

import importlib.util
import math

import pytest
import torch
from fastvae_kernels.shared import philox
from fastvae_kernels.shared.runtime import tl, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@triton.jit
def _words_kernel(seed_ptr, step_ptr, element_ptr, words_ptr, normal_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    seed = tl.load(seed_ptr + index, mask=inside)
    step = tl.load(step_ptr + index, mask=inside)
    element = tl.load(element_ptr + index, mask=inside)
    word0, word1, word2, word3 = philox.draw_words(seed, step, element)
    tl.store(words_ptr + index * 4, word0.to(tl.int64), mask=inside)
    tl.store(words_ptr + index * 4 + 1, word1.to(tl.int64), mask=inside)
    tl.store(words_ptr + index * 4 + 2, word2.to(tl.int64), mask=inside)
    tl.store(words_ptr + index * 4 + 3, word3.to(tl.int64), mask=inside)
    tl.store(normal_ptr + index * 2, philox.normal_sine(word0, word1), mask=inside)
    tl.store(normal_ptr + index * 2 + 1, philox.normal_cosine(word2, word3), mask=inside)


def _drawn(seed, step, element):
    words = torch.empty(len(seed), 4, dtype=torch.int64, device=DEVICE)
    normal = torch.empty(len(seed), 2, device=DEVICE)
    tensors = [values.to(DEVICE) for values in (seed, step, element)]
    _words_kernel[(triton.cdiv(len(seed), 65536),)](*tensors, words, normal, len(seed), BLOCK=65536)
    return words.cpu(), normal.cpu()


def _split(values):
    return values & philox.WORD, values >> 32 & philox.WORD


def _joined(low, high):
    joined = high << 32 | low
    return torch.tensor([joined - 2**64 if joined >= 2**63 else joined])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert philox.words(torch.tensor(key), torch.tensor(counter)).tolist() == answer
    words, _ = _drawn(_joined(*key), _joined(*counter[:2]), _joined(*counter[2:]))
    assert words[0].tolist() == answer


def test_a_million_counters_give_the_same_words_and_nearly_the_same_normals():
    """Every 32-bit word of seed, step and element at random: no half of any may be dropped."""
    generator = torch.Generator().manual_seed(1)
    seed, step, element = (torch.randint(-(2**63), 2**63 - 1, (10**6,), generator=generator) for _ in range(3))
    words, normal = _drawn(seed, step, element)
    twin = philox.words(torch.stack(_split(seed), -1), torch.stack([*_split(step), *_split(element)], -1))
    assert torch.equal(words, twin)
    # The fast sine of a GPU is off by 2^-21 on [-pi, pi] and a little more up to 2 pi.
    tolerance = 2e-6 if DEVICE == "cpu" else 1e-5
    assert (normal[:, 0] - philox._normal(twin[:, :2])).abs().max() < tolerance
    assert (normal[:, 1] - philox._normal(twin[:, 2:], cosine=torch.tensor(True))).abs().max() < tolerance


def test_the_first_numbers_of_seed_0():
    first = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    first += [-0.62285119, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]
    assert (philox.normals([0], 12)[0] - torch.tensor(first)).abs().max() < 2e-6


def test_a_row_depends_on_its_seed_alone():
    alone = philox.normals([2**64 - 1], 1000)
    assert torch.equal(philox.normals([5, 2**64 - 1, 7], 1000)[1], alone[0])
    assert torch.equal(philox.normals(torch.tensor([-1]), 1000), alone)
    assert torch.equal(philox.normals([2**64 - 1], 37)[0], alone[0, :37])


def test_the_stream_of_a_small_launch_is_that_of_the_seeds():
    """Up to as many elements as threads torch uses one lane, one iteration; the offset counts in steps of 4."""
    for offset in (0, 8, 4 * (2**32 + 5)):
        assert torch.equal(philox.stream_normals(9, offset, 700, 768), philox.normals([9], 700, offset)[0])


def test_the_stream_of_a_large_launch_takes_four_lanes_and_steps_on():
    threads, count = 256, 256 * 4 * 2 + 3
    stream = philox.stream_normals(3, 16, count, threads)
    thread, one = 17, torch.tensor([3, 0])
    for step in (0, 1):
        word = philox.words(one, torch.tensor([16 // 4 + step, 0, thread, 0]))
        for lane in range(4):
            u, v = (word[2 * (lane // 2) + i].item() * 2.0**-32 + 2.0**-33 for i in (0, 1))
            turned = math.cos(2 * math.pi * v) if lane % 2 else math.sin(2 * math.pi * v)
            expected = math.sqrt(-2 * math.log(u)) * turned
            assert abs(stream[step * 4 * threads + lane * threads + thread].item() - expected) < 3e-6


class _Generator:
    """The part of a CUDA generator that reserve uses."""

    def __init__(self, seed, offset):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


@pytest.mark.parametrize(
    ("count", "threads", "advance"),
    [
        (0, 256, 0),
        (1, 256, 4),
        (257, 512, 4),
        (270_336, 270_336, 4),
        (270_337, 270_336, 4),
        (4 * 270_336, 270_336, 4),
        (4 * 270_336 + 1, 270_336, 8),
        (8_388_608, 270_336, 32),
    ],
)
def test_reserve_advances_as_torch_does_on_132_multiprocessors(count, threads, advance):
    """Grid of ceil(count / 256) blocks, at most 132 * 2048 / 256; a thread makes four normals at a time."""
    generator = _Generator(-1, 40)
    assert philox.reserve(generator, count, 132, 2048) == (2**64 - 1, 40, threads)
    assert generator.offset == 40 + advance


def test_a_tensor_of_seeds_holds_their_bits():
    assert philox.seed_tensor([0, 2**63, 2**64 - 1]).tolist() == [0, -(2**63), -1]
    with pytest.raises(ValueError, match=r"seeds must be integers from 0 to 2\^64 - 1, got -1"):
        philox.seed_tensor([-1])


def test_a_default_device_or_dtype_of_torch_changes_no_draw():
    """The numbers are made on the CPU: under torch.device("meta") they would have no values."""

    def drawn():
        seeds, moments = philox.seed_tensor([3, 2**63]), torch.ones(2, 5, device="cpu", dtype=torch.float32)
        offsets = philox.int64_tensor([8, 4], "cpu")
        return [
            seeds, philox.normals([3], 40), philox.normals([], 4), philox.stream_normals(3, 8, 40, 256),
            philox.normals_like(moments, seeds), philox.normals_like(moments, seeds, offsets, 256),
        ]  # fmt: skip

    expected, dtype = drawn(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = drawn()
    finally:
        torch.set_default_dtype(dtype)
    assert all(map(torch.equal, found, expected))
    assert [values.dtype for values in found] == [values.dtype for values in expected]


def test_the_module_can_be_imported_under_another_default_device():
    specification = importlib.util.spec_from_file_location("philox_again", philox.__file__)
    again = importlib.util.module_from_spec(specification)
    with torch.device("meta"):
        specification.loader.exec_module(again)
    assert again.TURN == philox.TURN


COUNT = 200_000


@pytest.fixture(scope="module")
def noise():
    return philox.normals([11, 12], COUNT).double()


def test_noise_is_normal_by_kolmogorov_and_smirnov(noise):
    """The largest distance of the distributions exceeds 1.95 / sqrt(count) once in a thousand."""
    for row in noise:
        ordered = row.sort().values
        normal = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
        rank = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
        distance = torch.maximum((normal - rank[:-1]).abs().max(), (rank[1:] - normal).abs().max())
        assert distance < 1.95 / math.sqrt(COUNT)


def test_moments_to_the_fourth(noise):
    """Within four standard deviations of a mean of ``count`` powers: var(x^k) = E x^2k - (E x^k)^2."""
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (noise**power).mean(dim=1) - expected
        assert (error.abs() < 4 * math.sqrt(variance / COUNT)).all(), power


@pytest.mark.parametrize("neighbour", ["element", "second element", "seed", "step"])
def test_neighbours_are_uncorrelated(noise, neighbour):
    """A correlation of independent normals has a standard deviation of 1 / sqrt(count)."""
    other = {
        "element": noise[0].roll(1),
        "second element": noise[0].roll(2),
        "seed": noise[1],
        "step": philox.normals([11], COUNT, offset=4)[0].double(),
    }[neighbour]
    for left, right in ((noise[0], other), (noise[0].square() - 1, other.square() - 1)):
        correlation = (left * right).mean() / (left.std() * right.std())
        assert correlation.abs() < 4 / math.sqrt(COUNT)
