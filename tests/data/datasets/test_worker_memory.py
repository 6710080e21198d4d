"""Private memory of a forked worker of a DataLoader that reads every row of a store."""

import gc
import re
from pathlib import Path

import pytest
from support.small_store import write_store
from torch.utils.data import DataLoader, Dataset

from fastvae.data.datasets.dataset import LatentDataset

SMAPS = Path("/proc/self/smaps_rollup")
pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells what memory is private")
ROWS, UNIT, BATCH, BUCKET = 1_000_000, 5_000, 64, (8, 8)
# A worker that keeps anything of each row keeps one number at least, of 8 bytes.
LEAST = 8


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
    keys = [f"photographs/{number:09}.jpg" for number in range(ROWS)]
    write_store(tmp_path, {BUCKET: keys}, rows_per_unit=UNIT, posterior="mean")
    dataset = LatentDataset(tmp_path)
    for what in ("keys", "rows"):
        first, last = DataLoader(Reader(dataset, what), None, num_workers=1, multiprocessing_context="fork")
        print(f"{what}: {(last - first) / ROWS:.3f} private bytes a row of {ROWS:,}")  # noqa: T201
        assert last - first < LEAST * ROWS, what
