"""The order in which an epoch's rows are read: batches of one bucket, decided by numbers alone, split over ranks."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.latents.cpu_sampling import checked

Shards = Sequence[tuple[tuple[int, int], Tensor]]
PREFIX = b"fastvae order 1\0"


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
        checked("seed", self.seed)
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
        digest = hashlib.sha256(PREFIX + struct.pack("<QQ", self.seed, checked("epoch", epoch)))
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
