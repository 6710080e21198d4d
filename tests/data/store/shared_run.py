"""Program of test_leases.py: several processes encode to one output at the same time.

Arguments: the source folder, then for each output its path and, for each process that shares it, the number of the
commit at which that one dies, 0 for none, as in 0,2. Prints for each output [[exit code, report or null], ...] as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from support.small_store import SIDE, small_vae

import fastvae.data.encoding.worker
from fastvae.data.encoding.encode import encode
from fastvae.data.store.store import Store

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "device": "cpu", "shard_mb": 0.001, "workers": 1, "progress": False}


def die_at(number: int) -> None:
    """End this process at its ``number``-th commit."""
    real, calls = Store.commit, []

    def commit(store, *arguments, **facts):
        calls.append(1)
        if len(calls) == number:
            os._exit(137)
        return real(store, *arguments, **facts)

    Store.commit = commit


def share(source: str, out: str, deaths: list[int]) -> list[tuple[int, dict | None]]:
    """Return (exit code, report) of each process that encodes ``source`` to ``out``."""
    children = []
    for rank, number in enumerate(deaths):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(len(deaths))}
            die_at(number)
            report = encode(source, out, vae=small_vae(), **OPTIONS)
            Path(f"{out}.{rank}").write_text(report.to_json())
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    reports = [Path(f"{out}.{rank}") for rank in range(len(deaths))]
    return [
        (code, json.loads(path.read_text()) if path.exists() else None)
        for code, path in zip(codes, reports, strict=True)
    ]


def main() -> None:
    torch.set_num_threads(1)
    fastvae.data.encoding.worker.POLL_SECONDS = 0.05
    source, *pairs = sys.argv[1:]
    for out, deaths in zip(pairs[::2], pairs[1::2], strict=True):
        print(json.dumps(share(source, out, [int(number) for number in deaths.split(",")])))  # noqa: T201


main()
