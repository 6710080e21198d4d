"""Philox4x32-10: counter-based random numbers, so that an element of noise depends on its seed and index alone.

Counter and key have the layout of torch's CUDA generator: key = seed, counter = (offset / 4, element).
A normal is sqrt(-2 ln u) * sin v, with u and v from the first two of the four words that a counter gives.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11; curand's Box-Muller transform.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastvae_kernels.shared.runtime import backend, libdevice, tl, triton

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
# curand's 2 pi, in fp32.
TURN = torch.tensor(2.0 * math.pi, dtype=torch.float32, device="cpu").item()

_reserving = threading.Lock()
_ROUNDS = tl.constexpr(ROUNDS)
_MULTIPLIER0, _MULTIPLIER1 = (tl.constexpr(value) for value in MULTIPLIERS)
_KEY_STEP0, _KEY_STEP1 = (tl.constexpr(value) for value in KEY_STEPS)
_UNIT = tl.constexpr(2.0**-32)
_TURN = tl.constexpr(TURN * 2.0**-32)


def words(key: Tensor, counter: Tensor) -> Tensor:
    """Return the four 32-bit words that each counter gives under its key, as int64 in [0, 2^32).

    key [..., 2] and counter [..., 4] hold 32-bit words as int64, lowest first, and broadcast; the result is [..., 4].
    """
    k0, k1 = key.unbind(-1)
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(ROUNDS):
        # The 64-bit product wraps in int64; its bits are correct.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & WORD) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> 32 & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def normals(seeds: Sequence[int] | Tensor, count: int, offset: int = 0) -> Tensor:
    """Return ``count`` standard normals for each seed, fp32 [len(seeds), count], on the CPU.

    seeds: unsigned 64-bit integers (a tensor of int64 holds them by their bits). offset: the generator's, a multiple
    of 4. Raises ValueError for a seed outside [0, 2^64) or another offset.
    """
    _check_offset(offset)
    element = torch.arange(count, dtype=torch.int64, device="cpu")
    counter = _counter(torch.tensor(offset // 4, device="cpu"), element)
    # One row at a time: the bits of a row then cannot depend on the others, and the memory is that of one row.
    rows = [_normal(words(split_seed(seed), counter)) for seed in seed_list(seeds)]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float32, device="cpu")


def stream_normals(seed: int, offset: int, count: int, threads: int) -> Tensor:
    """Return the numbers that torch.randn(count) draws on a GPU from a generator at (seed, offset), fp32 [count], CPU.

    threads: the number of threads of that launch (stream_threads). Element i comes from iteration i // (4 threads) of
    thread i % threads: its lane of four, (i % (4 threads)) // threads, takes one of two pairs of words, and sine or
    cosine. Raises ValueError for an offset that is no multiple of 4.
    """
    _check_offset(offset)
    element = torch.arange(count, dtype=torch.int64, device="cpu")
    lane = element % (4 * threads) // threads
    drawn = words(split_seed(seed), _counter(offset // 4 + element // (4 * threads), element % threads))
    pair = torch.where((lane >= 2)[:, None], drawn[:, 2:], drawn[:, :2])
    return _normal(pair, cosine=lane % 2 == 1)


def normals_like(values: Tensor, seeds: Tensor, offsets: Tensor | None = None, threads: int = 0) -> Tensor:
    """Return what draw_normal gives each element of values [N, ...], in their shape, dtype and device.

    seeds, offsets: int64 [N], the seeds by their bits; or [1] where one stream runs through the whole batch.
    """
    if offsets is None:
        noise = normals(seeds, values.shape[1:].numel())
    else:
        count = values.numel() // max(len(seeds), 1)
        drawn = zip(seed_list(seeds), offsets.tolist(), strict=True)
        rows = [stream_normals(seed, offset, count, threads) for seed, offset in drawn]
        noise = torch.cat(rows) if rows else torch.empty(0, dtype=torch.float32, device="cpu")
    return noise.reshape(values.shape).to(values.device, values.dtype)


def _check_offset(offset: int) -> None:
    if offset < 0 or offset % 4:
        raise ValueError(f"offset must be a multiple of 4 and not negative, got {offset}")


def _counter(step: Tensor, element: Tensor) -> Tensor:
    return torch.stack(
        torch.broadcast_tensors(step & WORD, step >> 32 & WORD, element & WORD, element >> 32 & WORD), dim=-1
    )


def _normal(drawn: Tensor, cosine: Tensor | None = None) -> Tensor:
    u = drawn[..., 0].float() * 2.0**-32 + 2.0**-33
    # In double, then rounded, as a fused multiply-add rounds. ln and sin in double as well: torch's fp32 ones differ
    # between the body of a vector loop and its tail.
    step = TURN * 2.0**-32
    v = (drawn[..., 1].float().double() * step + step / 2).float().double()
    turned = v.sin() if cosine is None else torch.where(cosine, v.cos(), v.sin())
    return ((-2.0 * u.double().log()).sqrt() * turned).float()


def split_seed(seed: int) -> Tensor:
    """Return the key of a seed: its two 32-bit words, lowest first, int64 [2]."""
    return torch.tensor([seed & WORD, seed >> 32], device="cpu")


def seed_list(seeds: Sequence[int] | Tensor) -> list[int]:
    """Return seeds as unsigned Python integers. Raises ValueError for one outside [0, 2^64) or no integer."""
    if isinstance(seeds, Tensor):
        return [int(seed) & 2**64 - 1 for seed in _seed_bits(seeds).tolist()]
    if not isinstance(seeds, Iterable):
        raise ValueError(f"seeds must be a list of integers or a vector, got {seeds!r}")
    seeds = list(seeds)
    for seed in seeds:
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**64:
            raise ValueError(f"seeds must be integers from 0 to 2^64 - 1, got {seed!r}")
    return [int(seed) for seed in seeds]


def stream_threads(count: int, processors: int, threads_per_processor: int) -> int:
    """Return the number of threads that torch launches for ``count`` normals on a GPU of so many multiprocessors."""
    return 256 * min(-(-count // 256), processors * (threads_per_processor // 256))


def reserve(
    generator: torch.Generator, count: int, processors: int, threads_per_processor: int
) -> tuple[int, int, int]:
    """Return (seed, offset, threads) of a CUDA generator's next ``count`` normals, and advance it as randn does.

    processors, threads_per_processor: multi_processor_count and max_threads_per_multi_processor of its device. The
    seed is an unsigned 64-bit integer. Calls from several threads share no numbers; a torch.randn on the same generator
    in another thread may fall between the reading of the offset and its advance, and draw the same ones.
    Source: ATen/native/cuda/DistributionTemplates.h, calc_execution_policy.
    """
    # At least one block: an empty batch draws nothing, but its number of threads must not be 0.
    threads = stream_threads(max(count, 1), processors, threads_per_processor)
    with _reserving:
        seed, offset = generator.initial_seed(), generator.get_offset()
        if count:
            generator.set_offset(offset + ((count - 1) // (4 * threads) + 1) * 4)
    return seed & 2**64 - 1, offset, threads


def seed_tensor(seeds: Sequence[int] | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return seeds, unsigned 64-bit integers, as the int64 tensor of their bits. Raises ValueError for others.

    A tensor on a GPU is not read, so the host does not wait.
    """
    if isinstance(seeds, Tensor):
        return _seed_bits(seeds).to(device)
    return int64_tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seed_list(seeds)], device)


