"""Encoding inside the training loop: threads encode the next batches while the loop trains on the last one."""

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

from fastvae.data.datasets.device_transfer import EncodedTensors, Transfer, transfer_to
from fastvae.data.rows import noise_keys
from fastvae.data.store.scaling import LatentScaling
from fastvae.data.store.shard import POSTERIORS
from fastvae.latents.autoencoder import check_autoencoder, check_finite, check_part
from fastvae.latents.convert import redo_overflow, unchecked_moments_of_images
from fastvae.latents.logvar_range import LOGVAR_RANGE
from fastvae.latents.sampling import sample_posterior
from fastvae.latents.scaling import scale_latents, scaling_of
from fastvae.system.arguments import check_choices, check_state, check_unsigned

END = object()
PIXEL_VALUES = "pixel_values"  # the images of a batch in diffusers' training scripts
Place = str | int | None
Keys = str | int | Callable[[Any], Sequence[Any]] | None


class LatentLoader:
    """The batches of ``images_loader`` with latents instead of images, each encoded before it is asked for.

    images_loader: a DataLoader, or any iterable of batches: a tensor of images, uint8 or floats in [-1, 1],
    [B, C, H, W] or [B, H, W, C], or a tuple or dict that holds one. Batches are fetched ahead, so each must own its
    memory. images: name or index of that tensor in the batch; by default ``pixel_values`` of a dict, else the only
    tensor of uint8 images, else of floats with three channels. vae: fastvae's or diffusers', accelerated or not; its
    weights must not change during an iteration.
    posterior: "sample" draws; "mean" takes the mean; "dist" returns both moments, to draw from at each use. scaled:
    ready to train on, else raw. Latents, [B, L, H / f, W / f] on the model's device, replace the images; a dict batch
    has them as ``latents``, with ``noise_key``. For "dist" they are a dict of ``mean``, ``logvar`` and ``noise_key``;
    a dict batch has its entries. All else is passed on unchanged.
    key: identifies an image: its noise depends on the key, ``seed`` and the epoch alone. A name or index in the batch,
    or a function of the batch, that gives a string or integer for each image. Default: ``key`` of a dict, else the
    position in the epoch, with ``rank`` for several processes. A store's dataset draws the same noise for the same key.
    pad: for sides that the model does not divide, as in encode_latents.
    ahead: number of batches encoded in advance; besides these, one batch is being encoded and one fetched.
    One thread fetches and one encodes; on a CUDA GPU each has its own stream and copies from pinned memory. An error in
    either is raised where its batch would have come. Both end with the iteration, however it ends; a new iteration ends
    the last one. Autocast of the training loop does not apply to them.
    Raises ValueError for other arguments; while iterating, what encode_latents raises, and ValueError for a batch
    without the images or keys that the arguments name.
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
        pad: Literal["error", "crop", "reflect"] = "error",
    ):
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead!r}")
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior must be 'sample', 'dist' or 'mean', got {posterior!r}")
        self.images_loader, self.vae = images_loader, vae
        self.ahead, self.scaled, self.posterior = ahead, scaled, posterior
        self.seed, self.rank = check_unsigned("seed", seed), check_unsigned("rank", rank)
        check_autoencoder(vae)
        check_part(vae, "encoder")
        check_choices(pad=(pad, ("error", "crop", "reflect")))
        self._images, self._key, self._pad = images, key, pad
        self._scaling = LatentScaling(scaling_of(vae), scaled) if posterior == "dist" else None
        self._epoch = self._batches = self._done = 0
        self._start = 0, 0  # batches and images that the next iteration counts as done
        self._running: weakref.ref[Generator[Any, None, None]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None}  # an iteration cannot be pickled

    def __len__(self) -> int:
        return len(self.images_loader)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Draw the noise of ``epoch`` from the next iteration on.

        Calls ``set_epoch`` of the loader, its batch sampler, sampler and dataset too, if they have one.
        """
        if check_unsigned("epoch", epoch) != self._epoch:
            self._epoch, self._batches, self._done = epoch, 0, 0
            self._start = 0, 0
        loader = self.images_loader
        for part in (loader, *(getattr(loader, name, None) for name in ("batch_sampler", "sampler", "dataset"))):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches and images that were returned, and the seed to compare."""
        return {"epoch": self._epoch, "batches": self._batches, "images": self._done, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the numbering of images after ``state``; ``images_loader`` must return the batches that follow it.

        Raises ValueError if the state is of another seed.
        """
        check_state(state, "epoch", "batches", "images", "seed")
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of seed {state['seed']}, this loader has seed {self.seed}")
        self._epoch, self._start = state["epoch"], (state["batches"], state["images"])
        self._batches, self._done = self._start

    def close(self) -> None:
        """End the running iteration and its threads, if there is one."""
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
        # Here and not in the thread: a DataLoader starts its workers in this call.
        source = iter(self.images_loader)
        batches = itertools.chain(source, itertools.repeat(END))
        # An iteration that was left in the middle is not a state to resume: the next one begins at the first image.
        (self._batches, self._done), self._start = self._start, (0, 0)
        # The counter numbers fetched images; self._done counts those that were returned.
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
                batch, place, seeds, moments, encoded = finished
                latents, finite = transfer.receive(encoded)
                if not finite:
                    uploaded = transfer.upload(_images_of(batch, place), seeds)
                    # Not in the encoder's thread, which may wait for batches that come after this one was trained on.
                    with new_encoder() as mender:
                        mend = functools.partial(self._encode_in_fp32, *moments)
                        latents, _ = transfer.receive(mender.submit(transfer.encode, uploaded, mend).result())
                    del mend, uploaded
                batch = _with_latents(batch, place, latents)
                self._batches, self._done = self._batches + 1, self._done + len(seeds)
                del finished, moments, encoded, latents
                yield batch
                del batch
            self._batches = self._done = 0  # for the next epoch
        finally:
            # End fetching first, because the encoder may wait for it; then wait for the running calls.
            fetcher.shutdown(wait=False, cancel_futures=True)
            encoder.shutdown(wait=True, cancel_futures=True)
            fetcher.shutdown(wait=True)
            transfer.end()
            self._end(source)

    def _end(self, source: Any) -> None:
        """Close the iterator of batches: a generator, or a DataLoader's worker processes."""
        if isinstance(source, Generator):
            source.close()
        elif not getattr(self.images_loader, "persistent_workers", False):
            # torch leaves this to the iterator's finalizer, which after an error runs only at a garbage collection, and
            # then waits 5 s for each worker (torch 2.13).
            getattr(source, "_shutdown_workers", lambda: None)()

    def _fetch(self, batches: Iterator[Any], transfer: Transfer, epoch: int, numbers: Iterator[int]) -> Any:
        """Return the next batch, the place of its images, their noise keys, and the upload of images and keys."""
        batch = next(batches)
        if batch is END:
            return END
        place = _place_of_images(batch, self._images)
        images = _images_of(batch, place)
        keys = self._keys_of(batch, len(images), numbers)
        seeds = torch.tensor(noise_keys(self.seed, epoch, [(key, 0) for key in keys]), dtype=torch.uint64, device="cpu")
        return batch, place, seeds, transfer.upload(images, seeds)

    def _keys_of(self, batch: Any, count: int, numbers: Iterator[int]) -> list[str]:
        places = [f"{self.rank}/{next(numbers)}" for _ in range(count)]
        if self._key is None and not (isinstance(batch, Mapping) and "key" in batch):
            return places
        key = "key" if self._key is None else self._key
        try:
            given = key(batch) if callable(key) else batch[key]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"key must be a part of the batch, {_described(batch)}, got {key!r}") from error
        to_list = getattr(given, "tolist", None)  # a tensor or array has it
        values = list(given) if to_list is None else to_list()
        if len(values) != count or not all(isinstance(value, (str, int)) for value in values):
            raise ValueError(f"key must give a string or an integer for each of {count} images, got {values[:4]!r}")
        return [str(value) for value in values]

    def _encode(self, fetched: Future[Any], transfer: Transfer) -> Any:
        if (batch := fetched.result()) is END:
            return END
        *rest, uploaded = batch
        # With uint8 images nothing here waits for a GPU: the next batch is queued while it works on this one.
        moments: list[Tensor] = []
        return *rest, moments, transfer.encode(uploaded, functools.partial(self._encode_unchecked, moments))

    @torch.no_grad()
    def _encode_unchecked(self, kept: list[Tensor], images: Tensor, seeds: Tensor) -> EncodedTensors:
        # Check the moments too: the latents may clamp or leave out a part of them.
        moments = unchecked_moments_of_images(self.vae, images, self._pad)
        kept.append(moments)
        latents = self._latents(moments, seeds)
        return latents, [moments, *(values for values in latents.values() if values.is_floating_point())]

    @torch.no_grad()
    def _encode_in_fp32(self, moments: Tensor, images: Tensor, seeds: Tensor) -> EncodedTensors:
        """Encode an accelerated model's half-precision rows again in fp32; raises ValueError if more is not finite."""
        moments = redo_overflow(self.vae, images, moments, self._pad)
        latents = self._latents(moments, seeds)
        for name, values in latents.items():
            if values.is_floating_point():
                check_finite(f"the {name}", values, f"computed in {values.dtype}")
        return latents, [moments]

    def _latents(self, moments: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        mean, logvar = moments.chunk(2, dim=1)
        if self._scaling is not None:
            logvar = self._scaling.logvar(logvar.clamp(*LOGVAR_RANGE), None, logvar.dtype)
            return {"mean": self._scaling.mean(mean), "logvar": logvar, "noise_key": seeds}
        z = mean.contiguous() if self.posterior == "mean" else sample_posterior(moments, seeds=seeds)
        return {"latents": scale_latents(self.vae, z) if self.scaled else z, "noise_key": seeds}


def _images_of(batch: Any, place: Place) -> Tensor:
    return batch if place is None else batch[place]


def _place_of_images(batch: Any, given: Place) -> Place:
    """Return the name or index of the images in the batch, None if the batch is the tensor of images."""
    if isinstance(batch, Tensor) and given is None:
        return None
    if not isinstance(batch, (Mapping, tuple, list)):
        raise ValueError(f"a batch must be a tensor of images, or a tuple or dict with one, got {_described(batch)}")
    parts: dict[Any, Any] = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
    if given is not None:
        if not isinstance(parts.get(given), Tensor):
            raise ValueError(f"images must be the place of a tensor in the batch, {_described(batch)}, got {given!r}")
        return given
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.ndim == 4}
    if PIXEL_VALUES in tensors:
        return PIXEL_VALUES
    found = [name for name, part in tensors.items() if part.dtype == torch.uint8]
    # Latents and masks are floats of 4 dimensions as well, but have another number of channels.
    found = found or [name for name, part in tensors.items() if part.is_floating_point() and 3 in part.shape[1::2]]
    if len(found) != 1:
        which = f"{found} are" if found else "none is"
        raise ValueError(
            f"images must say which tensor of 4 dimensions, uint8 or floats in [-1, 1], is meant: {which} in "
            f"{_described(batch)}"
        )
    return found[0]


def _with_latents(batch: Any, place: Place, encoded: dict[str, Tensor]) -> Any:
    """Return the batch with the ``encoded`` tensors instead of its images."""
    if isinstance(batch, Mapping):
        rest = {name: part for name, part in batch.items() if name != place}
        if taken := sorted(rest.keys() & encoded.keys()):
            raise ValueError(f"a batch must leave the names of its latents free, got {', '.join(taken)}")
        return {**rest, **encoded}
    latents = encoded.get("latents", encoded)
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
