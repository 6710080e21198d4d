"""The library of C kernels: loaded once, or the reason why there is none."""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.cpu import sources

INT, POINTER = ctypes.c_int64, ctypes.c_void_p
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NOT_BUILT = "the C kernels are not built: install fastvae again where a C compiler with OpenMP is"
OTHER_SOURCES = "the C kernels were built from other sources: install fastvae again"
NOT_LINUX = "the C kernels are built on Linux only"
NO_AVX2 = "this CPU has no AVX2, which the C kernels need"


# Floats of a vector in the functions for AVX512.
LANES_AVX512 = 16


class Library:
    """The loaded library; ``why_not`` is the reason why it is missing, or None.

    Its functions are built twice by GCC on x86, for AVX2 and for AVX512, with the same bits.
    """

    def __init__(self) -> None:
        self.functions: Any = None
        self.why_not: str | None = None
        self.has_avx512 = False
        built = sorted((sources.FOLDER / "built").glob("kernels*.so"))
        if platform.machine() in sources.X86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
            self.why_not = NO_AVX2
        elif not built:
            self.why_not = NOT_BUILT if platform.system() == "Linux" else NOT_LINUX
        else:
            self._load(str(built[0]))

    def _load(self, path: str) -> None:
        try:
            functions = ctypes.CDLL(path)
            functions.fastvae_sources.restype = ctypes.c_char_p
            is_of_these = functions.fastvae_sources().decode() == sources.source_hash()
        except (OSError, AttributeError) as error:  # a library or a source is missing, or the file is another one
            self.why_not = f"the C kernels cannot be loaded: {error}"
            return
        if not is_of_these:
            self.why_not = OTHER_SOURCES
            return
        self.functions = functions
        self.has_avx512 = (
            platform.machine() in sources.X86
            and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and hasattr(functions, "fastvae_norm_avx512")
        )

    def function(self, name: str, channels: int) -> Any:
        """Return a C function for images of so many channels: that of AVX512 if this CPU and the channels allow it."""
        return getattr(
            self.functions, f"fastvae_{name}" + ("_avx512" if self.has_avx512 and channels % LANES_AVX512 == 0 else "")
        )


@functools.cache
def library() -> Library:
    """Return the library, loaded at the first call."""
    return Library()


def why_not() -> str | None:
    """Return why the C kernels do not run on this machine, or None."""
    return library().why_not


def build_name() -> str:
    """Return "built for AVX512", "built for AVX2" or "built": the C kernels in use; or why they do not run."""
    if library().why_not is not None or platform.machine() not in sources.X86:
        return library().why_not or "built"
    return "built for AVX512" if library().has_avx512 else "built for AVX2"


def empty(size: int, dtype: torch.dtype) -> Tensor:
    """Return new memory on the CPU for so many values, in pages of 2 MiB where the system gives some.

    At first use a page of 4 KiB takes about a microsecond: of an encode of 512² in fp32 on two cores a fifth.
    """
    memory = torch.empty(size, dtype=dtype, device="cpu")
    if library().why_not is None:
        library().functions.fastvae_huge_pages(POINTER(address(memory)), INT(memory.nbytes))
    return memory


def check_images(**images: Tensor | None) -> None:
    """Raise ValueError unless the images [N, C, H, W] are in channels_last and have one dtype; None is left out."""
    given = {name: image for name, image in images.items() if image is not None}
    dtype = next(iter(given.values())).dtype
    for name, image in given.items():
        if image.dtype != dtype or dtype not in DTYPES:
            raise ValueError(f"{' and '.join(given)} must have one dtype of {[*DTYPES]}, got {name} of {image.dtype}")
        if not image.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name} must be in channels_last, got {tuple(image.shape)} with the strides {image.stride()}"
            )


def address(values: Tensor | None) -> int | None:
    """Return the address of a tensor's first value, or None."""
    return None if values is None else values.data_ptr()
