"""A store's rows back to images: PNG files, and a sheet of originals beside reconstructions."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from fastvae.data.dataset import LatentDataset

SHEET_GAP = 8
SHEET_PAIRS_ACROSS = 2
CAPTION_HEIGHT = 16


def decode(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rows: slice = slice(0, 16),
    vae: str | os.PathLike[str] | torch.nn.Module | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> list[tuple[str, Path]]:
    """Decode the means of ``rows`` of the latent store into PNG files in the folder ``out``: (key, file) for each.

    ``vae`` is what encode takes; by default what the store says it was made with. File names are the row's number and a
    harmless form of its key. Raises StoreError for a path that is no store, ValueError for rows that are not there or
    a model of another number of latent channels.
    """
    from PIL import Image

    from fastvae.data.dataset import LatentDataset

    dataset = LatentDataset(store)
    numbers = range(len(dataset))[rows]
    if not numbers:
        raise ValueError(f"rows must be among the store's 0:{len(dataset)}, got {rows.start}:{rows.stop}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, key, pixels in decoded_rows(dataset, numbers, vae, subfolder, revision, device):
        path = folder / f"{number:06d}-{harmless(key)}.png"
        Image.fromarray(pixels).save(path)
        written.append((key, path))
    return written


def decoded_rows(
    dataset: LatentDataset,
    numbers: Sequence[int],
    vae: Any = None,
    subfolder: str | None = None,
    revision: str | None = None,
    device: Any = None,
) -> Iterator[tuple[int, str, np.ndarray]]:
    """(row, key, uint8 [H, W, 3]) of the rows' means, one at a time."""
    import torch

    from fastvae.latents import decode_latents, scale_latents

    model = _decoder(dataset, vae, subfolder, revision, device)
    weight = next(model.decoder.parameters())
    with torch.inference_mode():
        for number in numbers:
            item = dataset[number]
            raw = item["mean"][None].to(device=weight.device, dtype=torch.float32)
            pixels = decode_latents(model, scale_latents(model, raw), output="uint8")
            yield number, item["key"], pixels[0].permute(1, 2, 0).cpu().numpy()  # type: ignore[union-attr, call-overload]


def _decoder(dataset: LatentDataset, vae: Any, subfolder: str | None, revision: str | None, device: Any) -> Any:
    import torch

    from fastvae.data.devices import DTYPES, default_dtype, settled_device
    from fastvae.data.settings import open_model

    place = settled_device(device)
    if not isinstance(vae, torch.nn.Module):
        made_with = dataset.made_with
        if vae is None:
            if made_with.get("object"):
                raise ValueError(f"vae must be given: the store was made with a {made_with['vae']} object, not a file")
            vae = made_with["vae"]
            subfolder, revision = subfolder or made_with["subfolder"], revision or made_with["revision"]
        vae = open_model(os.fspath(vae), subfolder, revision, DTYPES[default_dtype(place)], ("decoder",))
        vae = vae.to(device=place, memory_format=torch.channels_last)
    channels, taken = dataset.latent_shape[0], vae.config.latent_channels  # type: ignore[union-attr]
    if taken != channels:
        raise ValueError(f"the model decodes {taken} latent channels, the store has {channels}")
    return vae


def harmless(key: str) -> str:
    """The last part of a key as a file name that any system takes: at most 80 letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", key.rsplit("/", 1)[-1]).lstrip(".")[:80] or "image"


def parse_rows(text: str) -> slice:
    """The rows of "a:b", "a:", ":b" or "a", none negative; raises ValueError otherwise."""
    match = re.fullmatch(r"(\d*)(:?)(\d*)", text, re.ASCII)
    if not match or not (match[1] or match[2]) or (match[3] and not match[2]):
        raise ValueError(f"rows must look like 0:16, got {text!r}")
    start = int(match[1] or 0)
    if not match[2]:
        return slice(start, start + 1)
    return slice(start, int(match[3]) if match[3] else None)


def write_sheet(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], path: str | os.PathLike[str]) -> None:
    """A PNG of (caption, original, reconstruction) triples, uint8 [H, W, 3] of one size: each pair side by side."""
    from PIL import Image, ImageDraw

    if not pairs:
        raise ValueError("pairs must hold at least one picture, got none")
    height, width = pairs[0][1].shape[:2]
    across = min(SHEET_PAIRS_ACROSS, len(pairs))
    cell_width, cell_height = 2 * width + SHEET_GAP, height + CAPTION_HEIGHT + SHEET_GAP
    sheet = Image.new("RGB", (across * cell_width, math.ceil(len(pairs) / across) * cell_height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (caption, original, reconstruction) in enumerate(pairs):
        left, top = index % across * cell_width, index // across * cell_height
        draw.text((left + 2, top + 2), caption, fill=(0, 0, 0))
        sheet.paste(Image.fromarray(original), (left, top + CAPTION_HEIGHT))
        sheet.paste(Image.fromarray(reconstruction), (left + width, top + CAPTION_HEIGHT))
    sheet.save(path)
