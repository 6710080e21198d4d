"""Search the tiles of this GPU and write them to kernels/fastvae_kernels/tuned/<device>.json, as tiles.py reads them.

    python -m bench.kernels.tune [--op OP] [--copy FOLDER]

Each candidate runs through the op's own launcher, with tiles.choose patched to return it. It must be as accurate as the
shipped tile before it is timed, and replaces that tile only if it is faster by more than the spread of both. Candidates
that the compiler refuses for this device are listed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastvae_kernels.shared import tiles
from fastvae_kernels.shared.tiles import Tile

from bench.timing import operations
from bench.timing.environment import ROOT
from bench.timing.stopwatch import Stopwatch, median, spread

# The check of accuracy is in tests/support.
sys.path.append(str(ROOT / "tests"))
from support.accuracy import assert_as_accurate  # pyright: ignore[reportMissingImports]

# A smaller gain is noise from one day to the next.
LEAST_GAIN = 0.02
# Candidates that go on from the quick measurement to the careful one.
FINALISTS = 4


@dataclass(frozen=True)
class Search:
    """One table entry to find: the tile of ``op``, timed in ``case``, for at most ``channels`` channels."""

    op: str
    case: operations.Case
    channels: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    depths: tuple[int, ...] = (0,)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (1,)

    def candidates(self) -> list[Tile]:
        """Return every tile of the grid."""
        return list(itertools.starmap(Tile, itertools.product(
            self.rows, self.columns, self.depths, self.warps, self.stages
        )))  # fmt: skip


def searches() -> list[Search]:
    """Return a search for each table entry that the encoder or decoder uses; levels by their channels."""
    found = []
    pointwise = {"statistics": "group_norm_statistics", "scale_shift": "scale_shift_silu",
                 "residual_add": "residual_add", "group_norm_gradient": "group_norm_silu_backward",
                 "group_norm_sums": "group_norm_silu_backward"}  # fmt: skip
    for dtype in ("bfloat16", "float32"):
        for op, run in pointwise.items():
            for channels, side in ((128, 1024), (256, 512), (512, 256)):
                case = operations.Case(run, (1, channels, side, side), dtype)
                found.append(Search(op, case, channels, (32, 64, 128, 256), (32, 64, 128)))
        for channels, side in ((256, 256), (512, 128)):
            case = operations.Case("upsample_interleave", (1, 4 * channels, side + 1, side + 1), dtype)
            found.append(Search("upsample_interleave", case, channels, (32, 64, 128, 256), (32, 64, 128)))
        case = operations.Case("pixels_conv_in", (1, 3, 1024, 1024), dtype)
        found.append(Search("pixels_conv_in", case, 128, (32, 64, 128), (32, 64, 128)))
    forward, backward = (
        operations.Case(f"spatial_attention{end}", (1, 16384 if not end else 4096, 512)) for end in ("", "_backward")
    )
    product = {"depths": (32, 64), "warps": (4, 8), "stages": (2, 3, 4)}
    found.append(Search("attention_scores", forward, 512, (64, 128), (128, 256), **product))
    found.append(Search("attention_product", forward, 512, (64, 128), (128, 256), **product))
    found.append(Search("attention_weights", backward, 512, (64, 128), (64, 128), **product))
    # In bf16 the operation takes F(4x4), in fp32 F(2x2): a group has 8 and 32 tiles.
    for form, dtype, rows in (("winograd4", "bfloat16", (4, 8)), ("winograd2", "float32", (8, 16, 32))):
        case = operations.Case("winograd_conv", (8, 512, 64, 64), dtype)
        found += [Search(f"{form}_{end}", case, 512, rows, (32, 64, 128), warps=(4, 8)) for end in ("input", "output")]
    return found


def select(
    shipped: Tile, candidates: Iterable[Tile], quick: Callable[[Tile], float | None],
    careful: Callable[[Sequence[Tile]], dict[Tile, list[float]]],
) -> Tile:  # fmt: skip
    """Return the shipped tile, or one that is faster by more than 2 % and by more than the spread of both.

    quick: seconds of one measurement, None if the device refuses a tile. careful: samples of all finalists, in turns.
    Raises ValueError if no tile runs.
    """
    seconds = {tile: quick(tile) for tile in dict.fromkeys([shipped, *candidates])}
    able = sorted((taken, order, tile) for order, (tile, taken) in enumerate(seconds.items()) if taken is not None)
    finalists = [tile for _, _, tile in able[:FINALISTS]]
    if seconds[shipped] is not None and shipped not in finalists:
        finalists.append(shipped)
    if not finalists:
        raise ValueError(f"no tile runs on this device, not even the shipped {shipped}")
    samples = careful(finalists)
    best = min(finalists, key=lambda tile: median(samples[tile]))
    if shipped not in samples or best == shipped:
        return best
    needed = max(LEAST_GAIN, spread(samples[best]) + spread(samples[shipped]))
    return best if median(samples[best]) < (1 - needed) * median(samples[shipped]) else shipped


def entry(search: Search, tile: Tile) -> dict[str, Any]:
    """Return one line of a table. Half precisions share a tile: they have the same bytes and the same units."""
    dtypes = ["float32"] if search.case.dtype == "float32" else ["float16", "bfloat16"]
    depth = {"depth": tile.depth} if tile.depth else {}
    return {
        "op": search.op, "dtypes": dtypes, "channels": search.channels, "rows": tile.rows, "columns": tile.columns,
        **depth, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
    }  # fmt: skip


def write(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write entries into the table, one a line; its other entries stay."""
    entries = list(entries)
    # An entry that is found again replaces the old one.
    places = {(line["op"], *line["dtypes"], line["channels"]) for line in entries}
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [line for line in old if (line["op"], *line["dtypes"], line.get("channels")) not in places]
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(line)}" for line in kept + entries) + "\n]\n")


