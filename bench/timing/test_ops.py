"""Times of each op at the shapes of the autoencoder beside eager torch, after a check of every result.

    python -m pytest bench/timing/test_ops.py --results FILE [--dry] [-k OP]

On a GPU and in a dry run ours is the kernel; on a CPU it is the reference. A wrong result has no time: the same test
checks it first, with the derived tolerance of tests/support/accuracy.py. Ours and eager (channels_last and NCHW) take
turns in one process; results are medians of all rounds.
"""

from __future__ import annotations

import pytest
import torch
from fastvae_kernels import posterior
from fastvae_kernels.shared import philox
from fastvae_kernels.shared.runtime import KERNEL_DEVICES

from bench.timing import cases
from bench.timing.gate import check, input_sets, truth_dtype
from bench.timing.operations import FORMATS, OPERATIONS
from bench.timing.stopwatch import CLOCK, median, spread

TABLE = cases.OPS
GENERATOR_COUNTS = (16_384, 131_072, 270_336, 270_337, 8_388_608)


@pytest.mark.benchmark(timer=CLOCK.now)
def test_op(case, device, roof, stopwatch, results, benchmark):
    torch.manual_seed(0)
    operation = OPERATIONS[case.op]
    kernels = device.type in KERNEL_DEVICES
    ours = operation.ours if kernels else operation.reference
    inputs = operation.make(case, device)
    cost = operation.cost(*inputs)
    wide = truth_dtype(sum(value.numel() for value in inputs), cost.flops, device)
    check(operation, ours, inputs, wide)
    # Inputs without four axes have one layout.
    layouts = ("NHWC", "NCHW") if inputs[0].ndim == 4 else ("contiguous",)
    calls = {"ours": [ours(*values) for values in input_sets(inputs, None, device)]}
    for layout in layouts:
        sets = input_sets(inputs, layout if layout in FORMATS else None, device)
        calls[f"eager {layout}"] = [operation.eager(*values) for values in sets]
    stopwatch.warm_up(calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def one_round():
        for name, taken in stopwatch.one_round().items():
            seconds[name].append(taken)
        # pytest-benchmark reads this clock before and after, so that its figures are the device's.
        CLOCK.advance(seconds["ours"][-1])

    benchmark.pedantic(one_round, rounds=stopwatch.rounds)
    medians = {name: median(taken) for name, taken in seconds.items()}
    work = cost.bytes if operation.bound == "bytes" else cost.flops
    rate = work / medians["ours"]
    best = roof["bytes"] if operation.bound == "bytes" else roof[case.dtype]
    results["cases"][case.name] = {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "layout": case.layout,
        "ours": "kernel" if kernels else "reference", "gate": str(wide).removeprefix("torch."),
        "bytes": cost.bytes, "flops": cost.flops,
        "unit": "TB/s" if operation.bound == "bytes" else "TFLOP/s", "rate": rate, "share_of_roof": rate / best,
        "median_seconds": medians, "spread": {name: spread(taken) for name, taken in seconds.items()},
        "times_eager": {name.split()[1]: medians[name] / medians["ours"] for name in medians if name != "ours"},
        "host_seconds": stopwatch.host_seconds["ours"], "input_sets": len(calls["ours"]), "seconds": seconds,
    }  # fmt: skip
    benchmark.extra_info.update(rate=rate, share_of_roof=rate / best)


def drawn_eagerly(moments: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw as diffusers' DiagonalGaussianDistribution.sample does."""
    mean, logvar = torch.chunk(moments, 2, dim=1)
    std = torch.exp(0.5 * torch.clamp(logvar, -30.0, 20.0))
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", GENERATOR_COUNTS)
def test_generator_bits(count, dtype, device, results):
    """sample(generator=cuda) has the bits of eager, twice in a row, and leaves the generator at torch's offset."""
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
    """Compare the kernel with its reference in torch, within the tolerance of the normals, without a CUDA generator."""
    seeds, offsets = philox.seed_tensor([2**63 + 11]), torch.tensor([8])
    noise = posterior.sample_posterior(torch.zeros(1, 2, 1, count), seeds, offsets, 256).flatten()
    twin = philox.stream_normals(2**63 + 11, 8, count, 256)
    off = (noise - twin).abs().max().item()
    results["generator"][f"{count} twin"] = {"elements": count, "largest_difference": off}
    assert off <= 2e-6


def test_the_table_serves_every_op():
    """Every operation has a case, and a dry one."""
    for table in cases.OPS.values():
        assert {case.op for case in table} == set(OPERATIONS)
        names = [case.name for case in table]
        assert len(names) == len(set(names))
