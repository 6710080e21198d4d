"""Print, as JSON, how many variants Triton would compile of each kernel over many sizes, without compiling any.

    python tests/support/compiled_variants.py passes posterior attention:512:bfloat16

It runs in a new process, since it needs the kernels without the interpreter, on fake tensors.
"""

import itertools
import json
import sys

import torch
from fastvae_kernels import attention, divergence, group_norm, group_norm_silu, pixels, posterior, residual
from fastvae_kernels.shared import statistics, tiles
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from bench.kernels import launches


def passes():
    """Yield after the launches of the passes over images: 30 sizes, 24 and 128 channels."""
    for index, channels in itertools.product(range(30), (24, 128)):
        batch, height, width = 1 + index % 5, 8 * (1 + index), 8 * (30 - index) + index % 3
        x = statistics.new_channels_last(batch, channels, height, width, like=torch.empty(0, dtype=torch.bfloat16))
        weight, picture = torch.empty(channels).bfloat16(), torch.empty(batch, 3, height, width, dtype=torch.uint8)
        y, *moments = group_norm_silu.launch_forward(x, weight, weight, 8, 1e-6, True)
        group_norm_silu.launch_backward(y, x, weight, weight, *moments, True)
        scale, shift = group_norm.launch_affine(group_norm.launch_statistics(x), weight, weight, 8, 1e-6)
        group_norm.launch_scale_shift_silu(x, scale, shift)
        residual.launch(x, x, weight)
        residual.launch(x, x, weight, pad=1)
        pixels.launch(picture, torch.empty(channels, 3, 3, 3).bfloat16(), weight)
        yield (channels,), ("SILU", "PAD")


def moments():
    """Yield after the launches of sampler and divergence: 8 sizes, two dtypes, three numbers of channels."""
    for index in range(0, 32, 4):
        batch, height, width = 1 + index % 5, 1 + 3 * index, 1 + 5 * (31 - index) + index % 3
        for dtype, channels in itertools.product((torch.float32, torch.bfloat16), (3, 4, 16)):
            for form in (torch.contiguous_format, torch.channels_last):
                moments = torch.empty((batch, 2 * channels, height, width), dtype=dtype, memory_format=form)
                seeds, threads = torch.empty(batch, dtype=torch.int64), 256 * (1 + 33 * index)
                one = torch.empty(1, dtype=torch.int64)
                for drawn in ((None, None, 0), (seeds, None, 0), (seeds, seeds, threads), (one, one, threads)):
                    latents = posterior.launch(moments, *drawn, 0.1 * index, 1.0)
                    posterior.launch_backward(latents, moments, *drawn, 1.0)
                divergence.launch_backward(divergence.launch(moments), moments)
            yield (str(dtype), channels), ("DRAW", "STREAM")


def products(channels, dtype):
    """Yield after the launches of attention, both forms: 30 lengths."""
    for index in range(30):
        length = (1 + index) * (30 - index + index % 3) * (1 if index < 20 else 64)
        query = torch.empty(1 + index % 5, length, channels, dtype=dtype)
        for value in (query, None):
            forward = attention.launch_shared if value is None else attention.launch
            out, lse = forward(query, query, *([] if value is None else [value]), 0.1)
            attention.launch_backward(out, query, query, value, out, lse, 0.1)
        yield (), ()


def count(case):
    """Return [kernel and the values that distinguish it, number of variants that Triton would compile] of a case."""
    name, *rest = case.split(":")
    if name == "attention":
        calls = products(int(rest[0]), getattr(torch, rest[1]))
    else:
        calls = {"passes": passes, "posterior": moments}[name]()
    pending, seen = [], {}

    def take(kernel, *args, grid, warmup, **kwargs):
        pending.append(launches.describe(kernel, "", args, kwargs))

    JITFunction.run, tiles.target_of = take, lambda device: tiles.TARGETS["sm_90"]
    with FakeTensorMode(), torch.device("cuda"):
        for described, constants in calls:
            for launch in pending:
                variant = launch.kernel, *described, *(launch.constants.get(constant) for constant in constants)
                seen.setdefault(variant, set()).add(launch.key)
            pending.clear()
    return [[variant, len(keys)] for variant, keys in seen.items()]


if __name__ == "__main__":
    sys.stdout.write(json.dumps({case: count(case) for case in sys.argv[1:]}))
