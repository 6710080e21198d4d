"""fastvae.compare: errors of the fast path against eager torch and float64, stage by stage, on given images."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae import metrics
from fastvae.data.encoding.self_check import check_pictures
from fastvae.data.images.read import read_image
from fastvae.fast.accelerate import unwrapped, vae_of
from fastvae.fast.cpu.group_norm import AccurateGroupNorm
from fastvae.fast.fast_path import FastPath
from fastvae.latents.autoencoder import ACCELERATED, check_autoencoder, check_part, like_weights
from fastvae.latents.pixels import pixels_from_images
from fastvae.latents.scaling import pixel_multiple
from fastvae.report import compare_stages
from fastvae.report.contestants import open_fp32
from fastvae.report.correctness import tolerance
from fastvae.report.number_format import number
from fastvae.system.devices import DTYPES, default_dtype, resolve_device

VARIANTS = ("fast", "eager", "float64")


@dataclass(frozen=True)
class Distance:
    """Difference of two activations over all images; NaN if one of them is not finite."""

    largest: float
    mean: float
    rms: float
    cosine: float
    """1 - the cosine of the angle between them."""


@dataclass(frozen=True)
class Stage:
    """Distances after one stage of the network. Each side continues with its own values, so that errors add up."""

    name: str
    path: str
    """Path of the fast side: "fused", "cpu", "eager" outside of encoder and decoder, or why a part runs as a module."""
    fast_eager: Distance
    fast_float64: Distance
    eager_float64: Distance
    allowed: float
    allowed_rms: float

    @property
    def is_right(self) -> bool:
        """True if the fast path is within twice eager's error plus one rounding, or finite if eager is not.

        Eager's error is the larger of those in NCHW and in channels_last, with GroupNorm in NCHW in both.
        """
        if not math.isfinite(self.eager_float64.largest):
            return math.isfinite(self.fast_float64.largest)
        return self.fast_float64.largest <= self.allowed and self.is_right_by_rms

    @property
    def is_right_by_rms(self) -> bool:
        """True if the rms error is within 1.5 times eager's plus one rounding, or finite if eager is not."""
        if not math.isfinite(self.eager_float64.largest):
            return math.isfinite(self.fast_float64.largest)
        return self.fast_float64.rms <= self.allowed_rms


@dataclass(frozen=True)
class Comparison:
    """Result of ``compare``; ``str`` returns a table."""

    stages: list[Stage]
    psnr: dict[str, float]
    """PSNR of the round trip through the posterior's mode, in dB, mean over the images: "fast", "eager", "float64"."""
    images: int
    dtype: str
    device: str
    generated: dict[str, list[str]] = field(default_factory=dict)
    """Stages that are not right on a generated picture, by its name: "waves", "flat", "noisy", "large"."""

    @property
    def is_right(self) -> bool:
        """True if every stage is right, on generated pictures too."""
        return all(stage.is_right for stage in self.stages) and not any(self.generated.values())

    def facts(self) -> dict[str, Any]:
        """Return the comparison as values for JSON."""
        rows = [{**asdict(stage), "is_right": stage.is_right} for stage in self.stages]
        return {**asdict(self), "stages": rows, "is_right": self.is_right}

    def __str__(self) -> str:
        width = max(len(stage.name) for stage in self.stages)
        images = f"{self.images} image" + "s" * (self.images != 1)
        lines = [
            f"{images}, {self.dtype} on {self.device}; the largest, mean and cosine error of each pair",
            f"{'':{width}}  {'fast and eager':28}{'fast and float64':28}{'eager and float64':28}path",
        ]
        for stage in self.stages:
            pairs = (stage.fast_eager, stage.fast_float64, stage.eager_float64)
            cells = "".join(f"{_cell(pair):28}" for pair in pairs)
            lines.append(f"{stage.name:{width}}  {cells}{stage.path}{'' if stage.is_right else '  TOO FAR'}")
        psnr = ", ".join(f"{variant} {number(self.psnr[variant], 4)} dB" for variant in VARIANTS)
        lines += [
            f"{name} picture: {'TOO FAR in ' + ', '.join(wrong) if wrong else 'every stage within the tolerance'}"
            for name, wrong in self.generated.items()
        ]
        return "\n".join([*lines, f"round trip, PSNR: {psnr}"])


