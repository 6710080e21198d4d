"""The default device and dtype of a model, and the memory of a device."""

from __future__ import annotations

import os

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNKNOWN_MEMORY = 2**63  # more than any request, so that no check refuses one


def default_dtype(device: torch.device) -> str:
    """Return "fp16" for a GPU; for a CPU "bf16" if it has bf16 instructions, else "fp32"."""
    if device.type != "cpu":
        return "fp16"
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:  # torch before 2.12
        native = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return ``device`` as torch.device, by default the first GPU, else the CPU; raises ValueError if it is missing."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type == "cpu" and place.index:  # torch accepts any number after 'cpu:'
            raise RuntimeError("there is one CPU, and it has no number")
        torch.zeros(1, device=place).item()
    # torch raises these for an unknown name, a build or a machine without the device, and "meta".
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device must be one of this machine's, such as 'cpu' or 'cuda:0', got {str(device)!r} ({reason})"
        ) from None
    return place


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device's memory; UNKNOWN_MEMORY if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _physical_memory("SC_AVPHYS_PAGES")


def total_memory(device: torch.device) -> int:
    """Return the bytes of the device's memory; UNKNOWN_MEMORY if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _physical_memory("SC_PHYS_PAGES")


def _physical_memory(pages: str) -> int:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return UNKNOWN_MEMORY
