"""Batches of one bucket each, as a DataLoader's ``batch_sampler``."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae.data.datasets.row_view import RowView
from fastvae.system.arguments import check_state, check_unsigned

if TYPE_CHECKING:
    from torch.utils.data import ConcatDataset, Subset

    from fastvae.data.datasets.dataset import LatentDataset
    from fastvae.data.datasets.image_dataset import ImageDataset

Shards = Sequence[tuple[tuple[int, int], Tensor]]
ORDER_PREFIX = b"fastvae order 1\0"


class BucketBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Lists of row numbers of ``dataset``, each of one bucket, in an order that depends on (seed, epoch) alone.

    dataset: a LatentDataset or ImageDataset, or a Subset or ConcatDataset of such. Rows are shuffled within a bucket,
    and batches across buckets, unless ``shuffle`` is False. Each row is returned once an epoch; ``drop_last`` leaves
    out the rows that do not fill a batch of their bucket. Each of several processes takes its ``rank`` of ``ranks``:
    all get the same number of batches, in each step of the same bucket and size, for which up to ranks - 1 rows of a
    bucket are repeated. (accelerate's ``prepare`` would split the batches again, across
    buckets: do not pass it a loader with this sampler; set rank=accelerator.process_index and
    ranks=accelerator.num_processes here.)
    ``set_epoch`` is the dataset's, so noise and order have one epoch. Raises ValueError for an invalid batch_size,
    seed, rank or ranks.
    """

    def __init__(
        self,
        dataset: LatentDataset | ImageDataset | Subset | ConcatDataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._order = Order(batch_size, seed, shuffle, drop_last, rank, ranks)
        self._rows = RowView(dataset)
        self._shards = self._rows.shards()
        self._resume = (0, 0)  # an epoch, and the number of its batches to skip
        self._returned = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the dataset's epoch, for the order of the next iteration and for the noise."""
        self._rows.set_epoch(epoch)

    def __len__(self) -> int:
        return self._order.count(self._shards)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = self._resume
        self._resume, self._returned = (0, 0), done if epoch == self._rows.epoch else 0
        for batch in itertools.islice(self._order.batches(self._shards, self._rows.epoch), self._returned, None):
            self._returned += 1
            yield batch

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Return the position in the epoch, for load_state_dict.

        done: number of batches that training has finished, counted from the epoch's start. Default: the number that was
        returned, which is ahead of training by what a DataLoader's workers have fetched.
        """
        return {"batches": self._returned if done is None else done, **order_state(self._order, self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue in the epoch of ``state``: its next iteration begins after the finished batches.

        Raises ValueError for a state of another order.
        """
        check_order(state, order_state(self._order, self._rows))
        self._rows.set_epoch(state["epoch"])
        self._resume, self._returned = (state["epoch"], state["batches"]), state["batches"]


def order_state(order: Order, dataset: LatentDataset | RowView) -> dict[str, Any]:
    """Return all that decides an order except the rank: every process resumes from the same state."""
    names = ("batch_size", "seed", "shuffle", "drop_last", "ranks", "window")
    return {"epoch": dataset.epoch, "rows": len(dataset), **{name: getattr(order, name) for name in names}}


def check_order(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise ValueError unless ``state`` is a state of the same order as ``own``, in any epoch."""
    check_state(state, "batches", *own)
    differing = [name for name in own if name != "epoch" and state[name] != own[name]]
    if differing:
        changes = ", ".join(f"{name} was {state[name]} and is {own[name]}" for name in differing)
        raise ValueError(f"the state is of another order, in which no batch has the same rows: {changes}")


@dataclass(frozen=True)
class Order:
    """Order of batches: every step takes up to ``batch_size`` rows of one bucket for each of ``ranks`` ranks.

    Shards are taken ``window`` at a time, by default all at once, and rows are shuffled within. All ranks take the same
    number of batches, and in each step the same bucket and size: the last rows of a bucket are divided evenly, with
    some of them repeated, or left out with ``drop_last``. Raises ValueError for an invalid number.
    """

    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    rank: int = 0
    ranks: int = 1
    window: int | None = None

    def __post_init__(self) -> None:
        check_unsigned("seed", self.seed)
        window = 1 if self.window is None else self.window
        for name, value in {"batch_size": self.batch_size, "ranks": self.ranks, "window": window}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank must be from 0 to {self.ranks - 1}, for {self.ranks} ranks, got {self.rank!r}")

    def count(self, shards: Shards) -> int:
        """Return the number of batches of each rank in an epoch."""
        rows: dict[tuple[int, int], int] = {}
        for bucket, numbers in shards:
            rows[bucket] = rows.get(bucket, 0) + len(numbers)
        step = self.batch_size * self.ranks
        return sum(number // step if self.drop_last else -(-number // step) for number in rows.values())

    def batches(self, shards: Shards, epoch: int) -> Iterator[list[int]]:
        """Yield the row numbers of each batch of this rank in ``epoch``; ``shards``: bucket and rows of each shard."""
        digest = hashlib.sha256(ORDER_PREFIX + struct.pack("<QQ", self.seed, check_unsigned("epoch", epoch)))
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little"))
        places = self._permuted(len(shards), generator).tolist()
        window = self.window or len(shards)
        left: dict[tuple[int, int], Tensor] = {}
        for start in range(0, len(places), window):
            steps = self._steps([shards[place] for place in places[start : start + window]], left, generator)
            if start + window >= len(places) and not self.drop_last:
                steps += [rows for rows in left.values() if len(rows)]
            for place in self._permuted(len(steps), generator).tolist():
                yield self._rank_part(steps[place])

    def _steps(self, shards: Shards, left: dict[tuple[int, int], Tensor], generator: torch.Generator) -> list[Tensor]:
        """Return full steps of the shuffled rows of ``shards``; ``left`` keeps the other rows of each bucket."""
        fresh: dict[tuple[int, int], list[Tensor]] = {}
        for bucket, numbers in shards:
            fresh.setdefault(bucket, []).append(numbers)
        steps: list[Tensor] = []
        for bucket, parts in fresh.items():
            rows = torch.cat(parts)
            rows = torch.cat([left.get(bucket, rows[:0]), rows[self._permuted(len(rows), generator)]])
            full = len(rows) - len(rows) % (self.batch_size * self.ranks)
            steps += rows[:full].split(self.batch_size * self.ranks) if full else []
            left[bucket] = rows[full:]
        return steps

    def _permuted(self, count: int, generator: torch.Generator) -> Tensor:
        if self.shuffle:
            return torch.randperm(count, generator=generator, device="cpu")
        return torch.arange(count, device="cpu")

    def _rank_part(self, step: Tensor) -> list[int]:
        """Return this rank's part of a step."""
        if self.ranks == 1:
            return step.tolist()
        each = -(-len(step) // self.ranks)
        return step[torch.arange(each * self.rank, each * (self.rank + 1), device="cpu") % len(step)].tolist()
