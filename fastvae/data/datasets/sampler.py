"""Batches of one bucket each, as a DataLoader's ``batch_sampler``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from fastvae.data.order import Order
from fastvae.latents.cpu_sampling import check_state

if TYPE_CHECKING:
    from fastvae.data.datasets.dataset import LatentDataset


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
