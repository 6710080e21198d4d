"""The images of a folder as a torch Dataset, for encoding inside the training loop."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastvae.data.datasets.row_view import PackedKeys, row_number
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import CROPS, Variants, to_bucket
from fastvae.data.images.errors import REASONS, ImageError
from fastvae.data.images.read import image_size, read_image
from fastvae.data.images.size_rules import SizeRules, is_enlarged
from fastvae.data.rows import Size, SourceFile, noise_key, size_name
from fastvae.data.sources.companions import companion_patterns
from fastvae.data.sources.folder import FolderSource, PatternSource
from fastvae.data.sources.open import open_source
from fastvae.data.sources.source import Listing
from fastvae.system.arguments import check_choices, check_unsigned
from fastvae.system.terminal import first_few
from fastvae.system.threads import ordered_map

# Reading a header is mostly waiting, so there are more threads than cores.
HEADER_THREADS = 16
# Skipped images that warnings and the summary name.
NAMED = 10
ITEM = ("image", "key", "original_hw", "crop_tlhw", "bucket")


class ImageDataset(torch.utils.data.Dataset):
    """The images of a folder as pixels, for LatentLoader; an image that cannot be used is skipped and counted.

    src: a folder, read recursively, or a pattern of image files such as ``photos/**/*.jpg``. buckets: a side in pixels,
    "sdxl", "flux" or a JSON file, as in ``encode``. multiple: divides the sides of every bucket: the pixels per latent
    of the model, twice as many for transformers with 2x2 patches (SD3, FLUX).
    Item: ``image`` uint8 [3, H, W], upright sRGB, scaled until it covers its bucket, then cropped; ``key``, its path in
    the folder; int32 ``original_hw``, ``crop_tlhw`` and ``bucket`` as of a LatentDataset, from which time_ids computes
    SDXL's; and the source columns named in ``columns``, such as "txt" for captions in a.txt beside a.jpg, or a column
    of metadata.jsonl; None in a row that lacks one.
    crop: "centre", or "random", at another place in each epoch. flip: mirrors half of the images, other ones in each
    epoch. Both depend on ``seed``, the epoch and the key alone. exclude: patterns of files to leave out, such as masks.
    min_size, no_upscale: leave out images with a shorter side below min_size pixels, or smaller than their bucket.
    An image whose header cannot be used has no row. If its pixels turn out to be broken when they are read, the next
    image of its bucket replaces it, so that batches keep their size. ``skipped`` has both, those that worker processes
    met included; warnings name the first ten. A decoder that ends its process ends the DataLoader: ``encode`` does not
    have this limit.
    Rows of one bucket make a batch: take BucketBatchSampler and ``collate``, as for a LatentDataset.
    Raises ValueError for other arguments, for a folder without images, and in ``dataset[i]`` if no image of the bucket
    can be read; OSError if the machine is the cause.
    """

    def __init__(
        self,
        src: str | os.PathLike[str],
        buckets: str | int | os.PathLike[str] = 512,
        *,
        multiple: int = 8,
        columns: Sequence[str] = (),
        crop: Literal["centre", "random"] = "centre",
        flip: bool = False,
        seed: int = 0,
        exclude: Sequence[str] = (),
        min_size: int = 0,
        no_upscale: bool = False,
    ):
        check_choices(crop=(crop, CROPS))
        if taken := sorted({*columns} & {*ITEM}):
            raise ValueError(f"columns must not have the name of another part of an item, got {', '.join(taken)}")
        self.seed = check_unsigned("seed", seed)
        self._variants = Variants(crop, flip=flip, seed=seed)
        self._source = open_source(src, captions="beside" if columns else "none")
        if not isinstance(self._source, (FolderSource, PatternSource)):
            raise ValueError(f"src must be a folder or a pattern of image files, got {src!r}: encode it to a store")
        table, sizes = Buckets.parse(buckets, multiple), SizeRules(min_size, no_upscale)
        listing = self._source.listing()
        listing.leave_out(exclude)
        headers = ordered_map(self._header, listing.files, HEADER_THREADS)
        rows, self._unusable, enlarged = _usable(listing.files, headers, table, sizes)
        self._listed = len(listing.files)
        if not rows:
            found = _summary(self._unusable, self._listed)
            raise ValueError(f"src must hold an image that can be used, got {src!r}: {found}")
        self._keys = PackedKeys([file.key for file, _ in rows])
        self._columns = {name: _column(name, [file for file, _ in rows]) for name in columns}
        self.buckets = [size for size in table.sizes if size in {bucket for _, bucket in rows}]
        number = {bucket: index for index, bucket in enumerate(self.buckets)}
        self._bucket_of = np.array([number[bucket] for _, bucket in rows])
        # In shared memory, so that set_epoch reaches persistent workers, and this process learns what they skip.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        # 1 + the index in REASONS, for each row.
        self._reasons = torch.zeros(len(rows), dtype=torch.uint8, device="cpu").share_memory_()
        for sentence in _notes(listing, self._unusable, enlarged):
            warnings.warn(sentence, stacklevel=2)

    def _header(self, file: SourceFile) -> Size | ImageError:
        try:
            return image_size(self._source.read(file), name=file.key)
        except ImageError as error:
            return error

    @property
    def epoch(self) -> int:
        """The epoch of random crops and mirrored images."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, 0 or more; persistent workers apply it from their next image on."""
        self._epoch.fill_(check_unsigned("epoch", epoch, 63))

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons by key of the images that were skipped so far, by worker processes too."""
        rows = self._reasons.nonzero().flatten().tolist()
        return self._unusable | {self._keys[row]: REASONS[int(self._reasons[row]) - 1] for row in rows}

    def summary(self) -> str:
        """Return one sentence: the number of skipped images by reason, and the names of the first ten."""
        return _summary(self.skipped, self._listed)

    def keys(self) -> list[str]:
        """Return the key of every row, in row order."""
        return list(self._keys)

    def shards(self) -> list[tuple[Size, Tensor]]:
        """Return each bucket (height, width) and its row numbers, int64 [N]: BucketBatchSampler calls it."""
        return [
            (bucket, torch.from_numpy(np.flatnonzero(self._bucket_of == number)))
            for number, bucket in enumerate(self.buckets)
        ]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = row_number(index, len(self))
        bucket = self._bucket_of[row]
        for other in itertools.chain(range(row, len(self)), range(row)):
            if self._bucket_of[other] == bucket and not self._reasons[other]:
                try:
                    return self._item(other)
                except ImageError as error:
                    self._skip(other, error)
        raise ValueError(f"no image of the bucket {size_name(self.buckets[bucket])} can be read: {self.summary()}")

    def _item(self, row: int) -> dict[str, Any]:
        key, bucket, epoch = self._keys[row], self.buckets[self._bucket_of[row]], self.epoch
        # With flip, odd variants are mirrored. The last bit of the key's noise of this epoch decides.
        variant = 2 * epoch + noise_key(self.seed, epoch, key) % 2 if self._variants.flip else epoch
        picture = read_image(self._source.read(SourceFile(key, 0, 0)), at_least=bucket, name=key)
        pixels, crop = to_bucket(picture, bucket, self._variants, variant, key)
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1),
            "key": key,
            "original_hw": torch.tensor(picture.original_hw, dtype=torch.int32, device="cpu"),
            "crop_tlhw": torch.tensor(crop, dtype=torch.int32, device="cpu"),
            "bucket": torch.tensor(bucket, dtype=torch.int32, device="cpu"),
            **{name: values[row] for name, values in self._columns.items()},
        }

    def _skip(self, row: int, error: ImageError) -> None:
        self._reasons[row] = 1 + REASONS.index(error.reason)
        if int((self._reasons > 0).sum()) <= NAMED:
            warnings.warn(f"{error.detail}: skipped, and the next image of its bucket taken", stacklevel=4)


def _usable(
    files: Sequence[SourceFile], headers: Iterable[Size | ImageError], table: Buckets, sizes: SizeRules
) -> tuple[list[tuple[SourceFile, Size]], dict[str, str], int]:
    """Return the files that have a row, with their buckets; reasons by key of the others; the number to be enlarged."""
    rows, unusable, enlarged = [], dict[str, str](), 0
    for file, header in zip(files, headers, strict=True):
        if isinstance(header, ImageError):
            unusable[file.key] = header.reason
            continue
        bucket = table.nearest(header)
        if reason := sizes.reason(header, bucket):
            unusable[file.key] = reason
        else:
            rows.append((file, bucket))
            enlarged += is_enlarged(header, bucket)
    return rows, unusable, enlarged


def _notes(listing: Listing, unusable: dict[str, str], enlarged: int) -> list[str]:
    """Return sentences about all that a user may not expect of the folder."""
    notes = [*listing.notes, *([_summary(unusable, len(listing.files))] if unusable else [])]
    if listing.unreadable:
        notes.append(f"{len(listing.unreadable)} places cannot be read: {first_few(listing.unreadable, NAMED)}")
    if enlarged:
        notes.append(f"{enlarged} images are smaller than their bucket and are enlarged: no_upscale leaves them out")
    for pattern, count in companion_patterns(listing.files).items():
        notes.append(f"{count} images look like masks or control images: exclude=[{pattern!r}] leaves them out")
    return notes


def _summary(skipped: dict[str, str], listed: int) -> str:
    if not skipped:
        return f"none of {listed} images was skipped"
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(skipped.values()).items()))
    return f"{len(skipped)} of {listed} images skipped ({counts}): {first_few([*skipped], NAMED)}"


def _column(name: str, files: list[SourceFile]) -> list[Any]:
    values = [file.columns.get(name) for file in files]
    if all(value is None for value in values):
        known = sorted({column for file in files for column in file.columns})
        raise ValueError(f"columns must be among those of the source, {', '.join(known) or 'none'}, got {name}")
    return values
