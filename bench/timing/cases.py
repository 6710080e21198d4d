"""Cases of the benchmarks: shapes and dtypes of the Stable Diffusion autoencoder, for the ops and for whole networks.

Each kind has a table for a GPU, one for a CPU, and a dry one of tiny shapes that runs in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.timing.operations import Case


@dataclass(frozen=True)
class Network:
    """An encoder or a decoder at one shape. preset: name of the configuration, or TINY; side: of the square images.

    compiled: torch.compile takes part, which takes a minute or more; exported: ONNX Runtime and OpenVINO take part.
    """

    part: str
    preset: str
    side: int
    batch: int = 1
    dtype: str = "bfloat16"
    compiled: bool = False
    exported: bool = False

    @property
    def name(self) -> str:
        label = f"{self.part} {self.preset} {self.batch}x{self.side}x{self.side} {self.dtype}"
        return f"{label} compiled" if self.compiled else label


def encoder_stages(side: int) -> list[tuple[int, ...]]:
    """Return the shapes that the norms of an encoder of side x side images get."""
    return [(1, 128, side, side), (1, 256, side // 2, side // 2), (1, 512, side // 4, side // 4),
            (1, 512, side // 8, side // 8)]  # fmt: skip


def decoder_stages(side: int) -> list[tuple[int, ...]]:
    """Return the shapes of a decoder's norms that an encoder lacks: a level's first norm has the channels before it."""
    return [(1, 256, side, side), (1, 512, side // 2, side // 2)]


SIDES = (256, 512, 1024, 2048)
POINTWISE = ("group_norm_silu_measured", "group_norm_statistics", "scale_shift_silu", "residual_add")
# The shape of published comparisons of GroupNorm kernels, [1, 128, 20, 256, 256], with the frames in one column.
TALL = (1, 128, 20 * 256, 256)
_TABLE = [
    *(Case("group_norm_silu", shape) for side in SIDES for shape in encoder_stages(side) + decoder_stages(side)),
    Case("group_norm_silu", TALL),
    Case("group_norm_silu_measured", TALL),
    Case("group_norm_silu", (8, 128, 512, 512)),
    *(Case("group_norm_silu", (1, 128, 1024, 1024), dtype) for dtype in ("float16", "float32")),
    *(Case(op, shape) for op in POINTWISE for side in SIDES[1:] for shape in encoder_stages(side)[:3]),
    Case("residual_add", (1, 128, 1024, 1024), "float16"),
    *(Case("residual_add_padded", shape) for shape in encoder_stages(512)[:3]),
    *(Case("group_norm_silu_backward", shape) for shape in encoder_stages(512)[:3]),
    *(Case("spatial_attention", (1, length, 512)) for length in (1024, 4096, 16384)),
    *(Case("spatial_attention", (8, length, 512)) for length in (1024, 4096)),
    Case("spatial_attention", (8, 4096, 256)),
    Case("spatial_attention", (1, 4096, 512), "float16"),
    *(Case("spatial_attention_shared", (1, length, 512)) for length in (1024, 4096, 16384)),
    *(Case("spatial_attention_backward", (1, length, 512)) for length in (1024, 4096, 16384)),
    *(Case("pixels_conv_in", (1, 3, side, side)) for side in SIDES),
    Case("pixels_conv_in", (8, 3, 512, 512)),
    Case("pixels_conv_in", (1, 3, 1024, 1024), layout="NCHW"),
    *(Case("upsample_conv", (1, 512, side // by, side // by)) for side in (512, 1024) for by in (8, 4)),
    *(Case("upsample_conv", (1, 256, side // 2, side // 2)) for side in (512, 1024, 2048)),
    *(Case("upsample_interleave", (1, 4 * channels, side // 2 + 1, side // 2 + 1)) for channels, side in
      ((512, 128), (512, 256), (512, 512), (256, 512), (256, 1024))),
    *(Case("winograd_conv", shape) for shape in encoder_stages(512)),
    Case("winograd_conv", (8, 512, 128, 128)),
    *(Case("sample_posterior", (8, 8, side // 8, side // 8), layout="NCHW") for side in SIDES),
    Case("sample_posterior", (8, 8, 64, 64), "float16"),
    Case("kl_divergence", (8, 8, 64, 64), layout="NCHW"),
    Case("kl_divergence", (8, 8, 256, 256), layout="NCHW"),
]  # fmt: skip
# Levels of neighbouring sizes share shapes: each shape once.
CASES = list(dict.fromkeys(_TABLE))
# Every op once, at the encoder's shapes for 256 x 256. Without a GPU the ops are their references.
CPU = [
    *(Case("group_norm_silu", (1, 128, 256, 256), dtype) for dtype in ("float32", "bfloat16")),
    *(Case(op, (1, 128, 256, 256), "float32") for op in (*POINTWISE, "residual_add_padded")),
    Case("group_norm_silu_backward", (1, 128, 256, 256), "float32"),
    *(Case("spatial_attention", (1, 1024, 512), dtype) for dtype in ("float32", "bfloat16")),
    *(Case(f"spatial_attention_{end}", (1, 1024, 512), "float32") for end in ("shared", "backward")),
    Case("pixels_conv_in", (1, 3, 256, 256), "float32"),
    Case("upsample_conv", (1, 512, 32, 32), "float32"),
    Case("upsample_interleave", (1, 2048, 33, 33), "float32"),
    Case("winograd_conv", (1, 512, 32, 32), "float32"),
    *(Case(op, (8, 8, 32, 32), "float32", layout="NCHW") for op in ("sample_posterior", "kl_divergence")),
]
# Every op once at a tiny size: seconds in the interpreter.
DRY = [
    Case("group_norm_silu", (1, 64, 4, 5)),
    Case("group_norm_silu_measured", (1, 64, 4, 5), "float32"),
    Case("group_norm_statistics", (1, 64, 4, 5)),
    Case("scale_shift_silu", (1, 64, 4, 5), "float16"),
    Case("residual_add", (1, 64, 4, 5)),
    Case("residual_add_padded", (1, 64, 4, 5)),
    Case("group_norm_silu_backward", (1, 64, 4, 5), "float32"),
    Case("spatial_attention", (1, 20, 32)),
    Case("spatial_attention", (2, 20, 264)),
    Case("spatial_attention_shared", (1, 20, 32), "float16"),
    Case("spatial_attention_backward", (1, 20, 32), "float32"),
    Case("pixels_conv_in", (1, 3, 6, 5)),
    Case("pixels_conv_in", (1, 3, 6, 5), layout="NCHW"),
    Case("upsample_conv", (1, 32, 3, 4)),
    Case("upsample_interleave", (1, 128, 4, 5)),
    *(Case("winograd_conv", (1, 32, 3, 4), dtype) for dtype in ("bfloat16", "float32")),
    Case("sample_posterior", (2, 8, 3, 4), layout="NCHW"),
    Case("kl_divergence", (2, 8, 3, 4), layout="NCHW"),
]
OPS = {"cuda": CASES, "cpu": CPU, "dry": DRY}

# The preset of a miniature model with the same layers, for dry runs.
TINY = "tiny"
# (preset, side, batch), the most important first: a run that is stopped early has those. A preset gives shapes only.
_SHAPES = [
    ("sd15", 512, 8), ("sd15", 512, 1), ("sd15", 256, 1), ("sd15", 1024, 1), ("sdxl", 1024, 4), ("flux", 1024, 1),
    ("sd15", 256, 32), ("flux", 512, 32), ("sd15", 2048, 1),
]  # fmt: skip


def _on_a_gpu(part: str) -> list[Network]:
    named = [Network(part, *shape) for shape in _SHAPES]
    half = Network(part, "sd15", 512, 8, "float16")
    # Last, since compiling takes as long as all other cases together.
    return [*named[:1], half, *named[1:], Network(part, "sd15", 512, 8, compiled=True)]


_ALL = {"compiled": True, "exported": True}
# "rivals" is the table of make bench-cpu: every contestant on a CPU, in fp32 and once in bf16.
ENCODERS = {
    "cuda": _on_a_gpu("encoder"),
    "cpu": [
        Network("encoder", "sd15", 256, dtype=dtype, compiled=True, exported=True) for dtype in ("float32", "bfloat16")
    ],
    "rivals": [
        Network("encoder", "sd15", side, dtype=dtype, **_ALL)
        for side, dtype in ((256, "float32"), (512, "float32"), (256, "bfloat16"))
    ],
    "dry": [Network("encoder", TINY, 4, dtype="bfloat16")],
}
DECODERS = {
    "cuda": _on_a_gpu("decoder"),
    "cpu": [Network("decoder", "sd15", 256, dtype="float32", exported=True)],
    "rivals": [Network("decoder", "sd15", side, dtype="float32", **_ALL) for side in (256, 512)],
    "dry": [Network("decoder", TINY, 4, dtype="float32")],
}
# Networks that are profiled, kernel by kernel.
PROFILES = {
    "cuda": [Network(part, "sd15", 512, 8) for part in ("encoder", "decoder")],
    "cpu": [Network("encoder", "sd15", 256, dtype=dtype) for dtype in ("bfloat16", "float32")],
    "dry": [Network("encoder", TINY, 4, dtype="float32")],
}
# Encoding in the training loop. On a CPU tests/data check the steps of the loader.
LOADERS = {
    "cuda": [Network("encoder", "sd15", side, batch, "float16") for side, batch in ((256, 32), (512, 8))],
    "cpu": [],
    "dry": [Network("encoder", TINY, 4, dtype="float32")],
}
