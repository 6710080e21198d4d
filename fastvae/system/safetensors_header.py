"""How long the header of a safetensors file may be. Knows neither torch nor what the tensors are for.

The safetensors package takes 100 MB of JSON, and a million empty tensors in it cost it most of a gigabyte.
"""

from __future__ import annotations

import os

# A shard of a store has eleven tensors; the largest checkpoints in use, of whole pipelines, have under a megabyte.
SHARD_HEADER, WEIGHTS_HEADER = 2**20, 2**24


def check_header(path: str | os.PathLike[str], most: int) -> None:
    """Raises ValueError, in words that follow the file's name, where its header is longer than ``most`` bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > most:
        raise ValueError(f"its header is {size} bytes long, and {most} are taken")