def compare(vae_or_pipe: Any, images: Any) -> Comparison:
    """Run images through a VAE on the fast path, in eager torch and in float64; return the errors of every stage.

    vae_or_pipe: fastvae's or diffusers' autoencoder, or a pipeline with one; it is not changed. An accelerated one is
    compared with its settings, another with the defaults of ``accelerate``. images: as for ``encode_latents``, or files
    (one path, or several of any sizes); sides are cropped to a multiple that the model takes.
    Fast and eager run in the model's dtype on its device, without tiling, graphs or torch.compile; float64 runs on a
    copy, on the CPU if the device has no float64. Images run one by one, so a batch does not change the result.
    Raises ValueError for no images, for images that ``encode_latents`` refuses, for a model without encoder or decoder
    and for weights on the meta device; ImageError for a file that cannot be read; TypeError if there is no VAE.
    """
    vae = _complete_vae(vae_or_pipe)
    weight = next(vae.parameters())
    path = vars(vae).get(ACCELERATED) or FastPath()
    wide = copy.deepcopy(vae, {id(path): None})
    # torch's cast: diffusers' warns about modules to keep in fp32 even if a model has none.
    place = weight.device if weight.device.type == "cuda" else torch.device("cpu")
    torch.nn.Module.to(wide, device=place, dtype=torch.float64)
    gaps: dict[str, list[_Gap]] = {}
    paths: dict[str, str] = {}
    psnr: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    count = 0
    with torch.no_grad():
        for x in _one_by_one(vae, images):
            count += 1
            paths |= {
                name: compare_stages.stage_path(path, unwrapped(getattr(vae, name)), x)
                for name in ("encoder", "decoder")
            }
            _measure(vae, wide, path, x, gaps, psnr)
    if not count:
        raise ValueError("images must hold at least one image, got none")
    return Comparison(
        stages=[_stage(name, paths.get(name.split(".")[0], "eager"), gaps[name], weight.dtype) for name in gaps],
        psnr={variant: sum(values) / len(values) for variant, values in psnr.items()},
        images=count,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
    )


