"""Options of encode and repair, checked when they are made.

LatentOptions decide the latents, so a store's identity records them. RunOptions do not: a run may change them. The
defaults are those of fastvae.encode and fastvae.repair, which make these objects from their arguments.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from fastvae.data.encoding.batch_size import MAX_BATCH, MAX_WORKERS
from fastvae.data.encoding.report import parse_limit
from fastvae.data.encoding.row_format import LOGVARS, RowFormat
from fastvae.data.encoding.settings import Settings
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import CROPS, Variants, make_variants
from fastvae.data.images.read import ALPHAS, ANIMATED
from fastvae.data.images.size_rules import SizeRules
from fastvae.data.store.shard import POSTERIORS
from fastvae.latents.scaling import denoiser_multiple, downsample_factor, pixel_multiple
from fastvae.system.arguments import check_choices, parse_positive


@dataclass(frozen=True)
class LatentOptions:
    """Options that decide the latents, so that the store's identity records them; see encode. Raises ValueError."""

    buckets: int | str | os.PathLike[str]
    crop: str
    variants: int
    flip: bool
    seed: int
    dtype: str | None  # None: the store's, else the device's default
    posterior: str
    store_dtype: str
    logvar: str
    alpha: str
    animated: str
    min_size: int = 0
    no_upscale: bool = False

    def __post_init__(self) -> None:
        check_choices(
            posterior=(self.posterior, POSTERIORS),
            store_dtype=(self.store_dtype, ("fp16", "fp32")),
            logvar=(self.logvar, LOGVARS),
            crop=(self.crop, CROPS),
            alpha=(self.alpha, ALPHAS),
            animated=(self.animated, ANIMATED),
            dtype=(self.dtype, (None, "fp32", "bf16", "fp16")),
        )
        self.crops()
        self.size_rules()

    def crops(self) -> Variants:
        """Return the crops of each image; raises ValueError for options that contradict each other."""
        return make_variants(self.crop, self.variants, self.flip, self.seed)

    def size_rules(self) -> SizeRules:
        """Return the images that are left out for their size; raises ValueError for a wrong least side."""
        return SizeRules(self.min_size, self.no_upscale)

    def earlier_buckets(self, model: Any) -> Buckets:
        """Return the table of version 0.1, which rounded scaled sizes to the model's pixels per latent alone."""
        return Buckets.parse(self.buckets, pixel_multiple(model), None)

    def settings(self, model: Any, device: torch.device) -> Settings:
        """Return the settings of a store made with ``model``, their dtype as asked for, which may be None."""
        return Settings(
            self.dtype,
            RowFormat(self.posterior, self.store_dtype, self.logvar, self.seed),
            Buckets.parse(self.buckets, pixel_multiple(model), denoiser_multiple(model)),
            self.crops(),
            self.alpha,
            downsample_factor(model),
            int(model.config.latent_channels),
            device,
            self.animated,
            self.size_rules(),
        )


@dataclass(frozen=True)
class RunOptions:
    """Options that do not change the latents, so are not part of the store's identity; see encode. Raises ValueError.

    The last four are arguments of encode alone; repair takes the values here.
    """

    device: str | torch.device | None
    batch: int | str
    workers: int | str
    max_failures: str | float | int
    max_pixels: int
    deterministic: bool
    retry_failed: bool
    progress: bool
    on_error: str = "quarantine"
    hash: str = "none"
    shard_mb: float = 256
    commit_seconds: float = 60

    def __post_init__(self) -> None:
        check_choices(on_error=(self.on_error, ("quarantine", "fail")), hash=(self.hash, ("none", "full")))
        for name, value, most in (("batch", self.batch, MAX_BATCH), ("workers", self.workers, MAX_WORKERS)):
            if value != "auto":
                parse_positive(name, value, most)
        if not (self.max_pixels >= 1 and math.isfinite(self.max_pixels)):
            raise ValueError(f"max_pixels must be at least 1 and finite, got {self.max_pixels!r}")
        parse_limit(self.max_failures, 1)
        if not (self.shard_mb > 0 and math.isfinite(self.shard_mb)):
            raise ValueError(f"shard_mb must be above 0 and finite, got {self.shard_mb!r}")
        if not self.commit_seconds >= 0:
            raise ValueError(f"commit_seconds must be at least 0, got {self.commit_seconds!r}")
