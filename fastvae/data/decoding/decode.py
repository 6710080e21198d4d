"""Decoding of a store's rows to PNG files and a contact sheet."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvae.data.decoding.contact_sheet import as_image, printed, write_contact_sheet
from fastvae.system.atomic_files import replace_atomically

if TYPE_CHECKING:
    import torch

    from fastvae.data.datasets.dataset import LatentDataset

CHANNELS = (1, 3, 4)
# The longest side of a picture on a contact sheet, in pixels.
THUMBNAIL = 256


def decode(
    store: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rows: slice = slice(0, 16),
    vae: str | os.PathLike[str] | torch.nn.Module | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
    device: str | torch.device | None = None,
    sheet: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[tuple[str, Path]]:
    """Decode the means (or the draws) of ``rows`` to PNG files in the folder ``out``; return (key, file) of each.

    vae: as for encode; default: the model in store.json, printed on stderr before it is opened, and refused if its
    weights have changed. A given model with other weights is used with a warning. A file name is the row's number and a
    safe form of its key. sheet: a PNG file of all images, each at most 256 pixels a side. progress: a plan line on
    stderr. Every file appears complete or not at all. Raises StoreError for a path that is not a store, ValueError for
    rows that do not exist or a model that cannot decode them to 1, 3 or 4 channels, OSError if a file cannot be
    written, ENOSPC if the disk is full.
    """
    from fastvae.data.datasets.dataset import LatentDataset

    dataset = LatentDataset(store)
    numbers = range(len(dataset))[rows]
    if not numbers:
        stop = "" if rows.stop is None else rows.stop
        raise ValueError(f"rows must be among the store's 0:{len(dataset)}, got {rows.start or 0}:{stop}")
    if sheet is not None and not Path(sheet).absolute().parent.is_dir():
        raise ValueError(f"sheet must be a file in a folder that is there, got {os.fspath(sheet)!r}")
    folder = Path(out)
    if progress:
        _announce(dataset, numbers, folder)
    written, thumbnails = [], []
    for number, key, pixels in decoded_rows(dataset, numbers, vae, subfolder, revision, device, preset):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:06d}-{safe_name(key)}.png"
        image = as_image(pixels)
        replace_atomically(path, functools.partial(image.save, format="PNG"))
        written.append((key, path))
        if sheet is not None:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnails.append((f"{number} {printed(key)}", image))
    if sheet is not None:
        write_contact_sheet(thumbnails, sheet)
    return written


def _announce(dataset: LatentDataset, numbers: Sequence[int], folder: Path) -> None:
    """Print the plan line of a decode."""
    from fastvae.data.store.store import Store
    from fastvae.system.atomic_files import free_bytes
    from fastvae.system.terminal import format_bytes, print_stderr

    most = 3 * len(numbers) * max(height * width for (height, width), _ in dataset.shards())
    free = format_bytes(free_bytes(folder))
    pending = Store.open(dataset.path).pending()
    rest = f", {pending} planned ones not committed" if pending else ""
    what = f"{len(numbers)} of {len(dataset)} rows{rest}"
    print_stderr(f"decode  {dataset.path}  {what}  at most {format_bytes(most)} (free {free})\n")


def decoded_rows(
    dataset: LatentDataset,
    numbers: Sequence[int],
    vae: Any = None,
    subfolder: str | None = None,
    revision: str | None = None,
    device: Any = None,
    preset: str | None = None,
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield (row, key, uint8 [H, W, C]) of the rows' means or draws; C: the model's out_channels, 1, 3 or 4."""
    import torch

    from fastvae.latents.convert import decode_latents
    from fastvae.latents.scaling import scale_latents

    model = _decoder(dataset, vae, subfolder, revision, device, preset)
    weight = next(model.parameters())
    with torch.inference_mode():
        for number in numbers:
            item = dataset[number]
            latents = item["latents" if "latents" in item else "mean"]
            raw = latents[None].to(device=weight.device, dtype=torch.float32)
            pixels = decode_latents(model, scale_latents(model, raw), output="uint8")
            yield number, item["key"], pixels[0].permute(1, 2, 0).cpu().numpy()  # type: ignore[union-attr, call-overload]