def compare_files(
    images: Sequence[str],
    vae: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[str, Comparison]:
    """Compare a model on image files, as ``fastvae compare`` does; return the model's name and the comparison.

    Waves, a flat, a noisy and a large picture are compared too: a photograph does not show every error.
    vae: a directory, a single file (``preset`` if its tensors do not decide the scaling), the name of a preset (random
    weights), a Hub id, or "tiny". dtype and device: by default the best of this machine. say: called with a line before
    each of the generated pictures, which can take a minute.
    Raises the errors of ``compare`` and from_pretrained, and ValueError for a device that does not exist.
    """
    place = resolve_device(device)
    model, weights = open_fp32(vae, subfolder, revision, preset)
    model = model.to(device=place, dtype=DTYPES[dtype or default_dtype(place)])
    found = compare(model, list(images))
    generated = {}
    for name, picture in check_pictures(pixel_multiple(model)).items():
        say(f"compare a {name} picture of {picture.shape[-1]}x{picture.shape[-2]}")
        stages = compare(model, picture[:, : getattr(model.config, "in_channels", 3)]).stages
        # By rms alone: of a flat picture a stage has a few values, and the largest error is one rounding.
        generated[name] = [stage.name for stage in stages if not stage.is_right_by_rms]
    return f"{vae} (weights: {weights})", replace(found, generated=generated)


def _complete_vae(vae_or_pipe: Any) -> Any:
    vae = vae_of(vae_or_pipe)
    check_autoencoder(vae)
    check_part(vae, "encoder")
    check_part(vae, "decoder")
    if any(weight.device.type == "meta" for weight in vae.parameters()):
        raise ValueError("compare needs weights in memory, got some on the meta device: remove the offload hooks")
    return vae


class _Gap:
    """Sums over images in float64 that give a Distance, and the size of the second activation."""

    def __init__(self):
        self.largest = self.total = self.squares = self.count = 0.0
        self.product = self.own = self.other = 0.0
        self.largest_other = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a.double().flatten(), b.double().flatten()
        error = (a - b).abs()
        self.largest = _larger(self.largest, error.max().item())
        self.largest_other = _larger(self.largest_other, b.abs().max().item())
        self.total += error.sum().item()
        self.squares += error.square().sum().item()
        self.count += error.numel()
        self.product += (a @ b).item()
        self.own += (a @ a).item()
        self.other += (b @ b).item()

    def distance(self) -> Distance:
        lengths = math.sqrt(self.own * self.other)
        cosine = self.product / lengths if lengths else 1.0
        if not math.isfinite(self.total):
            return Distance(*[math.nan] * 4)
        return Distance(
            self.largest, self.total / self.count, math.sqrt(self.squares / self.count), max(0.0, 1 - cosine)
        )


def _measure(
    vae: Any, wide: Any, path: FastPath, x: Tensor, gaps: dict[str, list[_Gap]], psnr: dict[str, list[float]]
) -> None:
    """Run one image [1, C, H, W] through all three, and through eager in channels_last, stage by stage."""
    weight = next(wide.parameters())
    side_by_side = [
        compare_stages.run_stages(vae, x, path),
        compare_stages.run_stages(vae, x, None),
        compare_stages.run_stages(wide, x.to(weight), None),
    ]
    # Of a flat picture few values decide, and one rounding each: a second eager run makes the limit less random.
    laid_out = compare_stages.run_stages(vae, x.contiguous(memory_format=torch.channels_last), None)
    last: list[Tensor] = []
    for *reached, (_, other) in zip(*side_by_side, _with_norms_in_nchw(laid_out), strict=True):
        fast, eager, truth = last = [values.to(weight.device) for _, values in reached]
        pairs = (fast, eager), (fast, truth), (eager, truth), (other.to(weight.device), truth)
        for gap, pair in zip(gaps.setdefault(reached[0][0], [_Gap() for _ in pairs]), pairs, strict=True):
            gap.add(*pair)
    for variant, image in zip(VARIANTS, last, strict=True):
        psnr[variant].append(_clamped_psnr(image, x.to(weight)))


def _with_norms_in_nchw(stages: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield stages that are computed with GroupNorm in NCHW: torch's loses digits in channels_last on a CPU."""
    while True:
        with AccurateGroupNorm():
            stage = next(stages, None)
        if stage is None:
            return
        yield stage


def _stage(name: str, path: str, gaps: list[_Gap], dtype: torch.dtype) -> Stage:
    fast_eager, fast_float64, eager_float64, other = (gap.distance() for gap in gaps)
    size, eps = gaps[2], torch.finfo(dtype).eps
    eager = max(eager_float64.largest, other.largest), max(eager_float64.rms, other.rms)
    allowed = tolerance(*eager, size.largest_other, math.sqrt(size.other / size.count), eps)
    return Stage(name, path, fast_eager, fast_float64, eager_float64, *allowed)


def _one_by_one(vae: Any, images: Any) -> Iterator[Tensor]:
    """Yield each image as pixels [1, C, H, W] in [-1, 1], like the weights, cropped to a multiple the model takes."""
    one = isinstance(images, (str, os.PathLike))
    batches = [images]
    if one or (isinstance(images, (list, tuple)) and images and isinstance(images[0], (str, os.PathLike))):
        batches = ([read_image(Path(path)).image] for path in ([images] if one else images))
    multiple = pixel_multiple(vae)
    for batch in batches:
        pixels = pixels_from_images(vae, batch)
        if not pixels.shape[0]:
            continue
        height, width = (side - side % multiple for side in pixels.shape[2:])
        if not (height and width):
            raise ValueError(f"images must be at least {multiple} x {multiple} pixels, got {tuple(pixels.shape[2:])}")
        for row in pixels[:, :, :height, :width].split(1):
            yield like_weights(vae, row).contiguous()


def _clamped_psnr(image: Tensor, x: Tensor) -> float:
    """Return the PSNR in dB of two images in [-1, 1], the first clamped to that range: NaN if their shapes differ."""
    return metrics.psnr(image.double().clamp(-1, 1).cpu(), x.cpu(), peak=2.0) if image.shape == x.shape else math.nan


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) else max(a, b)


def _cell(distance: Distance) -> str:
    return "  ".join(f"{value:.1e}" for value in (distance.largest, distance.mean, distance.cosine))