@contextlib.contextmanager
def answering(op: str, tile: Tile) -> Iterator[None]:
    """Let tiles.choose return ``tile`` for ``op``, and its usual tile for other ops."""
    before = tiles.choose

    def choose(asked: str, **described: Any) -> Tile:
        return tile if asked == op else before(asked, **described)

    tiles.choose = choose  # type: ignore[assignment]
    try:
        yield
    finally:
        tiles.choose = before


class Trial:
    """Runs of one search on the GPU: check of accuracy, quick and careful measurement."""

    def __init__(self, search: Search, device: torch.device):
        torch.manual_seed(0)
        self.search, self.device = search, device
        operation = operations.OPERATIONS[search.case.op]
        inputs = operation.make(search.case, device)
        # Two sets, each larger than the cache at these shapes.
        self.calls = [operation.ours(*operations.copied(inputs)) for _ in range(2)]
        plain = operation.plain or operation.eager
        self.plain = _tensors((operation.plain or operation.eager)(*inputs)())
        truth = (operation.truth or plain)(*operations.widened(inputs, torch.float64))
        self.truth = [value.double() for value in _tensors(truth())]
        self.refused: list[str] = []

    def quick(self, tile: Tile) -> float | None:
        """Return seconds of a call, None if the tile does not run or is less accurate than eager torch."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        with answering(self.search.op, tile):
            try:
                ours = _tensors(self.calls[0]())
                for mine, theirs, true in zip(ours, self.plain, self.truth, strict=True):
                    assert_as_accurate(mine, theirs.to(mine.dtype), true)
            except (OutOfResources, CompilationError, PTXASError, AssertionError) as reason:
                self.refused.append(f"{tile}: {type(reason).__name__}: {str(reason).splitlines()[0]}")
                return None
            return median(Stopwatch(self.device, rounds=3).interleaved({"tile": self.calls})["tile"])

    def careful(self, finalists: Sequence[Tile]) -> dict[Tile, list[float]]:
        """Return fifteen samples of each finalist, taken in turns."""

        def bound(tile: Tile, call: operations.Call) -> operations.Call:
            def run() -> None:
                with answering(self.search.op, tile):
                    call()

            return run

        contestants = {str(tile): [bound(tile, call) for call in self.calls] for tile in finalists}
        samples = Stopwatch(self.device, rounds=15).interleaved(contestants)
        return {tile: samples[str(tile)] for tile in finalists}


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this op of the tables (may be repeated)")
    parser.add_argument("--copy", type=Path, help="a folder that gets a copy of the table")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.kernels.tune times tiles on a GPU, and torch sees none here: nothing was written", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    target = tiles.target_of(device)
    path = tiles.TABLES / f"{target.name}.json"
    for search in searches():
        if chosen.op and search.op not in chosen.op:
            continue
        dtype = getattr(torch, search.case.dtype)
        shipped = tiles.choose(search.op, dtype=dtype, channels=search.channels, target=target)
        trial = Trial(search, device)
        best = select(shipped, search.candidates(), trial.quick, trial.careful)
        # After every search, so that a run that is stopped keeps what it found.
        write(path, [entry(search, best)])
        if chosen.copy:
            shutil.copy(path, chosen.copy)
        print(f"{search.op} {search.case.name}: {shipped} -> {best}; {len(trial.refused)} refused", flush=True)
        for line in trial.refused[:3]:
            print(f"    {line}")
    tiles.clear()
    print(f"{path.relative_to(ROOT)} written; now: make audit, make test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
