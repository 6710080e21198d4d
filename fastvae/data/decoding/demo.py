"""scikit-image's photographs to latents and back, for ``fastvae demo``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastvae.data.encoding.report import EncodeReport

# Photographs in scikit-image's wheel; none of them is in the embedded model's training data.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina")
SIDE = 256


@dataclass
class DemoReport:
    """Result of the demo: paths of its files, PSNR of the reconstructions (dB), and the report of encode."""

    photographs: str
    store: str
    sheet: str
    psnr: dict[str, float]
    mean_psnr: float
    encode: EncodeReport

    def facts(self) -> dict[str, Any]:
        """Return the report as values for strict_json, which writes an infinite PSNR as null."""
        return {**asdict(self), "images_per_second": self.encode.images_per_second}


def write_photographs(folder: Path) -> list[Path]:
    """Write the photographs as JPEG files; raises ImportError, which names the extra, if scikit-image is missing."""
    try:
        from skimage import data
    except ImportError:
        raise ImportError("the demo's photographs come from scikit-image: pip install scikit-image") from None
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in PHOTOGRAPHS:
        path = folder / f"{name}.jpg"
        if not path.exists():
            Image.fromarray(getattr(data, name)()).save(path, quality=95)
        written.append(path)
    return written


def demonstrate(out: Path, *, vae: Any = "tiny", progress: bool = True) -> DemoReport:
    """Write photographs, a store of their latents, and a sheet of originals beside reconstructions to ``out``.

    Raises what encode and decode raise, and ImportError without scikit-image.
    """
    from fastvae.data.datasets.dataset import LatentDataset
    from fastvae.data.decoding.contact_sheet import write_sheet
    from fastvae.data.decoding.decode import decoded_rows
    from fastvae.data.encoding.encode import encode
    from fastvae.data.images.crop import to_bucket
    from fastvae.data.images.read import read_image
    from fastvae.metrics import psnr

    photographs, store, sheet = out / "photographs", out / "latents", out / "originals-and-reconstructions.png"
    write_photographs(photographs)
    report = encode(photographs, store, vae=vae, buckets=SIDE, progress=progress)
    dataset = LatentDataset(store)
    pairs, quality = [], {}
    for _, key, reconstruction in decoded_rows(dataset, range(len(dataset)), vae):
        original, _ = to_bucket(read_image(photographs / key, at_least=SIDE), SIDE)
        quality[key] = round(psnr(original, reconstruction), 2)
        pairs.append((f"{key}  {quality[key]:.1f} dB", original, reconstruction))
    write_sheet(pairs, sheet)
    mean = round(sum(quality.values()) / len(quality), 2)
    return DemoReport(str(photographs), str(store), str(sheet), quality, mean, report)
