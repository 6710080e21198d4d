"""`fastvae plan-hardware`: how many cores a device needs to encode a user's own pictures at its rate.

A sample of the pictures is read one by one in this thread, so that milliseconds are those of one core. A CUDA GPU
resizes; its time for that is a prediction until it is given.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastvae.data.encoding.batch_size import BatchSizes
from fastvae.data.encoding.encoder import MomentEncoder
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.encoding.model import load_model
from fastvae.data.encoding.row_format import RowFormat
from fastvae.data.encoding.settings import Settings
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import SINGLE, to_bucket
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import DEFAULT_MAX_PIXELS, quiet_pillow
from fastvae.data.rows import Size, SourceFile
from fastvae.data.sources.open import open_source
from fastvae.latents.scaling import denoiser_multiple, downsample_factor, pixel_multiple
from fastvae.system.devices import default_dtype, resolve_device
from fastvae.system.threads import usable_cores

# Predicted for an H100, not measured: 0.15 ms for eight pictures of 1920x1080 to 512x512.
RESIZE_MS = 0.02
# Batches of the encoder: the first ones warm it up.
WARM_UP, TIMED = 2, 5
KEPT = 64
MOST_MS = 1e6
# CPU of everything else for an image, in the threads that decode and in the one that feeds and writes, without a run's
# start: measured on an AMD EPYC for JPEGs of 800x800 and 1920x1080; 1.7 for 4000x3000 (docs/latents.md, Speed).
OTHER_MS = 1.0


@dataclass
class Sample:
    """Measurements of a sample: CPU milliseconds of each picture, and how many could not be read.

    ``pixels``: of the first KEPT pictures of a bucket, which the encoder is timed with.
    """

    decode_ms: list[float] = field(default_factory=list)
    resize_ms: list[float] = field(default_factory=list)
    megapixels: list[float] = field(default_factory=list)
    unusable: int = 0
    buckets: Counter[Size] = field(default_factory=Counter)
    pixels: dict[Size, list[np.ndarray]] = field(default_factory=dict)

    @property
    def usual_bucket(self) -> Size:
        """The bucket of the most pictures."""
        return self.buckets.most_common(1)[0][0]


def plan_hardware(
    src: str,
    vae: str,
    *,
    buckets: str = "512",
    count: int = 64,
    dtype: str | None = None,
    device: str | None = None,
    encode_ms: float | None = None,
    resize_ms: float | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
) -> dict[str, Any]:
    """Return the milliseconds of each stage, and the cores and the rate that follow from them.

    encode_ms, resize_ms: of another device, for an image. Without encode_ms this device encodes batches of the sample.
    Raises ValueError for a source of which no picture can be read and for milliseconds that cannot be, and what encode
    raises for the model.
    """
    if encode_ms is not None and not 1e-3 <= encode_ms <= MOST_MS:  # NaN is not
        raise ValueError(f"encode_ms must be from 0.001 to {MOST_MS:.0f} milliseconds, got {encode_ms!r}")
    if resize_ms is not None and not 0 <= resize_ms <= MOST_MS:
        raise ValueError(f"resize_ms must be from 0 to {MOST_MS:.0f} milliseconds, got {resize_ms!r}")
    model, _ = load_model(vae, subfolder, revision, preset)
    place = resolve_device(device)
    table = Buckets.parse(buckets, pixel_multiple(model), denoiser_multiple(model))
    settings = Settings(
        dtype or default_dtype(place), RowFormat(), table, SINGLE, "white", downsample_factor(model),
        int(model.config.latent_channels), place,
    )  # fmt: skip
    source = open_source(src)
    files = source.listing().files
    reader = ImageReader(source, table, SINGLE, "white", settings.factor, DEFAULT_MAX_PIXELS)
    count = min(count, len(files))
    sample = measure(reader, (files[len(files) * number // count] for number in range(count)))
    if not sample.pixels:
        raise ValueError(f"src must hold a picture that can be read, got {src!r}: {sample.unusable} could not be")
    measured = encode_ms is None
    if encode_ms is None:
        encode_ms = _encode_ms(model, settings, sample)
    stages = {
        "decode_ms": float(np.mean(sample.decode_ms)),
        "pillow_resize_ms": float(np.mean(sample.resize_ms)),
        "other_ms": OTHER_MS,
        "encode_ms": encode_ms,
        "resize_ms": RESIZE_MS if resize_ms is None else resize_ms,
    }
    return {
        "pictures": len(files),
        "sampled": len(sample.decode_ms),
        "unusable": sample.unusable,
        "megapixels": float(np.median(sample.megapixels)),
        "decode_p95_ms": float(np.quantile(sample.decode_ms, 0.95)),
        "bucket": list(sample.usual_bucket),
        "encode_measured": measured,
        "resize_predicted": resize_ms is None,
        "device": str(place),
        **stages,
        **conclusion(stages, settings.row_size(sample.usual_bucket), usable_cores() or os.cpu_count() or 1, len(files)),
    }


def measure(reader: ImageReader, files: Iterable[SourceFile]) -> Sample:
    """Read these files, and resize them by Pillow."""
    sample = Sample()
    with quiet_pillow():
        for file in files:
            bucket = reader.bucket_of(reader.size(file))
            begin = time.process_time()
            try:
                picture = reader.picture(file, bucket)
            except ImageError:
                sample.unusable += 1
                continue
            decoded = time.process_time()
            pixels, _ = to_bucket(picture, bucket)
            sample.resize_ms.append(1e3 * (time.process_time() - decoded))
            sample.decode_ms.append(1e3 * (decoded - begin))
            sample.megapixels.append(math.prod(picture.original_hw) / 1e6)
            sample.buckets[bucket] += 1
            if sample.buckets[bucket] <= KEPT:
                sample.pixels.setdefault(bucket, []).append(pixels)
    return sample


def conclusion(stages: dict[str, float], row_bytes: int, cores: int, pictures: int) -> dict[str, Any]:
    """Return the rates of a GPU and of this machine's ``cores`` with it, what is slower, and the cores it needs."""
    device_rate = 1e3 / (stages["encode_ms"] + stages["resize_ms"])
    core_ms = stages["decode_ms"] + stages["other_ms"]
    host_rate = cores * 1e3 / core_ms
    rate = min(device_rate, host_rate)
    return {
        "device_images_per_s": device_rate,
        "cores": cores,
        "host_images_per_s": host_rate,
        "cores_needed": math.ceil(device_rate * core_ms / 1e3),
        "cores_needed_if_pillow_resizes": math.ceil(device_rate * (core_ms + stages["pillow_resize_ms"]) / 1e3),
        "bottleneck": "device" if device_rate <= host_rate else "cores",
        "images_per_s": rate,
        "store_mb_per_s": rate * row_bytes / 1e6,
        "seconds": pictures / rate,
    }


