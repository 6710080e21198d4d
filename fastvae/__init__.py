"""fastvae: diffusers' AutoencoderKL, fast, with the same latents.

Every name here is loaded when it is first used, so that ``import fastvae`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AutoencoderKL": "fastvae.models",
    "AutoencoderKLFlux2": "fastvae.models",
    "AutoencoderKLOutput": "fastvae.models",
    "BucketBatchSampler": "fastvae.data.sampler",
    "DecoderOutput": "fastvae.models",
    "DiagonalGaussianDistribution": "fastvae.models",
    "LatentDataset": "fastvae.data.dataset",
    "LatentIterable": "fastvae.data.iterable",
    "LatentLoader": "fastvae.data.loader",
    "accelerate": "fastvae.fast.accelerate",
    "accelerated": "fastvae.fast.accelerate",
    "calibrate": "fastvae.fast.calibration",
    "collate": "fastvae.data.collate",
    "compare": "fastvae.report.compare",
    "decode_latents": "fastvae.latents",
    "encode": "fastvae.data.encode",
    "encode_latents": "fastvae.latents",
    "explain": "fastvae.fast.explain",
    "export": "fastvae.data.export",
    "fast_report": "fastvae.fast.accelerate",
    "noise_key": "fastvae.data.noise",
    "refresh": "fastvae.fast.accelerate",
    "repair": "fastvae.data.repair",
    "restore": "fastvae.fast.accelerate",
    "sample_posterior": "fastvae.sampling",
    "scale_latents": "fastvae.latents",
    "unscale_latents": "fastvae.latents",
    "verify": "fastvae.data.verify",
}

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLOutput",
    "BucketBatchSampler",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
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
    "unscale_latents",
    "verify",
]

if TYPE_CHECKING:
    from fastvae.data.collate import collate as collate
    from fastvae.data.dataset import LatentDataset as LatentDataset
    from fastvae.data.encode import encode as encode
    from fastvae.data.export import export as export
    from fastvae.data.iterable import LatentIterable as LatentIterable
    from fastvae.data.loader import LatentLoader as LatentLoader
    from fastvae.data.noise import noise_key as noise_key
    from fastvae.data.repair import repair as repair
    from fastvae.data.sampler import BucketBatchSampler as BucketBatchSampler
    from fastvae.data.verify import verify as verify
    from fastvae.fast.accelerate import accelerate as accelerate
    from fastvae.fast.accelerate import accelerated as accelerated
    from fastvae.fast.accelerate import fast_report as fast_report
    from fastvae.fast.accelerate import refresh as refresh
    from fastvae.fast.accelerate import restore as restore
    from fastvae.fast.calibration import calibrate as calibrate
    from fastvae.fast.explain import explain as explain
    from fastvae.latents import decode_latents as decode_latents
    from fastvae.latents import encode_latents as encode_latents
    from fastvae.latents import scale_latents as scale_latents
    from fastvae.latents import unscale_latents as unscale_latents
    from fastvae.models import AutoencoderKL as AutoencoderKL
    from fastvae.models import AutoencoderKLFlux2 as AutoencoderKLFlux2
    from fastvae.models import AutoencoderKLOutput as AutoencoderKLOutput
    from fastvae.models import DecoderOutput as DecoderOutput
    from fastvae.models import DiagonalGaussianDistribution as DiagonalGaussianDistribution
    from fastvae.report.compare import compare as compare
    from fastvae.sampling import sample_posterior as sample_posterior


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fastvae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
