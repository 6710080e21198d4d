"""ImageDataset: pixels, captions and SDXL's time ids of a folder, with broken images skipped, counted and named."""

import copy
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from support.small_store import picture, small_vae, write_pictures
from torch.utils.data import DataLoader

import fastvae
from fastvae.data.images.crop import Variants, to_bucket
from fastvae.data.images.read import read_image

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*smaller than their bucket", "ignore:.*images skipped", "ignore:.*look like masks"
)


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "in", 5)
    return tmp_path / "in"


def cut(path):
    """Cut a file in the middle of its pixels: its header can still be read."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def loader_of(images, batch_size=2, workers=0, **options):
    sampler = fastvae.BucketBatchSampler(images, batch_size, **options)
    return DataLoader(images, batch_sampler=sampler, collate_fn=fastvae.collate, num_workers=workers)


def keys_of(batches):
    return sorted(key for batch in batches for key in batch["key"])


def test_items_are_the_pixels_that_encode_reads(folder):
    images = fastvae.ImageDataset(folder, 32)
    assert images.keys() == [f"{index:03d}.png" for index in range(5)]
    for row, key in enumerate(images.keys()):
        item = images[row]
        pixels, crop = to_bucket(read_image(folder / key, at_least=32), 32)
        assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), pixels)
        assert (item["key"], tuple(item["crop_tlhw"].tolist())) == (key, crop)
    assert (images.skipped, images.summary()) == ({}, "none of 5 images was skipped")


def test_time_ids_are_original_size_crop_and_target(folder):
    batch = next(iter(loader_of(fastvae.ImageDataset(folder, 32), 5)))
    # 40 x 48 becomes 32 x 38, of which the middle 32 columns are taken.
    assert fastvae.time_ids(batch).tolist() == [[40, 48, 0, 3, 32, 32]] * 5
    assert fastvae.time_ids(batch).dtype == torch.int32
    assert fastvae.time_ids(fastvae.ImageDataset(folder, 32)[0]).tolist() == [40, 48, 0, 3, 32, 32]
    with pytest.raises(ValueError, match="without bucket, crop_tlhw"):
        fastvae.time_ids({"original_hw": torch.ones(2, 2)})


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_skipped_counted_and_named(folder, workers):
    """One whose header is broken, one whose pixels are: found in a worker, and known to the main process."""
    (folder / "bad.jpg").write_bytes(b"no image")
    cut(folder / "003.png")
    with pytest.warns(UserWarning, match=r"1 of 6 images skipped \(unsupported 1\): bad.jpg"):
        images = fastvae.ImageDataset(folder, 32)
    loader = fastvae.LatentLoader(loader_of(images, 2, workers), small_vae())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = list(loader)
    assert sorted(len(batch["latents"]) for batch in batches) == [1, 2, 2]
    # The next image of the bucket is taken instead.
    assert keys_of(batches) == ["000.png", "001.png", "002.png", "004.png", "004.png"]
    assert images.skipped == {"bad.jpg": "unsupported", "003.png": "truncated"}
    assert images.summary() == "2 of 6 images skipped (truncated 1, unsupported 1): bad.jpg, 003.png"
    if not workers:
        assert any("003.png ends before its PNG data does: skipped" in str(one.message) for one in caught)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a file is tried once
            list(loader)


def test_ten_broken_images_are_named_and_all_are_counted(tmp_path):
    for name in write_pictures(tmp_path, 13)[:12]:
        cut(tmp_path / name)
    images = fastvae.ImageDataset(tmp_path, 32)
    with pytest.warns(UserWarning, match="ends before its PNG data does: skipped") as caught:
        assert images[0]["key"] == "012.png"
    assert len(caught) == 10
    assert len(images.skipped) == 12
    assert images.summary().endswith("008.png, 009.png and 2 more")
    (tmp_path / "012.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of the bucket 32x32 can be read: 13 of 13 images skipped \(empty"):
        images[5]


def test_a_folder_without_a_usable_image_is_refused(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"src must hold an image that can be used.*unsupported 1"):
        fastvae.ImageDataset(tmp_path, 32)


def test_captions_ride_along(folder):
    (folder / "000.txt").write_text("a cat\n")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "001.png", "text": "a dog"}) + "\n")
    batch = next(iter(loader_of(fastvae.ImageDataset(folder, 32, columns=["txt", "text"]), 5, shuffle=False)))
    assert batch["txt"] == ["a cat", None, None, None, None]
    assert batch["text"] == [None, "a dog", None, None, None]
    with pytest.raises(ValueError, match="columns must be among those of the source, text, txt, got caption"):
        fastvae.ImageDataset(folder, 32, columns=["caption"])
    with pytest.raises(ValueError, match="another part of an item, got bucket"):
        fastvae.ImageDataset(folder, 32, columns=["bucket"])


def test_a_table_sorts_images_by_aspect_ratio(folder):
    picture(9, 40, 80).save(folder / "tall.png")
    images = fastvae.ImageDataset(folder, "sdxl@64")
    assert {bucket: len(rows) for bucket, rows in images.shards()} == {(64, 72): 5, (96, 48): 1}
    for batch in loader_of(images, 4):
        assert len({tuple(bucket) for bucket in batch["bucket"].tolist()}) == 1
        assert list(batch["image"].shape[2:]) == batch["bucket"][0].tolist()


def test_random_crops_and_mirrored_images_depend_on_epoch_and_key(folder):
    images = fastvae.ImageDataset(folder, 32, crop="random", flip=True, seed=3)
    seen = set()
    for epoch in range(4):
        images.set_epoch(epoch)
        item, again = images[1], copy.deepcopy(images)[1]
        assert torch.equal(item["image"], again["image"])
        source = read_image(folder / "001.png", at_least=32)
        made = [
            to_bucket(source, 32, Variants("random", flip=True, seed=3), 2 * epoch + bit, "001.png") for bit in (0, 1)
        ]
        found = [np.array_equal(item["image"].permute(1, 2, 0).numpy(), pixels) for pixels, _ in made]
        assert sum(found) == 1
        seen.add((found.index(True), tuple(item["crop_tlhw"].tolist())))
    assert {mirrored for mirrored, _ in seen} == {0, 1}
    assert len({crop for _, crop in seen}) > 1


def test_a_pickled_copy_reads_the_same(folder):
    images = fastvae.ImageDataset(folder, 32)
    assert torch.equal(pickle.loads(pickle.dumps(images))[2]["image"], images[2]["image"])


def test_masks_and_enlarged_images_are_named_and_can_be_left_out(folder):
    picture(7).save(folder / "000-masklabel.png")
    with pytest.warns(UserWarning, match="6 images are smaller than their bucket") as caught:
        fastvae.ImageDataset(folder, 64)
    said = [str(one.message) for one in caught]
    assert "6 images are smaller than their bucket and are enlarged: no_upscale leaves them out" in said
    assert "1 images look like masks or control images: exclude=['*-masklabel*'] leaves them out" in said
    assert len(fastvae.ImageDataset(folder, 32, exclude=["*-masklabel*"])) == 5
    picture(8, 80, 80).save(folder / "large.png")
    images = fastvae.ImageDataset(folder, 64, no_upscale=True, exclude=["*-mask*"])
    assert images.keys() == ["large.png"]
    assert set(images.skipped.values()) == {"below_bucket"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"src": "archive.tar"}, "src must be a folder or a pattern"),
        ({"buckets": 30}, "buckets must be a multiple of the model's 8 pixels"),
        ({"crop": "left"}, "crop must be one of 'centre', 'random'"),
        ({"seed": -1}, "seed must be an integer"),
        ({"min_size": -1}, "min_size must be a number of pixels"),
    ],
)
def test_wrong_arguments_are_refused(folder, given, named):
    with pytest.raises(ValueError, match=named):
        fastvae.ImageDataset(**{"src": folder, "buckets": 32, **given})


def test_wrong_rows_are_refused(folder):
    images = fastvae.ImageDataset(folder, 32)
    assert images[-1]["key"] == "004.png"
    with pytest.raises(IndexError, match="within the dataset's 5 rows"):
        images[5]
    with pytest.raises(TypeError, match="the number of one row"):
        images["000.png"]  # type: ignore[index]


def test_another_default_device_changes_nothing(folder):
    with torch.device("meta"):
        images = fastvae.ImageDataset(folder, 32)
        rows = [images[row] for numbers in fastvae.BucketBatchSampler(images, 2) for row in numbers]
    assert len(rows) == len(images)
    assert {value.device.type for row in rows for value in row.values() if torch.is_tensor(value)} == {"cpu"}
