"""fastvae: diffusers' AutoencoderKL, fast, with the same latents.

Every name here is loaded when it is first used, so that ``import fastvae`` costs nothing. The folder ``assets`` has the
tiny model and the tables of buckets. Packages and modules, each importing only what is listed below it:

cli          the commands
report       measurements on a user's machine
data         images to a store of latents, and datasets over it
training     losses and the training loop
fast         the fast path: accelerate, restore, explain
models       the network, under diffusers' file names
latents      images to scaled latents and back, for any VAE of this shape
checkpoints  files and names to tensors and back
tiling       tile plans, as arithmetic
metrics      PSNR
system       files, devices, threads, the terminal
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvae._version import __version__ as __version__

_WHERE = {
    "AutoencoderKL": "fastvae.models",
    "AutoencoderKLFlux2": "fastvae.models",
    "AutoencoderKLOutput": "fastvae.models",
    "BucketBatchSampler": "fastvae.data.datasets.sampler",
    "DecoderOutput": "fastvae.models",
    "DiagonalGaussianDistribution": "fastvae.models",
    "ImageDataset": "fastvae.data.datasets.image_dataset",
    "LatentDataset": "fastvae.data.datasets.dataset",
    "LatentIterable": "fastvae.data.datasets.iterable",
    "LatentLoader": "fastvae.data.datasets.loader",
    "accelerate": "fastvae.fast.accelerate",
    "accelerated": "fastvae.fast.accelerate",
    "calibrate": "fastvae.fast.calibration",
    "collate": "fastvae.data.datasets.collate",
    "compare": "fastvae.report.compare",
    "decode_latents": "fastvae.latents.convert",
    "encode": "fastvae.data.encoding.encode",
    "encode_latents": "fastvae.latents.convert",
    "explain": "fastvae.fast.explain",
    "export": "fastvae.data.exporting.export",
    "fast_report": "fastvae.fast.accelerate",
    "noise_key": "fastvae.data.rows",
    "refresh": "fastvae.fast.accelerate",
    "repair": "fastvae.data.encoding.repair",
    "restore": "fastvae.fast.accelerate",
    "sample_posterior": "fastvae.latents.sampling",
    "scale_latents": "fastvae.latents.scaling",
    "time_ids": "fastvae.data.datasets.collate",
    "unscale_latents": "fastvae.latents.scaling",
    "verify": "fastvae.data.store.verify",
}

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLOutput",
    "BucketBatchSampler",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "ImageDataset",
    "LatentDataset",
    "LatentIterable",
    "LatentLoader",
    "accelerate",
    "accelerated",
    "calibrate",
    "collate",
    "compare",
    "decode_latents",
    "encode",
    "encode_latents",
    "explain",
    "export",
    "fast_report",
    "noise_key",
    "refresh",
    "repair",
    "restore",
    "sample_posterior",
    "scale_latents",
    "time_ids",
    "unscale_latents",
    "verify",
]

if TYPE_CHECKING:
    from fastvae.data.datasets.collate import collate as collate
    from fastvae.data.datasets.collate import time_ids as time_ids
    from fastvae.data.datasets.dataset import LatentDataset as LatentDataset
    from fastvae.data.datasets.image_dataset import ImageDataset as ImageDataset
    from fastvae.data.datasets.iterable import LatentIterable as LatentIterable
    from fastvae.data.datasets.loader import LatentLoader as LatentLoader
    from fastvae.data.datasets.sampler import BucketBatchSampler as BucketBatchSampler
    from fastvae.data.encoding.encode import encode as encode
    from fastvae.data.encoding.repair import repair as repair
    from fastvae.data.exporting.export import export as export
    from fastvae.data.rows import noise_key as noise_key
    from fastvae.data.store.verify import verify as verify
    from fastvae.fast.accelerate import accelerate as accelerate
    from fastvae.fast.accelerate import accelerated as accelerated
    from fastvae.fast.accelerate import fast_report as fast_report
    from fastvae.fast.accelerate import refresh as refresh
    from fastvae.fast.accelerate import restore as restore
    from fastvae.fast.calibration import calibrate as calibrate
    from fastvae.fast.explain import explain as explain
    from fastvae.latents.convert import decode_latents as decode_latents
    from fastvae.latents.convert import encode_latents as encode_latents
    from fastvae.latents.sampling import sample_posterior as sample_posterior
    from fastvae.latents.scaling import scale_latents as scale_latents
    from fastvae.latents.scaling import unscale_latents as unscale_latents
    from fastvae.models import AutoencoderKL as AutoencoderKL
    from fastvae.models import AutoencoderKLFlux2 as AutoencoderKLFlux2
    from fastvae.models import AutoencoderKLOutput as AutoencoderKLOutput
    from fastvae.models import DecoderOutput as DecoderOutput
    from fastvae.models import DiagonalGaussianDistribution as DiagonalGaussianDistribution
    from fastvae.report.compare import compare as compare


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fastvae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
