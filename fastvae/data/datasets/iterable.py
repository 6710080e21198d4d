"""A store read in one pass, a few shards at a time, for stores larger than the page cache."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch

from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.datasets.sampler import Order, check_order, order_state


class LatentIterable(torch.utils.data.IterableDataset):
    """Batches of the store at ``path``, each of one bucket: ``DataLoader(LatentIterable(...), batch_size=None)``.

    Shards are shuffled, and rows within ``window`` shards at a time: only that part of the store is read at random, and
    must fit in memory. A DataLoader's workers share the batches and return them in one order, whatever their number.
    rank, ranks, shuffle and drop_last are BucketBatchSampler's; ``options`` are LatentDataset's (scaled, posterior,
    columns). Raises what the two raise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 8,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
        **options: Any,
    ):
        self.dataset = LatentDataset(path, seed=seed, **options)
        self._order = Order(batch_size, seed, shuffle, drop_last, rank, ranks, window)
        self._shards = self.dataset.shards()
        # An epoch, and the number of its batches to skip; in shared memory, for persistent workers.
        self._resume = torch.zeros(2, dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration's order and noise."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self._order.count(self._shards) - self._start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        batches = self._order.batches(self._shards, self.dataset.epoch)
        for numbers in itertools.islice(batches, self._start() + first, None, step):
            yield collate(self.dataset.__getitems__(numbers))

    def state_dict(self, done: int) -> dict[str, Any]:
        """Return the position in the epoch, for load_state_dict; ``done``: number of batches that training finished.

        Counted from the epoch's start, the same for every rank. The caller counts, because workers read batches ahead
        of training.
        """
        return {"batches": done, **order_state(self._order, self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the epoch of ``state``: its iterations begin after the finished batches.

        Iterations of other epochs begin at their start. Raises ValueError for a state of another order.
        """
        check_order(state, order_state(self._order, self.dataset))
        self.dataset.set_epoch(state["epoch"])
        self._resume.copy_(torch.tensor([state["epoch"], state["batches"]], device="cpu"))

    def _start(self) -> int:
        epoch, done = self._resume.tolist()
        return done if epoch == self.dataset.epoch else 0
