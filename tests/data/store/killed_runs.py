"""Program of test_store.py: encodes once for each point between two system calls, and dies there.

Arguments: the source folder, a folder for the stores. Prints one line for each point: its name and the child's exit
code, 137 when it was killed, 0 once the run is shorter than that.
"""

import os
import sys
from pathlib import Path

import torch
from support.small_store import SIDE, small_vae

import fastvae.data.encoding.run
import fastvae.system.atomic_files
from fastvae.data.encoding.encode import encode


def die_at(name: str, number: int) -> None:
    """End this process at its ``number``-th os.replace or os.link, before or after the call."""
    moment, call = name.split(" ")
    real = getattr(os, call)
    state = {"left": number}

    def dying(*arguments):
        state["left"] -= 1
        if state["left"] == 0 and moment == "before":
            os._exit(137)
        real(*arguments)
        if state["left"] == 0:
            os._exit(137)

    setattr(fastvae.system.atomic_files.os, call, dying)


def main() -> None:
    source, stores = sys.argv[1:]
    torch.set_num_threads(1)
    vae = small_vae()
    fastvae.data.encoding.run.check_fast_path = lambda encoder: None  # as in the test
    for name in ("before replace", "after replace", "before link", "after link"):
        for number in range(1, 40):
            child = os.fork()
            if child == 0:
                die_at(name, number)
                encode(
                    source,
                    Path(stores) / f"{name} {number}",
                    vae=vae,
                    buckets=SIDE,
                    dtype="fp32",
                    device="cpu",
                    shard_mb=0.002,
                    workers=1,
                    progress=False,
                )
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(f"{name} {number}\t{code}", flush=True)  # noqa: T201
            if code == 0:
                break


main()
