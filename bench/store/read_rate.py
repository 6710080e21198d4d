"""Rate at which one process reads SDXL-sized rows from a warm page cache, beside a copy of as many bytes.

    python -m bench.store.read_rate [--rows 4096] [--rounds 7] [--folder DIR] [--results bench/results/cpu/reading.json]

A row is [4, 128, 128] of mean and log-variance in fp16, 256 KiB. Rows come in random order through a DataLoader without
workers, BucketBatchSampler and collate, and every byte is copied into a tensor of its batch. The copy gathers the same
rows from ordinary memory into an existing tensor: the highest rate of this machine's memory. Both take turns. Results
are medians by wall time and by CPU seconds, which other processes do not change much. The same is measured with
``scaled=True``, in fp32, and with ``posterior="sample"``, which draws every row on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import fastvae
from bench.timing.environment import surroundings
from fastvae.data.rows import SourceFile
from fastvae.data.store.leases import Leases
from fastvae.data.store.plan import PlannedRow
from fastvae.data.store.shard import ShardRow
from fastvae.data.store.store import Store

SIDE, CHANNELS = 128, 4
LAYOUT = {
    "buckets": ["1024x1024"],
    "latent_channels": CHANNELS,
    "downsample_factor": 8,
    "scaling": {
        "scaling_factor": 0.13025,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "batch_norm": False,
    },
    "metadata": {"fvl": "1"},
    "source": {"vae": "generated"},
    "created_by": "bench.store.read_rate",
}
IDENTITY = {
    "model": {"encoder_weights_sha256": "0"},
    "numerics": {"dtype": "fp32", "posterior": "dist", "mean": "fp16", "logvar": "fp16"},
    "preprocess": {},
}


def write_store(path: Path, rows: int) -> None:
    """Write generated moments in shards of 1,000 rows, about 256 MB, as encode writes them."""
    generator = torch.Generator().manual_seed(0)
    bucket = (8 * SIDE, 8 * SIDE)
    path.mkdir()
    with Leases(path / "leases") as leases:
        store = Store.create_or_open(path, IDENTITY, LAYOUT, leases)
        planned = [PlannedRow(SourceFile(f"photographs/{number:08}.jpg", 1, 0), 0, bucket) for number in range(rows)]
        for unit in store.extend_plan([(bucket, row) for row in planned], lambda bucket: 1000):
            values = torch.randn((2, len(unit.rows), CHANNELS, SIDE, SIDE), generator=generator).half().numpy()
            made = zip(unit.rows, *values, strict=True)
            store.commit(
                unit, [ShardRow(row.file.key, mean, logvar, bucket, (0, 0, *bucket)) for row, mean, logvar in made]
            )


def read_epoch(path: Path, batch: int, **options: Any) -> Callable[[], int]:
    """Return a function that reads one epoch and returns the number of its rows."""
    dataset = fastvae.LatentDataset(path, **options)
    sampler = fastvae.BucketBatchSampler(dataset, batch, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=fastvae.collate)

    def epoch() -> int:
        sampler.set_epoch(dataset.epoch + 1)
        return sum(len(batch["key"]) for batch in loader)

    return epoch


def copy_rows(rows: int, batch: int) -> Callable[[], int]:
    """Return a function that gathers as many rows, at random, from memory into one tensor."""
    source = torch.zeros((rows, 2, CHANNELS, SIDE, SIDE), dtype=torch.float16).fill_(1)
    target = torch.zeros((batch, *source.shape[1:]), dtype=torch.float16)

    def copy() -> int:
        for numbers in torch.randperm(rows).split(batch):
            torch.index_select(source, 0, numbers, out=target[: len(numbers)])
        return rows

    return copy


def measured(ways: dict[str, Callable[[], int]], rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return rows a second of each way, measured in turns: median and best, by wall and by CPU time."""
    rates: dict[str, list[list[float]]] = {name: [] for name in ways}
    for name, way in list(ways.items()) * (rounds + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        assert way() == rows
        rates[name].append([rows / (time.perf_counter() - wall), rows / (time.process_time() - cpu)])
    found = {}
    for name, each in rates.items():
        by_wall, by_cpu = zip(*each[1:], strict=True)  # the first round opens the shards
        found[name] = {
            "rows_per_s": round(statistics.median(by_wall)),
            "best_rows_per_s": round(max(by_wall)),
            "rows_per_cpu_s": round(statistics.median(by_cpu)),
            "best_rows_per_cpu_s": round(max(by_cpu)),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="folder of the temporary store; default: the system's")
    parser.add_argument("--results", type=Path, help="write the results to this JSON file")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rows": chosen.rows, "bytes_per_row": 4 * CHANNELS * SIDE * SIDE} | surroundings()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        store, few = Path(folder) / "store", Path(folder) / "few"
        write_store(store, chosen.rows)
        write_store(few, 256)
        for batch in (16, 64):
            ways = {"read": read_epoch(store, batch), "copy": copy_rows(chosen.rows, batch)}
            found[f"batch {batch}"] = measured(ways, chosen.rows, chosen.rounds)
        found["scaled"] = measured({"read": read_epoch(store, 64, scaled=True)}, chosen.rows, chosen.rounds)
        found["sample"] = measured({"read": read_epoch(few, 64, posterior="sample")}, 256, chosen.rounds)
    print(json.dumps(found, indent=1))
    if chosen.results:
        chosen.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