def int64_tensor(values: Sequence[int], device: torch.device | str) -> Tensor:
    """Return integers as int64 [len(values)]; for a GPU without the wait of torch.tensor."""
    # A copy from pageable memory has read its source when it returns, even if the device has not begun it.
    held = torch.tensor(values, dtype=torch.int64, device="cpu")
    return held.to(device, non_blocking=torch.device(device).type == "cuda")


def _seed_bits(seeds: Tensor) -> Tensor:
    if seeds.ndim != 1 or seeds.is_floating_point() or seeds.dtype == torch.bool:
        raise ValueError(f"seeds must be a vector of integers, got {seeds.dtype} of shape {tuple(seeds.shape)}")
    return seeds.view(torch.int64) if seeds.dtype == torch.uint64 else seeds.to(torch.int64)


@triton.jit
def draw_words(seed, step, element):
    """Return the four words, uint32, of counter (step, element) under the key seed; all three are int64 bits."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = step.to(tl.uint32), (step >> 32).to(tl.uint32)
    c2, c3 = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = tl.umulhi(c0, _MULTIPLIER0), tl.mul(c0, _MULTIPLIER0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, _MULTIPLIER1), tl.mul(c2, _MULTIPLIER1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, _KEY_STEP0, sanitize_overflow=False)
        k1 = tl.add(k1, _KEY_STEP1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def normal_sine(word0, word1):
    """Return the normal that curand makes of two words with the sine, fp32."""
    return _radius(word0) * _sine(_angle(word1))


@triton.jit
def normal_cosine(word0, word1):
    """Return the normal that curand makes of two words with the cosine, fp32."""
    return _radius(word0) * _cosine(_angle(word1))


@triton.jit
def draw_normal(seeds_ptr, offsets_ptr, row, element, size, threads, seeds_step, STREAM: tl.constexpr):
    """Return the normals of elements (int64 logical indices) of a row of ``size``, by the row's seed or from a stream.

    seeds_step is 0 where one stream runs through the whole batch, and 1 where every row has its own.
    """
    seed = tl.load(seeds_ptr + row * seeds_step)
    if STREAM:
        step = tl.load(offsets_ptr + row * seeds_step) // 4
        element += row * size * (1 - seeds_step)
        threads = tl.cast(threads, tl.int64)
        lane = element % (4 * threads) // threads
        word0, word1, word2, word3 = draw_words(seed, step + element // (4 * threads), element % threads)
        word0, word1 = tl.where(lane >= 2, word2, word0), tl.where(lane >= 2, word3, word1)
        noise = tl.where(lane % 2 == 1, normal_cosine(word0, word1), normal_sine(word0, word1))
    else:
        word0, word1, _, _ = draw_words(seed, tl.zeros_like(seed), element)
        noise = normal_sine(word0, word1)
    return noise


@triton.jit
def _radius(word):
    u = tl.fma(word.to(tl.float32), _UNIT, _UNIT / 2)  # the product is exact: fused or not, the same bits
    return tl.sqrt_rn(-2.0 * _log(u))


@triton.jit
def _angle(word):
    if backend() == "interpreter":
        # The interpreter's fma rounds twice; 1 ulp at 2 pi is 4.8e-7, and the tail of the normal multiplies it by 5.
        angle = (word.to(tl.float32).to(tl.float64) * _TURN + _TURN / 2).to(tl.float32)
    else:
        angle = tl.fma(word.to(tl.float32), _TURN, _TURN / 2)
    return angle


# As in curand: the library's logarithm, the fast sine and cosine. The interpreter refuses both kinds of call.
@triton.jit
def _log(x):
    return libdevice.log(x) if backend() == "cuda" else tl.log(x)


@triton.jit
def _sine(x):
    return (
        tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        if backend() == "cuda"
        else tl.sin(x)
    )


@triton.jit
def _cosine(x):
    return (
        tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        if backend() == "cuda"
        else tl.cos(x)
    )
