"""What ``fastvae doctor`` looks at: a finding is one sentence that says how things are and, if needed, what to do."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastvae.report.findings import BAD, NOTE, OK, Finding
from fastvae.report.machine import driver, processor, versions
from fastvae.system.terminal import format_bytes

OLDEST = {"torch": (2, 11), "triton": (3, 6), "python": (3, 11), "diffusers": (0, 38)}
OPTIONAL = {"diffusers"}


def examine(
    vae: str = "tiny", folder: str = ".", *, subfolder: str | None = None, revision: str | None = None
) -> Iterator[Finding]:
    """Look at the installation, the GPU, the kernels, the numbers, the image decoder and the disk, one after another.

    folder: where latents would go; it need not be there yet. Nothing is raised for what is out of order.
    """
    yield check_versions(versions())
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing or broken
        yield Finding("torch", BAD, f"torch cannot be imported, so nothing else was looked at: {error}")
        return
    from fastvae.report import torch_checks as health
    from fastvae.system.devices import resolve_device

    yield check_gpu(torch)
    device = resolve_device(None)
    checks: list[Callable[[], Finding]] = [
        lambda: health.check_kernels(device),
        lambda: health.check_numbers(device),
        lambda: health.check_paths(vae, subfolder, revision, device),
        health.check_images,
        lambda: check_disk(Path(folder)),
    ]
    for check in checks:
        yield check()


def check_versions(found: dict[str, str]) -> Finding:
    """Whether what is installed is as new as fastvae needs it."""
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    needed = [name for name in OLDEST if name not in OPTIONAL and (name != "triton" or platform.system() == "Linux")]
    missing = [name for name in needed if name not in found]
    old = [name for name, oldest in OLDEST.items() if name in found and _parsed(found[name]) < oldest]
    if missing:
        return Finding("versions", BAD, f"{missing[0]} is not installed: pip install {missing[0]} ({said})", found)
    if old:
        least = ".".join(str(part) for part in OLDEST[old[0]])
        mend = "install" if old[0] == "python" else f'pip install "{old[0]}>={least}", for fastvae needs'
        sentence = f"{old[0]} {found[old[0]]} is too old: {mend} {least} or newer ({said})"
        return Finding("versions", BAD, sentence, found)
    return Finding("versions", OK, said, found)


def _parsed(version: str) -> tuple[int, ...]:
    """The first two numbers of a version such as 2.13.0+cpu; a part that is no number counts as 0."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


def check_gpu(torch: Any) -> Finding:
    """Which GPUs torch can use, and why none where one should be there."""
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
                "gpu", NOTE, f"{sentence}; the kernels are made for sm_80 and newer, older ones are untested", facts
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
            "or mend CUDA_VISIBLE_DEVICES",
            facts,
        )
    return Finding("gpu", NOTE, f"no GPU was found, so everything runs on the CPU: {processor()}", facts)


def check_disk(folder: Path, repeats: int = 5) -> Finding:
    """How long a file of 1 MiB takes to be safe in ``folder``, or in the nearest folder above it that is there."""
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
        return Finding("disk", BAD, f"{place} cannot be written ({error.strerror}): give latents another folder")
    taken = statistics.median(seconds)
    facts = {"folder": str(place), "fsync_seconds": seconds, "free_bytes": free}
    sentence = f"1 MiB is safe in {place} after {1e3 * taken:.1f} ms (fsync), {format_bytes(free)} are free"
    if free < 2**30:
        return Finding("disk", NOTE, f"{sentence}: that is little, a million latents of 256x256 need 15.3 GiB", facts)
    if taken > 0.2:
        return Finding("disk", NOTE, f"{sentence}: that is slow, a local disk would not be", facts)
    return Finding("disk", OK, sentence, facts)
