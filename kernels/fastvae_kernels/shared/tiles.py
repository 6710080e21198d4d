"""Choice of a kernel's tile: a pure function of op, dtype, channels and device, over the tables in tuned/.

No tile depends on the batch or the image size, so a row's bits do not either; nothing is tuned at the first call.
A table is a list of entries: op, dtypes, channels (the most it serves; absent: any), shared_memory (the bytes it needs;
absent: 0), rows, columns, depth, num_warps, num_stages. tuned/<device>.json comes before tuned/<architecture>.json,
and tuned/default.json is last: it must serve every op on every device.

Names in the kernels, and those that other Triton code has for them:

    ROWS, COLUMNS, DEPTH           BLOCK_M, BLOCK_N, BLOCK_K: pixels, channels, summed channels of a program's tile
    QUERIES, KEYS                  BLOCK_M and BLOCK_N of attention
    CHUNK                          the pixels of one triple of partial statistics, walked in steps of ROWS
    locate, place_of               from tl.program_id to image, pid_m and pid_n
    inside, valid                  masks
    nothing_yet, take, described   begin, accumulate and finalize statistics
    anchor                         the value that sums are taken from, so that a large mean costs no digits
    opened                         sigmoid(z)
    plain, along, normal           sums over pixels of dz, dz n and n, with n the normalised value
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).parents[1] / "tuned"


@dataclass(frozen=True)
class Target:
    """Facts of a device that tiles depend on: architecture, bytes of shared memory of a program, name of the card."""

    architecture: str
    shared_memory: int
    name: str = ""


# The devices of the compile audit; shared memory per program from the vendors' tables.
TARGETS = {
    target.architecture: target
    for target in (
        Target("sm_80", 163 * 1024),
        Target("sm_86", 99 * 1024),
        Target("sm_89", 99 * 1024),
        Target("sm_90", 227 * 1024),
        Target("sm_100", 227 * 1024),
        Target("sm_120", 99 * 1024),
        Target("gfx942", 64 * 1024),
    )
}
# The interpreter has no limit; it takes the tiles of the smallest device.
INTERPRETER = Target("interpreter", 64 * 1024)


@dataclass(frozen=True)
class Tile:
    """The values that one program processes at a time.

    rows: pixels, or queries. columns: channels, or keys. depth: channels of one step of a product; 0 without a
    product.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@functools.cache
def _described(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    name = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-")
    if torch.version.hip:
        return Target(properties.gcnArchName.split(":")[0], 64 * 1024, name)
    return Target(f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin, name)


def target_of(device: torch.device) -> Target:
    """Return the target of tensors on this device; a CPU is the interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    return _described(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _table(name: str) -> tuple[dict[str, Any], ...]:
    path = TABLES / f"{name}.json"
    return tuple(json.loads(path.read_text())) if name and path.exists() else ()


def _serves(entry: dict[str, Any], op: str, dtype: str, channels: int, target: Target) -> bool:
    return (
        entry["op"] == op
        and dtype in entry["dtypes"]
        and entry.get("channels", channels) >= channels
        and entry.get("shared_memory", 0) <= target.shared_memory
    )


@functools.cache
def choose(op: str, *, dtype: torch.dtype, channels: int, target: Target) -> Tile:
    """Return the tile for ``op`` on values of ``dtype`` with ``channels`` channels.

    The first table that serves the op wins. In it the entry for the fewest sufficient channels wins, and among equal
    ones the entry with the most shared memory. Raises ValueError when none serves.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    for table in (target.name, target.architecture, "default"):
        entries = [entry for entry in _table(table) if _serves(entry, op, dtype_name, channels, target)]
        if entries:
            best = min(entries, key=lambda e: (e.get("channels", float("inf")), -e.get("shared_memory", 0)))
            return Tile(best["rows"], best["columns"], best.get("depth", 0), best["num_warps"], best["num_stages"])
    raise ValueError(
        f"no tile for op {op!r}, dtype {dtype_name}, {channels} channels on {target.architecture} "
        f"with {target.shared_memory} bytes of shared memory"
    )


def audited() -> list[tuple[str, torch.dtype, int]]:
    """Return (name, dtype, channels) of the passes over images that the compile audit compiles.

    They are the networks' channels in every dtype, and in fp32 and fp16 also channels that do not fill a block or that
    have chunks of 32 pixels.
    """
    halves, full = [torch.bfloat16, torch.float16], [torch.float32]
    variants = [(dtype, channels) for dtype in halves + full for channels in (128, 256, 512)]
    variants += [(dtype, channels) for dtype in halves[1:] + full for channels in (24, 48, 80, 96, 1024)]
    return [(f"{dtype} C={channels}".removeprefix("torch."), dtype, channels) for dtype, channels in variants]


def clear() -> None:
    """Forget the tables read so far, after a change of their files (bench/kernels/tune.py, tests)."""
    _table.cache_clear()
    choose.cache_clear()