def _encode_ms(model: Any, settings: Settings, sample: Sample) -> float:
    """Return the milliseconds an image of the encoder on this device, in batches of the most usual bucket."""
    encoder = MomentEncoder(model, str(settings.dtype), settings.device)
    bucket = sample.usual_bucket
    batch = BatchSizes("auto", encoder).size_for(bucket)
    pixels = sample.pixels[bucket]
    images = np.stack([pixels[number % len(pixels)] for number in range(batch)])
    seconds = []
    for _ in range(WARM_UP + TIMED):
        begin = time.perf_counter()
        encoder.moments(images)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds[WARM_UP:])) / batch


def sentences(plan: dict[str, Any]) -> list[str]:
    """Return the plan as text, a line a stage."""
    height, width = plan["bucket"]
    how = f"measured on {plan['device']}" if plan["encode_measured"] else "given"
    if how == "measured on cpu":
        how += ", whose cores also decode: --encode-ms gives a GPU's"
    predicted = "predicted" if plan["resize_predicted"] else "given"
    slower = "the device" if plan["bottleneck"] == "device" else "decoding on the cores"
    return [
        f"sample      {plan['sampled']} of {plan['pictures']} pictures, {plan['unusable']} unusable; median "
        f"{plan['megapixels']:.1f} megapixels; most in bucket {height}x{width}",
        f"decode      {plan['decode_ms']:.2f} ms of a core, 95 % under {plan['decode_p95_ms']:.2f}; everything else "
        f"{plan['other_ms']:.2f}",
        f"resize      {plan['resize_ms']:.3f} ms on a GPU ({predicted}); by Pillow {plan['pillow_resize_ms']:.2f} ms"
        " of a core",
        f"encode      {plan['encode_ms']:.2f} ms ({how}): {plan['device_images_per_s']:.0f} images/s",
        f"cores       {plan['cores_needed']} for a GPU of this rate, {plan['cores_needed_if_pillow_resizes']} if Pillow"
        f" resized; here {plan['cores']}, which decode {plan['host_images_per_s']:.0f} images/s",
        f"store       {plan['store_mb_per_s']:.1f} MB/s",
        f"bottleneck  {slower}: {plan['images_per_s']:.0f} images/s, {plan['pictures']} pictures in "
        f"{plan['seconds']:.0f} s",
    ]
