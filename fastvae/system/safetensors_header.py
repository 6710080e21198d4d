"""Maximum length of a safetensors header.

The safetensors package accepts 100 MB of JSON; a million empty tensors in it take most of a gigabyte of memory.
"""

from __future__ import annotations

import os

# A shard has eleven tensors. Headers of the largest checkpoints in use, of whole pipelines, are under a megabyte.
SHARD_HEADER, WEIGHTS_HEADER = 2**20, 2**24


def check_header(path: str | os.PathLike[str], most: int) -> None:
    """Raise ValueError, whose text continues the file's name, if the header is longer than ``most`` bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > most:
        raise ValueError(f"its header is {size} bytes long, and {most} are taken")
