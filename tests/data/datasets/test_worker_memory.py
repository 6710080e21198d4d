"""Private memory of a forked worker of a DataLoader that reads every row of a store."""

import gc
import re
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.rows import SourceFile
from fastvae.data.store.leases import Leases
from fastvae.data.store.plan import PlannedRow
from fastvae.data.store.shard import ShardRow
from fastvae.data.store.store import Store

SMAPS = Path("/proc/self/smaps_rollup")
pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what memory is private")
ROWS, UNIT, BATCH, BUCKET = 1_000_000, 5_000, 64, (8, 8)
# A worker that keeps anything of each row keeps one number at least, of 8 bytes.
LEAST = 8
LAYOUT = {
    "buckets": ["8x8"],
    "latent_channels": 4,
    "downsample_factor": 8,
    "scaling": {
        "scaling_factor": 0.5,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "batch_norm": False,
    },
    "metadata": {"fvl": "1"},
    "source": {"vae": "generated"},
    "created_by": "tests",
}
IDENTITY = {
    "model": {"encoder_weights_sha256": "0"},
    "numerics": {"dtype": "fp32", "posterior": "mean", "mean": "fp16", "logvar": "fp16"},
    "preprocess": {},
}


def write_rows(path: Path, count: int) -> None:
    """Write a store of ``count`` rows of one latent each by its own writer."""
    mean = np.zeros((4, 1, 1), np.float16)
    with Leases(path / "leases") as leases:
        store = Store.create_or_open(path, IDENTITY, LAYOUT, leases)
        files = (SourceFile(f"photographs/{number:09}.jpg", 1, 0) for number in range(count))
        for unit in store.extend_plan([(BUCKET, PlannedRow(file, 0, BUCKET)) for file in files], lambda bucket: UNIT):
            store.commit(unit, [ShardRow(row.file.key, mean, None, BUCKET, (0, 0, *BUCKET)) for row in unit.rows])


def private_bytes() -> int:
    """Return the bytes of this process that it shares with no other and has written."""
    gc.collect()
    return 1024 * int(re.search(r"Private_Dirty:\s+(\d+) kB", SMAPS.read_text())[1])


class Reader(Dataset):
    """Item 0: private bytes of a worker that has read the first shard. Item 1: after it has read everything."""

    def __init__(self, rows: LatentDataset, what: str):
        self.rows, self.what = rows, what

    def read(self, first: int, last: int) -> None:
        if self.what == "keys":
            assert all(self.rows._keys[row] for row in range(first, last))
        else:
            for start in range(first, last, BATCH):
                self.rows.__getitems__(range(start, min(start + BATCH, last)))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, item: int) -> int:
        self.read(*((UNIT, len(self.rows)) if item else (0, UNIT)))
        return private_bytes()


@pytest.mark.slow
def test_keys_and_rows_cost_a_forked_worker_no_private_memory(tmp_path):
    write_rows(tmp_path, ROWS)
    dataset = LatentDataset(tmp_path)
    for what in ("keys", "rows"):
        first, last = DataLoader(Reader(dataset, what), None, num_workers=1, multiprocessing_context="fork")
        print(f"{what}: {(last - first) / ROWS:.3f} private bytes a row of {ROWS:,}")  # noqa: T201
        assert last - first < LEAST * ROWS, what
