"""Repairs that are killed: the same call continues them."""

import os
import shutil
from pathlib import Path

import pytest
from support.repairs import flip, mend
from support.small_store import picture
from support.store_checks import committed, failures

from fastvae.data.store.verify import verify

KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import fastvae.system.atomic_files as atomic
from fastvae.data.encoding.repair import repair
source, retry, real, calls = sys.argv[1], sys.argv[2] == "retry", os.replace, []
def killing(number):
    def replace(*paths):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), 9)
        real(*paths)
    return replace
for number, out in enumerate(sys.argv[3:], 1):
    child = os.fork()
    if child == 0:
        atomic.os.replace = killing(number)
        repair(out, source, retry_failed=retry, max_failures=1, device="cpu", progress=False, workers=1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def killed(forks, source: Path, retry: str, *stores: Path) -> None:
    """Repair each store in a process that is killed at its first rename, the next at its second, and so on."""
    done = forks.run(KILLED, source, retry, *stores)
    assert done.stdout.split() == ["-9"] * len(stores), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="this system has no such signals")
def test_row_16_a_repair_that_is_killed_while_it_tries_failures_again_goes_on(forks, made, tmp_path):
    """The unit that it had planned is neither damaged nor failed; the same call encodes it."""
    picture(77).save(tmp_path / "in" / "bad.png")
    stores = [shutil.copytree(made, tmp_path / name) for name in ("before the shard", "before its record")]
    killed(forks, tmp_path / "in", "retry", *stores)
    for out in stores:
        with pytest.raises(ValueError, match="src must be named, since 1 images that failed of "):
            mend(out, retry_failed=True)
        assert mend(out, tmp_path / "in").pending == 1
        done = mend(out, tmp_path / "in", retry_failed=True, max_failures=0)
        assert (done.retried, done.pending, done.report.ok) == (1, 0, 1)
        assert failures(out) == {}
        assert ("bad.png", 0) in committed(out)
        assert len(list((out / "plan").iterdir())) == 2


@pytest.mark.skipif(os.name != "posix", reason="this system has no such signals")
def test_row_16_a_repair_that_is_killed_goes_on(forks, made, tmp_path):
    """Before the shard's rename, and between it and the record's: SIGKILL, then the same call."""
    whole = committed(made)
    stores = [shutil.copytree(made, tmp_path / name) for name in ("before the shard", "before its record")]
    for out in stores:
        for shard in (out / "shards").glob("*.safetensors"):
            flip(shard)
    killed(forks, tmp_path / "in", "", *stores)
    for out, damaged in zip(stores, (3, 2), strict=True):
        assert len(verify(out, deep=True, progress=False).damaged) == damaged
        mend(out, tmp_path / "in")
        assert committed(out) == whole
        assert not list(out.rglob("*.tmp.*"))