def _decoder(
    dataset: LatentDataset,
    vae: Any,
    subfolder: str | None,
    revision: str | None,
    device: Any,
    preset: str | None,
) -> Any:
    import torch

    from fastvae.data.encoding.model import name_of, named_model, open_model
    from fastvae.data.store.store import Store
    from fastvae.fast.accelerate import accelerate
    from fastvae.latents.autoencoder import check_autoencoder, check_part
    from fastvae.system.devices import DTYPES, default_dtype, resolve_device

    place = resolve_device(device)
    is_given = vae is not None
    if isinstance(vae, torch.nn.Module):
        check_autoencoder(vae)
        check_part(vae, "decoder")
        _check_channels(dataset, vae)
        if getattr(vae, "encoder", None) is not None:
            _check_weights(dataset, lambda: vae, type(vae).__name__, is_given)
        return vae
    vae, subfolder, revision, preset = named_model(Store.open(dataset.path), vae, subfolder, revision, preset)
    name = name_of(vae)
    model = open_model(name, subfolder, revision, DTYPES[default_dtype(place)], ("decoder",), preset)
    _check_channels(dataset, model)
    if not _has_same_files(dataset, model):
        _check_weights(
            dataset, lambda: open_model(name, subfolder, revision, torch.float32, ("encoder",), preset), name, is_given
        )
    model = model.requires_grad_(False).to(device=place)
    # On a CPU torch's GroupNorm loses digits in channels_last (docs/numerics.md).
    return model if place.type == "cpu" else accelerate(model.to(memory_format=torch.channels_last), freeze=True)


def _check_channels(dataset: LatentDataset, model: Any) -> None:
    channels, taken = dataset.latent_channels, model.config.latent_channels
    if taken != channels:
        raise ValueError(f"the model decodes {taken} latent channels, the store has {channels}")
    if model.config.out_channels not in CHANNELS:
        raise ValueError(f"the model decodes to {model.config.out_channels} channels; a picture has 1, 3 or 4")


def _has_same_files(dataset: LatentDataset, model: Any) -> bool:
    from fastvae.data.encoding.model import weight_files

    stored = dataset.made_with.get("files")
    return bool(stored) and weight_files(model) == stored


def _check_weights(dataset: LatentDataset, encoder: Callable[[], Any], name: str, is_given: bool) -> None:
    """Raise ValueError for a model whose encoder has other weights than the store's; only warn if it ``is_given``."""
    from fastvae.data.encoding.model import model_identity

    if model_identity(encoder())["encoder_weights_sha256"] == dataset.encoder_weights:
        return
    if not is_given:
        raise ValueError(
            f"{name} holds other weights than those the store was made with: name the model by vae (--vae), and it is "
            "taken whatever it holds"
        )
    warnings.warn(f"{name} is another model than the one {dataset.path} was made with", stacklevel=2)


def safe_name(key: str) -> str:
    """Return the last part of a key as a file name for any system: at most 80 letters, digits, dots, dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", key.rsplit("/", 1)[-1]).lstrip(".")[:80] or "image"


def parse_rows(text: str) -> slice:
    """Parse "a:b", "a:", ":b" or "a", none negative; raises ValueError otherwise."""
    match = re.fullmatch(r"(\d*)(:?)(\d*)", text, re.ASCII)
    if not match or not (match[1] or match[2]) or (match[3] and not match[2]):
        raise ValueError(f"rows must look like 0:16, got {text!r}")
    start = int(match[1] or 0)
    if not match[2]:
        return slice(start, start + 1)
    return slice(start, int(match[3]) if match[3] else None)
