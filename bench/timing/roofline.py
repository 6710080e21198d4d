"""Floor of the whole network: bytes and operations of an encode and a decode, counted on fake CUDA tensors.

    python -m bench.timing.roofline                      the table of docs/performance.md, for assumed rates
    python -m bench.timing.roofline --bandwidth 4.3e12 --rate 790e12

Nothing is run. Launches, bytes and operations are the sums of the costs of all calls (fastvae.fast.cost_trace). The
floor of a call is the longer of its bytes over the bandwidth and its operations over the rate, without caches.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.runtime import Cost

import fastvae
from fastvae.fast import cost_trace
from fastvae.fast.inference_pass import InferencePass
from fastvae.fast.packed_weights import PackedWeights

STABLE_DIFFUSION = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
# Rates of a copy and of a matrix product on an H200 in bf16: assumed, not measured.
BANDWIDTH, RATE = 4.3e12, 790e12
# diffusers' eager pass in NCHW and bf16: (kernels, bytes) at 512² and batch 8, from its modules' shapes. cuDNN
# transposes before and after every convolution, ATen adds each bias, GroupNorm reads twice; SiLU, additions and
# divisions by 1.0 are separate passes.
EAGER = {"encoder": (211, 73.3e9), "decoder": (275, 130.0e9)}
SIZES = ((256, 1), (256, 8), (512, 1), (512, 8), (1024, 1), (2048, 1))


def count(
    name: str, size: int, batch: int, frozen: bool = True, target: str = "sm_90",
    config: Mapping[str, Any] = STABLE_DIFFUSION, dtype: torch.dtype = torch.bfloat16,
) -> list[Cost]:  # fmt: skip
    """Return the cost of every call of an encode or decode of ``batch`` square images on a GPU ``target``.

    frozen: weights are packed already; else every call packs and folds them. config: of an AutoencoderKL. Raises
    RuntimeError if a block is not fused.
    """
    with torch.device("meta"):
        vae = fastvae.AutoencoderKL(**config).to(dtype).requires_grad_(False).eval()
    part, shape = vae.encoder, (batch, vae.config.in_channels, size, size)
    if name == "decoder":
        small = size // vae.downsample_factor
        part, shape = vae.decoder, (batch, vae.config.latent_channels, small, small)
    run = InferencePass(PackedWeights(frozen).for_trace(), quant_conv=vae.quant_conv if name == "encoder" else None)
    before, tiles.target_of = tiles.target_of, lambda device: tiles.TARGETS[target]
    try:
        with cost_trace.fake_mode():
            for module in vae.modules():
                for key, weight in module._parameters.items():
                    if weight is not None:
                        fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                        module._parameters[key] = torch.nn.Parameter(fake, requires_grad=False)
            x = torch.empty(shape, dtype=dtype, device="cuda")
            if frozen:
                cost_trace.count(part, x, run)
            counter, noted = cost_trace.count(part, x, run)
    finally:
        tiles.target_of = before
    fallen_back = [type(module).__name__ for module, reason in noted.items() if reason]
    if fallen_back:
        raise RuntimeError(f"these blocks would not be fused: {fallen_back}")
    return [cost for _, _, cost in counter.calls]


def floor(costs: list[Cost], bandwidth: float = BANDWIDTH, rate: float = RATE) -> float:
    """Return the fewest seconds that a pass of these calls can take."""
    return sum(max(cost.bytes / bandwidth, cost.flops / rate) for cost in costs)


def predicted(costs: list[Cost], share: float = 0.75) -> float:
    """Return the seconds of a pass with products at ``share`` of RATE and memory at 4.0 TB/s: guesses, not results."""
    return floor(costs, 4.0e12, share * RATE)


def table(bandwidth: float = BANDWIDTH, rate: float = RATE, sizes: Iterable[tuple[int, int]] = SIZES) -> str:
    """Return a Markdown table: one row per pass, size and batch."""
    lines = [
        "| pass | images | launches | where weights may move | GB | TFLOP | floor, ms | predicted, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("encoder", "decoder"):
        for size, batch in sizes:
            costs = count(name, size, batch)
            total = sum(costs, cost_trace.NOTHING)
            free = sum(count(name, size, batch, frozen=False), cost_trace.NOTHING)
            lines.append(
                f"| {name} | {batch} x {size}² | {total.launches} | {free.launches} | {total.bytes / 1e9:.2f} "
                f"| {total.flops / 1e12:.2f} | {1e3 * floor(costs, bandwidth, rate):.2f} "
                f"| {1e3 * predicted(costs):.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second")
    parser.add_argument("--rate", type=float, default=RATE, help="operations a second of a matrix product")
    arguments = parser.parse_args()
    print(table(arguments.bandwidth, arguments.rate))


if __name__ == "__main__":
    main()
