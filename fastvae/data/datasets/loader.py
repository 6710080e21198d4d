"""Encoding inside the training loop: latents of the next batches are made while one trains on the last."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from fastvae.data.datasets.device_transfer import Made, Transfer, transfer_to
from fastvae.data.rows import noise_keys
from fastvae.data.store.scaling import LatentScaling
from fastvae.data.store.shard import POSTERIORS
from fastvae.latents.autoencoder import check_finite
from fastvae.latents.convert import mended_moments, unchecked_moments_of_images
from fastvae.latents.logvar_range import LOGVAR_RANGE
from fastvae.latents.sampling import sample_posterior
from fastvae.latents.scaling import scale_latents, scaling_of
from fastvae.system.arguments import check_state, check_unsigned

END = object()
Place = str | int | None
Keys = str | int | Callable[[Any], Sequence[Any]] | None


class LatentLoader:
    """The batches of ``images_loader`` with latents in the place of images, each made before it is asked for.

    images_loader: a DataLoader, or any iterable of batches: a tensor of uint8 images, [B, C, H, W] or [B, H, W, C], or
    a tuple or dict that holds one. Batches are fetched ahead, so each must own its memory. images: its name or index
    there; by default the only such tensor. vae: fastvae's or diffusers', accelerated or not; its weights must not
    change during an iteration.
    posterior: "sample" draws; "mean" takes the mean; "dist" gives both moments, to draw from at each use. scaled: ready
    to train on, else raw. Latents, [B, L, H / f, W / f] on the model's device, stand where the images stood; in a dict
    as ``latents`` with ``noise_key``. For "dist" they are a dict of ``mean``, ``logvar`` and ``noise_key``, in a dict
    batch its entries. All else passes through.
    key: what tells images apart, so that an image's noise depends on it, ``seed`` and the epoch alone: a name or index
    in the batch, or a function of the batch, that gives a string or integer for each image. By default ``key`` of a
    dict; where there is none, the place in the epoch, with ``rank`` for those of several processes. A store's dataset
    gives the noise of the same key.
    ahead: how many batches are made in advance; besides them one batch is being encoded and one fetched, no more.
    Two threads work, one that fetches and one that encodes, on a CUDA GPU on streams of their own from pinned memory.
    An error in either is raised where its batch would have come. Both end with the iteration, however it ends; a new
    iteration ends the last. Autocast of the training loop does not reach them.
    Raises ValueError for other arguments; while iterating, what encode_latents raises, and ValueError for a batch that
    has no images or keys where they should be.
    """

    def __init__(
        self,
        images_loader: Iterable[Any],
        vae: Any,
        *,
        ahead: int = 1,
        seed: int = 0,
        scaled: bool = True,
        posterior: Literal["sample", "dist", "mean"] = "sample",
        images: Place = None,
        key: Keys = None,
        rank: int = 0,
    ):
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead!r}")
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior must be 'sample', 'dist' or 'mean', got {posterior!r}")
        self.images_loader, self.vae = images_loader, vae
        self.ahead, self.scaled, self.posterior = ahead, scaled, posterior
        self.seed, self.rank = check_unsigned("seed", seed), check_unsigned("rank", rank)
        self._images, self._key = images, key
        self._space = LatentScaling(scaling_of(vae), scaled) if posterior == "dist" else None
        self._epoch = self._batches = self._done = 0
        self._start = 0, 0  # batches and images that the next iteration counts as done
        self._running: weakref.ref[Generator[Any, None, None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None}  # an iteration stays where it is

    def __len__(self) -> int:
        return len(self.images_loader)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Draw the noise of ``epoch`` from the next iteration on.

        The loader, its batch sampler, sampler and dataset are told too, where they have a ``set_epoch``.
        """
        if check_unsigned("epoch", epoch) != self._epoch:
            self._epoch, self._batches, self._done = epoch, 0, 0
            self._start = 0, 0
        loader = self.images_loader
        for part in (loader, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset"))):
            if callable(tell := getattr(part, "set_epoch", None)):
                tell(epoch)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches and images were handed out; the seed to compare."""
        return {"epoch": self._epoch, "batches": self._batches, "images": self._done, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Number the images of the next iteration as after ``state``, whose later batches ``images_loader`` must give.

        Raises ValueError if the state is of another seed.
        """
        check_state(state, "epoch", "batches", "images", "seed")
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of seed {state['seed']}, this loader has seed {self.seed}")
        self._epoch, self._start = state["epoch"], (state["batches"], state["images"])
        self._batches, self._done = self._start

    def close(self) -> None:
        """End the iteration that is going on, if one is, and its threads with it."""
        if self._running is not None and (running := self._running()) is not None:
            running.close()

    def __iter__(self) -> Iterator[Any]:
        self.close()
        running = self._run(self._epoch)
        self._running = weakref.ref(running)
        return running

    def _run(self, epoch: int) -> Generator[Any, None, None]:
        device = next(iter(self.vae.parameters())).device
        if device.type == "meta":
            raise ValueError("vae must have its weights on a device, got some that are offloaded")
        transfer = transfer_to(device)
        transfer.begin()
        # Here and not in the thread: this is where a DataLoader starts its workers.
        source = iter(self.images_loader)
        batches = itertools.chain(source, itertools.repeat(END))
        # An iteration that was left in the middle is no state to go on from: the next begins at the first image.
        (self._batches, self._done), self._start = self._start, (0, 0)
        # For the numbers of the images that are fetched; self._done counts those that were handed out.
        fetch = functools.partial(self._fetch, batches, transfer, epoch, itertools.count(self._done))
        fetcher = ThreadPoolExecutor(1, "fastvae-fetch")
        threads = torch.get_num_threads()
        new_encoder = functools.partial(
            ThreadPoolExecutor, 1, "fastvae-encode", functools.partial(torch.set_num_threads, threads)
        )
        encoder = new_encoder()
        waiting: deque[Future[Any]] = deque()

        def begin() -> None:
            fetched = fetcher.submit(fetch)
            waiting.append(encoder.submit(self._encode, fetched, transfer))

        try:
            for _ in range(self.ahead):
                begin()
            while True:
                begin()
                finished = waiting.popleft().result()
                if finished is END:
                    break
                batch, place, seeds, moments, made = finished
                latents, finite = transfer.take(made)
                if not finite:
                    # An accelerated model's half precision is mended in fp32, the rest refused. In a thread of its own:
                    # the encoder's may wait for batches that come after this one was trained on.
                    uploaded = transfer.up(_images_of(batch, place), seeds)
                    with new_encoder() as alone:
                        mended = alone.submit(transfer.run, uploaded, functools.partial(self._mended, *moments))
                        latents, _ = transfer.take(mended.result())
                    del mended, uploaded
                batch = _in_place(batch, place, latents)
                self._batches, self._done = self._batches + 1, self._done + len(seeds)
                del finished, moments, made, latents
                yield batch
                del batch
            self._batches = self._done = 0  # of the epoch that may follow
        finally:
            # First no more fetching, which the encoder may wait for; what is under way is waited for.
            fetcher.shutdown(wait=False, cancel_futures=True)
            encoder.shutdown(wait=True, cancel_futures=True)
            fetcher.shutdown(wait=True)
            transfer.end()
            self._end(source)

    def _end(self, source: Any) -> None:
        """End what the iterator of batches has running: a generator, or a DataLoader's worker processes."""
        if isinstance(source, Generator):
            source.close()
        elif not getattr(self.images_loader, "persistent_workers", False):
            # torch leaves it to the iterator's finalizer. After an error that one waits for the garbage collector, and
            # then 5 s for each worker (torch 2.13).
            getattr(source, "_shutdown_workers", lambda: None)()

    def _fetch(self, batches: Iterator[Any], transfer: Transfer, epoch: int, numbers: Iterator[int]) -> Any:
        """The next batch, where its images are in it, their noise keys, and images and keys on their way."""
        batch = next(batches)
        if batch is END:
            return END
        place = _place_of_images(batch, self._images)
        images = _images_of(batch, place)
        keys = self._keys_of(batch, len(images), numbers)
        seeds = torch.tensor(noise_keys(self.seed, epoch, [(key, 0) for key in keys]), dtype=torch.uint64)
        return batch, place, seeds, transfer.up(images, seeds)

    def _keys_of(self, batch: Any, count: int, numbers: Iterator[int]) -> list[str]:
        places = [f"{self.rank}/{next(numbers)}" for _ in range(count)]
        if self._key is None and not (isinstance(batch, Mapping) and "key" in batch):
            return places
        key = "key" if self._key is None else self._key
        try:
            given = key(batch) if callable(key) else batch[key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"key must be a part of the batch, {_described(batch)}, got {key!r}") from error
        to_list = getattr(given, "tolist", None)  # of a tensor or array
        values = list(given) if to_list is None else to_list()
        if len(values) != count or not all(isinstance(value, (str, int)) for value in values):
            raise ValueError(f"key must give a string or an integer for each of {count} images, got {values[:4]!r}")
        return [str(value) for value in values]

    def _encode(self, fetched: Future[Any], transfer: Transfer) -> Any:
        if (got := fetched.result()) is END:
            return END
        *rest, uploaded = got
        # With uint8 images nobody waits for a GPU here: it is given the next batch while it works on this one.
        moments: list[Tensor] = []
        return *rest, moments, transfer.run(uploaded, functools.partial(self._unchecked, moments))

    @torch.no_grad()
    def _unchecked(self, kept: list[Tensor], images: Tensor, seeds: Tensor) -> Made:
        # The moments too, part of which may be clamped or left out of what is made.
        moments = unchecked_moments_of_images(self.vae, images)
        kept.append(moments)
        made = self._latents(moments, seeds)
        return made, [moments, *(values for values in made.values() if values.is_floating_point())]

    @torch.no_grad()
    def _mended(self, moments: Tensor, images: Tensor, seeds: Tensor) -> Made:
        moments = mended_moments(self.vae, images, moments)
        made = self._latents(moments, seeds)
        for name, values in made.items():
            if values.is_floating_point():
                check_finite(f"the {name}", values, f"computed in {values.dtype}")
        return made, [moments]

    def _latents(self, moments: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        mean, logvar = moments.chunk(2, dim=1)
        if self._space is not None:
            logvar = self._space.logvar(logvar.clamp(*LOGVAR_RANGE), None, logvar.dtype)
            return {"mean": self._space.mean(mean), "logvar": logvar, "noise_key": seeds}
        z = mean.contiguous() if self.posterior == "mean" else sample_posterior(moments, seeds=seeds)
        return {"latents": scale_latents(self.vae, z) if self.scaled else z, "noise_key": seeds}


def _images_of(batch: Any, place: Place) -> Tensor:
    return batch if place is None else batch[place]


def _place_of_images(batch: Any, given: Place) -> Place:
    """The name or index of the images in the batch, None if it is they."""
    if isinstance(batch, Tensor) and given is None:
        return None
    if not isinstance(batch, (Mapping, tuple, list)):
        raise ValueError(f"a batch must be a tensor of images, or a tuple or dict with one, got {_described(batch)}")
    parts: dict[Any, Any] = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
    if given is not None:
        if not isinstance(parts.get(given), Tensor):
            raise ValueError(f"images must be the place of a tensor in the batch, {_described(batch)}, got {given!r}")
        return given
    found = [name for name, part in parts.items() if isinstance(part, Tensor) and _are_images(part)]
    if len(found) != 1:
        which = f"{found} are" if found else "none is"
        raise ValueError(f"images must say which uint8 tensor of 4 dimensions is meant: {which} in {_described(batch)}")
    return found[0]


def _are_images(part: Tensor) -> bool:
    return part.dtype == torch.uint8 and part.ndim == 4


def _in_place(batch: Any, place: Place, made: dict[str, Tensor]) -> Any:
    """The batch with what was made of its images where they were."""
    if isinstance(batch, Mapping):
        rest = {name: part for name, part in batch.items() if name != place}
        if taken := sorted(rest.keys() & made.keys()):
            raise ValueError(f"a batch must leave the names of its latents free, got {', '.join(taken)}")
        return {**rest, **made}
    latents = made.get("latents", made)
    if place is None:
        return latents
    parts = [latents if index == place else part for index, part in enumerate(batch)]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(map(str, batch))}"
    if isinstance(batch, Tensor):
        return f"a tensor {list(batch.shape)} of {batch.dtype}"
    return f"a {type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else f"a {type(batch).__name__}"
