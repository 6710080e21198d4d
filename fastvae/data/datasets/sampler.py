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

from fastvae.system.arguments import check_state, check_unsigned

if TYPE_CHECKING:
    from fastvae.data.datasets.dataset import LatentDataset

Shards = Sequence[tuple[tuple[int, int], Tensor]]
PREFIX = b"fastvae order 1\0"


class BucketBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Lists of row numbers of ``dataset``, each of one bucket, in an order that (seed, epoch) decide.

    Rows are mixed within a bucket, and buckets' batches with each other, unless ``shuffle`` is False. Each row comes
    once an epoch; with ``drop_last``, those that fill no batch of their bucket do not. Of several processes each takes
    its own ``rank`` of ``ranks``: all get as many batches, in each step of the same bucket and size, for which up to
    ranks - 1 rows of a bucket come twice. (accelerate's ``prepare`` would split the batches again, across buckets: give
    it no loader with this sampler, but rank=accelerator.process_index, ranks=accelerator.num_processes here.)
    ``set_epoch`` is the dataset's: noise and order follow one number. Raises ValueError for numbers that make no order.
    """

    def __init__(
        self,
        dataset: LatentDataset,
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
        self._shards = dataset.shards()
        self._resume = (0, 0)  # an epoch, and how many of its batches are left out
        self._handed_out = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the dataset's epoch, for the order of the next iteration and for the noise."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self._order.count(self._shards)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, done = self._resume
        self._resume, self._handed_out = (0, 0), done if epoch == self.dataset.epoch else 0
        for batch in itertools.islice(self._order.batches(self._shards, self.dataset.epoch), self._handed_out, None):
            self._handed_out += 1
            yield batch

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Where the epoch is, to go on from with load_state_dict.

        done: how many of its batches training has finished, counted from the epoch's start; by default as many as were
        handed out, which is ahead of training by what a DataLoader's workers have fetched.
        """
        return {"batches": self._handed_out if done is None else done, **order_state(self._order, self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the epoch of ``state``: its next iteration begins after the batches that were done.

        Raises ValueError where the order was another.
        """
        check_order(state, order_state(self._order, self.dataset))
        self.dataset.set_epoch(state["epoch"])
        self._resume, self._handed_out = (state["epoch"], state["batches"]), state["batches"]


def order_state(order: Order, dataset: LatentDataset) -> dict[str, Any]:
    """What decides an order, but for the rank: every process resumes from the same state."""
    names = ("batch_size", "seed", "shuffle", "drop_last", "ranks", "window")
    return {"epoch": dataset.epoch, "rows": len(dataset), **{name: getattr(order, name) for name in names}}


def check_order(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises ValueError unless ``state`` is a state, and of the order of ``own``, in whatever epoch."""
    check_state(state, "batches", *own)
    differing = [name for name in own if name != "epoch" and state[name] != own[name]]
    if differing:
        said = ", ".join(f"{name} was {state[name]} and is {own[name]}" for name in differing)
        raise ValueError(f"the state is of another order, in which no batch has the same rows: {said}")


@dataclass(frozen=True)
class Order:
    """How batches are cut: every step takes up to ``batch_size`` rows of one bucket for each of ``ranks`` ranks.

    Shards are taken ``window`` at a time, all of them by default, and rows are mixed within. All ranks take as many
    batches, and in each step of the same bucket and size: the last rows of a bucket are dealt out evenly, some of them
    twice where they do not go up, or left out with ``drop_last``. Raises ValueError for numbers that make no order.
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
        """How many batches each rank takes in an epoch."""
        rows: dict[tuple[int, int], int] = {}
        for bucket, numbers in shards:
            rows[bucket] = rows.get(bucket, 0) + len(numbers)
        step = self.batch_size * self.ranks
        return sum(number // step if self.drop_last else -(-number // step) for number in rows.values())

    def batches(self, shards: Shards, epoch: int) -> Iterator[list[int]]:
        """The row numbers of each batch of this rank in ``epoch``; ``shards`` holds each one's bucket and rows."""
        digest = hashlib.sha256(PREFIX + struct.pack("<QQ", self.seed, check_unsigned("epoch", epoch)))
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "little"))
        places = self._permuted(len(shards), generator).tolist()
        window = self.window or len(shards)
        left: dict[tuple[int, int], Tensor] = {}
        for start in range(0, len(places), window):
            steps = self._steps([shards[place] for place in places[start : start + window]], left, generator)
            if start + window >= len(places) and not self.drop_last:
                steps += [rows for rows in left.values() if len(rows)]
            for place in self._permuted(len(steps), generator).tolist():
                yield self._own(steps[place])

    def _steps(self, shards: Shards, left: dict[tuple[int, int], Tensor], generator: torch.Generator) -> list[Tensor]:
        """Whole steps of the rows of ``shards``, mixed; what is left of a bucket waits for its next rows."""
        fresh: dict[tuple[int, int], list[Tensor]] = {}
        for bucket, numbers in shards:
            fresh.setdefault(bucket, []).append(numbers)
        steps: list[Tensor] = []
        for bucket, parts in fresh.items():
            rows = torch.cat(parts)
            rows = torch.cat([left.get(bucket, rows[:0]), rows[self._permuted(len(rows), generator)]])
            whole = len(rows) - len(rows) % (self.batch_size * self.ranks)
            steps += rows[:whole].split(self.batch_size * self.ranks) if whole else []
            left[bucket] = rows[whole:]
        return steps

    def _permuted(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)

    def _own(self, step: Tensor) -> list[int]:
        """This rank's part of a step."""
        if self.ranks == 1:
            return step.tolist()
        each = -(-len(step) // self.ranks)
        return step[torch.arange(each * self.rank, each * (self.rank + 1)) % len(step)].tolist()
