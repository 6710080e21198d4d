"""Each op at the shapes of the autoencoder: first whether it is right, then how fast, beside eager torch.

    python -m pytest bench/test_ops.py --results FILE [--dry] [-k OP]

No wrong result has a time: the gate stands in the same test, before the first measurement, by the derived tolerance of
tests/accuracy.py. Ours and eager (channels_last and NCHW) take turns in one process; medians of all rounds.
"""

from __future__ import annotations

import math

import cases
import pytest
import torch
from accuracy import assert_as_accurate  # pyright: ignore[reportMissingImports]  (tests/ is on the path of pytest)
from fastvae_kernels import philox, posterior
from stopwatch import CLOCK, median, spread

# From here on a truth in float64 would take longer than the measurement; fp32 takes its place.
MOST_FLOPS_IN_FLOAT64 = 10**12
GENERATOR_COUNTS = (16_384, 131_072, 270_336, 270_337, 8_388_608)


def tensors_of(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def truth_dtype(inputs: tuple, flops: int, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float64
    torch.cuda.empty_cache()  # what the cases before left cached counts as free
    elements = sum(value.numel() for value in inputs)
    # A dozen float64 tensors of that size lie in memory at once.
    fits = 12 * 8 * elements < torch.cuda.mem_get_info(device)[0]
    return torch.float64 if fits and flops <= MOST_FLOPS_IN_FLOAT64 else torch.float32


def check(operation: cases.Operation, inputs: tuple, wide: torch.dtype) -> None:
    """Raise AssertionError unless ours is as accurate as plain torch in the same dtype."""
    plain = operation.plain or operation.eager
    ours = tensors_of(operation.ours(*inputs)())
    same = tensors_of(plain(*inputs)())
    # A truth in fp32 must be fp32: cuDNN would take tf32.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
        truth = tensors_of((operation.truth or plain)(*cases.widened(inputs, wide))())
    for mine, theirs, true in zip(ours, same, truth, strict=True):
        assert_as_accurate(mine, theirs.to(mine.dtype), true.double())


def input_sets(inputs: tuple, layout: str | None, device: torch.device) -> list[tuple]:
    """As many copies as together exceed the L2 cache three times, at least two, so that no input is found there."""
    size = sum(value.numel() * value.element_size() for value in inputs)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return [cases.copied(inputs, layout) for _ in range(min(64, max(2, math.ceil(3 * cache / size))))]


@pytest.mark.benchmark(timer=CLOCK.now)
def test_op(case, device, roof, stopwatch, results, benchmark):
    torch.manual_seed(0)
    operation = cases.OPERATIONS[case.op]
    inputs = operation.make(case, device)
    cost = operation.cost(*inputs)
    wide = truth_dtype(inputs, cost.flops, device)
    check(operation, inputs, wide)
    # Where nothing has four axes there is one layout.
    layouts = ("NHWC", "NCHW") if inputs[0].ndim == 4 else ("contiguous",)
    calls = {"ours": [operation.ours(*values) for values in input_sets(inputs, None, device)]}
    for layout in layouts:
        sets = input_sets(inputs, layout if layout in cases.FORMATS else None, device)
        calls[f"eager {layout}"] = [operation.eager(*values) for values in sets]
    stopwatch.warm_up(calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def one_round():
        for name, taken in stopwatch.one_round().items():
            seconds[name].append(taken)
        # pytest-benchmark reads this clock before and after: its own figures are then the device's.
        CLOCK.advance(seconds["ours"][-1])

    benchmark.pedantic(one_round, rounds=stopwatch.rounds)
    medians = {name: median(taken) for name, taken in seconds.items()}
    work = cost.bytes if operation.bound == "bytes" else cost.flops
    rate = work / medians["ours"]
    best = roof["bytes"] if operation.bound == "bytes" else roof[case.dtype]
    results["cases"][case.name] = {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "layout": case.layout,
        "gate": str(wide).removeprefix("torch."), "bytes": cost.bytes, "flops": cost.flops,
        "unit": "TB/s" if operation.bound == "bytes" else "TFLOP/s", "rate": rate, "share_of_roof": rate / best,
        "median_seconds": medians, "spread": {name: spread(taken) for name, taken in seconds.items()},
        "times_eager": {name.split()[1]: medians[name] / medians["ours"] for name in medians if name != "ours"},
        "host_seconds": stopwatch.host_seconds["ours"], "input_sets": len(calls["ours"]), "seconds": seconds,
    }  # fmt: skip
    benchmark.extra_info.update(rate=rate, share_of_roof=rate / best)


def drawn_eagerly(moments: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """diffusers' DiagonalGaussianDistribution.sample."""
    mean, logvar = torch.chunk(moments, 2, dim=1)
    std = torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0))
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", GENERATOR_COUNTS)
def test_generator_bits(count, dtype, device, results):
    """sample(generator=cuda): every bit of eager's, twice in a row, and the generator left where torch leaves it."""
    if device.type == "cpu":
        check_twin(min(count // 64, 1000), results)
        return
    torch.manual_seed(0)
    moments = torch.randn(1, 2, 1, count, device=device).to(dtype)
    properties = torch.cuda.get_device_properties(device)
    per_processor = properties.max_threads_per_multi_processor
    ours, theirs = (torch.Generator(device).manual_seed(2**63 + 11) for _ in range(2))
    different = 0
    for _ in range(2):
        seed, offset, threads = philox.reserve(ours, count, properties.multi_processor_count, per_processor)
        seeds, offsets = philox.seed_tensor([seed], device), torch.tensor([offset], device=device)
        mine = posterior.sample_posterior(moments, seeds, offsets, threads)
        different += int((mine != drawn_eagerly(moments, theirs)).sum())
    results["generator"][f"{count} {dtype}"] = {"elements": 2 * count, "different": different}
    assert different == 0, f"{different} of {2 * count} elements differ from eager's"
    assert ours.get_offset() == theirs.get_offset()


def check_twin(count: int, results: dict) -> None:
    """Without a CUDA generator to compare with: kernel and its twin in torch, to the normals' tolerance."""
    seeds, offsets = philox.seed_tensor([2**63 + 11]), torch.tensor([8])
    noise = posterior.sample_posterior(torch.zeros(1, 2, 1, count), seeds, offsets, 256).flatten()
    twin = philox.stream_normals(2**63 + 11, 8, count, 256)
    off = (noise - twin).abs().max().item()
    results["generator"][f"{count} twin"] = {"elements": count, "largest_difference": off}
    assert off <= 2e-6


def test_the_table_serves_every_op():
    """Every operation has a case, and a dry one."""
    for table in (cases.CASES, cases.DRY):
        assert {case.op for case in table} == set(cases.OPERATIONS)
    names = [case.name for case in cases.CASES]
    assert len(names) == len(set(names))
