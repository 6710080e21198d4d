"""Checks of ``fastvae doctor``: each finding is one sentence with the state and, if needed, the remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastvae
from fastvae.report.findings import BAD, NOTE, OK, Finding
from fastvae.report.machine import driver, processor, versions
from fastvae.system.terminal import format_bytes

OLDEST = {"torch": (2, 11), "triton": (3, 6), "python": (3, 11), "diffusers": (0, 38)}
OPTIONAL = {"diffusers"}
DISTRIBUTION = "fastvae-latents"


def examine(
    vae: str = "tiny",
    folder: str = ".",
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    preset: str | None = None,
) -> Iterator[Finding]:
    """Check the installation, the GPU, the kernels, the model, the image decoder and the disk, one after another.

    vae: the model, whose structure, numbers and paths are checked, with subfolder, revision and preset as in compare.
    folder: the planned folder of latents; it need not exist. A failed check is a finding and raises nothing.
    """
    yield check_versions(versions())
    yield check_distribution()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing or broken
        yield Finding("torch", BAD, f"torch cannot be imported, so nothing else was checked: {error}")
        return
    from fastvae.report import torch_checks
    from fastvae.system.devices import resolve_device

    yield check_gpu(torch)
    device = resolve_device(None)
    yield torch_checks.check_kernels(device)
    found, model = torch_checks.check_model(vae, subfolder, revision, preset)
    yield found
    if model is not None:
        yield torch_checks.check_numbers(vae, model, device)
        yield torch_checks.check_paths(vae, model, device)
    yield torch_checks.check_forms(device)
    yield torch_checks.check_images()
    yield check_disk(Path(folder))


def check_versions(found: dict[str, str]) -> Finding:
    """Check that the installed versions are new enough for fastvae."""
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    needed = [name for name in OLDEST if name not in OPTIONAL and (name != "triton" or platform.system() == "Linux")]
    missing = [name for name in needed if name not in found]
    old = [name for name, oldest in OLDEST.items() if name in found and _parsed(found[name]) < oldest]
    if missing:
        return Finding("versions", BAD, f"{missing[0]} is not installed: pip install {missing[0]} ({listed})", found)
    if old:
        least = ".".join(str(part) for part in OLDEST[old[0]])
        remedy = "install" if old[0] == "python" else f'pip install "{old[0]}>={least}", for fastvae needs'
        sentence = f"{old[0]} {found[old[0]]} is too old: {remedy} {least} or newer ({listed})"
        return Finding("versions", BAD, sentence, found)
    return Finding("versions", OK, listed, found)


def check_distribution() -> Finding:
    """Check that the imported fastvae is the installed one: another distribution on PyPI has the same import name."""
    place = os.path.dirname(os.path.abspath(fastvae.__file__))
    facts = {"distribution": DISTRIBUTION, "place": place}
    try:
        facts["other"] = f"fastvae {importlib.metadata.version('fastvae')}"
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        remedy = f"pip uninstall fastvae, and install {DISTRIBUTION} again"
        sentence = f"{facts['other']} of other authors is installed under the same import name, {place}: {remedy}"
        return Finding("install", BAD, sentence, facts)
    try:
        facts["version"] = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return Finding("install", NOTE, f"fastvae is imported from {place}; {DISTRIBUTION} is not installed", facts)
    return Finding("install", OK, f"{DISTRIBUTION} {facts['version']}, imported from {place}", facts)


def _parsed(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version such as 2.13.0+cpu; a part that is no number counts as 0."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def check_gpu(torch: Any) -> Finding:
    """Check which GPUs torch can use, and why it cannot use a GPU that exists."""
    shown = driver()
    built = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        facts = {
            "gpus": [card.name for card in cards],
            "memory_bytes": [card.total_memory for card in cards],
            "driver": shown,
            "cuda": built,
        }
        listed = ", ".join(
            f"{card.name} ({format_bytes(card.total_memory)}, sm_{card.major}{card.minor})" for card in cards
        )
        sentence = f"{listed}, driver {shown or 'unknown'}, torch built for {built}"
        if torch.version.cuda and min(card.major for card in cards) < 8:
            return Finding(
                "gpu", NOTE, f"{sentence}; the kernels are for sm_80 and newer; older ones are untested", facts
            )
        return Finding("gpu", OK, sentence, facts)
    facts = {"gpus": [], "driver": shown, "cuda": built}
    if shown and not built:
        return Finding(
            "gpu",
            BAD,
            f"there is an NVIDIA GPU here (driver {shown}), but torch {torch.__version__} is a CPU build: install one "
            "with CUDA from pytorch.org",
            facts,
        )
    if shown:
        return Finding(
            "gpu",
            BAD,
            f"there is an NVIDIA GPU here (driver {shown}), but torch (CUDA {built}) cannot use it: update the driver, "
            "or correct CUDA_VISIBLE_DEVICES",
            facts,
        )
    return Finding("gpu", NOTE, f"no GPU was found, so everything runs on the CPU: {processor()}", facts)


def check_disk(folder: Path, repeats: int = 5) -> Finding:
    """Measure write and fsync of 1 MiB in ``folder``, or in the nearest existing folder above it."""
    import errno
    import os
    import shutil
    import statistics
    import tempfile

    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    seconds = []
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        free = shutil.disk_usage(place).free
        with tempfile.TemporaryFile(dir=place) as file:
            for _ in range(repeats):
                begin = time.perf_counter()
                file.write(os.urandom(2**20))
                file.flush()
                os.fsync(file.fileno())
                seconds.append(time.perf_counter() - begin)
    except OSError as error:
        return Finding("disk", BAD, f"{place} cannot be written ({error.strerror}): choose another folder for latents")
    taken = statistics.median(seconds)
    facts = {"folder": str(place), "fsync_seconds": seconds, "free_bytes": free}
    sentence = f"1 MiB is written to {place} in {1e3 * taken:.1f} ms (fsync), {format_bytes(free)} are free"
    if free < 2**30:
        return Finding("disk", NOTE, f"{sentence}: a million latents of 256x256 need 15.3 GiB", facts)
    if taken > 0.2:
        return Finding("disk", NOTE, f"{sentence}: that is slow; use a local disk", facts)
    return Finding("disk", OK, sentence, facts)
