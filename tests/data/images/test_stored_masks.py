"""Masks in a store: read by datasets and loaders, and checked for damage."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.small_store import MASK, moments_of, opacity_of, write_store
from torch.utils.data import DataLoader

from fastvae.data.datasets.collate import collate
from fastvae.data.datasets.dataset import LatentDataset
from fastvae.data.datasets.iterable import LatentIterable
from fastvae.data.store.errors import StoreError
from fastvae.data.store.shard import read_metadata
from fastvae.data.store.verify import verify
from fastvae.system.atomic_files import sha256_of

SQUARE, WIDE = (32, 32), (24, 48)
ROWS = {SQUARE: ["a", "b.png", ("b.png", 1), "c"], WIDE: ["g", ("g", 1), "h"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("masks") / "store", ROWS, preprocess=MASK, rows_per_unit=2)


def is_its_own(item) -> bool:
    expected = opacity_of(item["key"], int(item["variant"]), tuple(item["bucket"].tolist()))
    return item["alpha"].dtype == torch.uint8 and np.array_equal(item["alpha"], expected)


@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"posterior": "mean"}, {"posterior": "sample"}], ids=str)
def test_every_item_and_batch_has_its_own_mask(made, options):
    dataset = LatentDataset(made, **options)
    assert all(map(is_its_own, dataset))
    batch = collate(dataset.__getitems__([3, 0, 2, 0]))
    assert batch["alpha"].shape == (4, 4, 4)
    assert all(is_its_own({name: values[row] for name, values in batch.items()}) for row in range(4))
    again = collate([dataset[3], dataset[0]])
    assert torch.equal(again["alpha"], batch["alpha"][:2])
    batch["alpha"].zero_()
    assert is_its_own(dataset[3])


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_a_store_without_moments_keeps_its_masks(tmp_path, posterior):
    dataset = LatentDataset(write_store(tmp_path / "out", {SQUARE: ["a", "b"]}, preprocess=MASK, posterior=posterior))
    assert all(map(is_its_own, dataset))
    assert np.array_equal(dataset[1]["latents" if posterior == "sample" else "mean"], moments_of("b", 0, SQUARE)[0])


def test_masks_are_read_by_loader_workers(made):
    loader = DataLoader(LatentIterable(made, 2, seed=1), batch_size=None, num_workers=1)
    batches = list(loader)
    assert sum(len(batch["key"]) for batch in batches) == 7
    for batch in batches:
        assert all(
            is_its_own({name: values[row] for name, values in batch.items()}) for row in range(len(batch["key"]))
        )


def test_large_masks_in_reused_buffers(tmp_path):
    bucket = (1024, 1024)
    dataset = LatentDataset(write_store(tmp_path / "out", {bucket: [str(n) for n in range(16)]}, preprocess=MASK))
    kept = dataset.__getitems__(list(range(16)))
    for _ in range(3):
        assert all(is_its_own(item) for item in dataset.__getitems__(list(range(15, -1, -1))))
    assert all(map(is_its_own, kept))


def test_stores_of_other_alpha_policies_have_no_mask(tmp_path):
    for number, preprocess in enumerate(({}, {"alpha": "white"}, {"alpha": "drop"})):
        made = write_store(tmp_path / str(number), {SQUARE: ["x"]}, preprocess=preprocess)
        assert "alpha" not in LatentDataset(made)[0]


def test_a_column_named_alpha_is_refused(tmp_path):
    write_store(tmp_path / "out", {SQUARE: ["a"]}, columns={"a": {"alpha": 0.5}})
    with pytest.raises(ValueError, match="the name of another part of an item, got alpha"):
        LatentDataset(tmp_path / "out", columns=["alpha"])


# Damage


def replace_tensors(out, **changes) -> None:
    """Replace tensors of the store's shard, or remove those that are None, and update its commit record."""
    (path,) = (out / "shards").glob("*.safetensors")
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, read_metadata(path))
    record = path.with_suffix(".json")
    fields = json.loads(record.read_text()) | {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    record.write_text(json.dumps(fields))


WRONG = {
    "of floats": (np.ones((3, 4, 4), np.float32), r"alpha is float32 \[3, 4, 4\], and should be uint8 \[3, 4, 4\]"),
    "of another size": (np.ones((3, 2, 8), np.uint8), r"alpha is uint8 \[3, 2, 8\], and should be uint8 \[3, 4, 4\]"),
    "of fewer rows": (np.ones((2, 4, 4), np.uint8), r"alpha is uint8 \[2, 4, 4\], and should be uint8 \[3, 4, 4\]"),
    "left out": (None, "cannot be read: .*alpha"),
}


@pytest.mark.parametrize("case", WRONG)
def test_row_27_an_invalid_mask_is_refused(tmp_path, case):
    wrong, message = WRONG[case]
    out = write_store(tmp_path / "out", {SQUARE: ["a", "b", "c"]}, preprocess=MASK)
    replace_tensors(out, alpha=wrong)
    with pytest.raises(StoreError, match=rf"000000-32x32\.safetensors .*{message}"):
        LatentDataset(out)[0]
    (damage,) = verify(out, deep=True, progress=False).damaged
    assert damage.file == "shards/000000-32x32.safetensors"


def test_row_32_the_rows_checksum_covers_the_mask(tmp_path):
    out = write_store(tmp_path / "out", {SQUARE: ["a", "b", "c"]}, preprocess=MASK)
    assert verify(out, deep=True, progress=False).damaged == []
    masks = np.stack([opacity_of(key, 0, SQUARE) for key in "abc"])
    masks[1, 2, 3] ^= 1
    replace_tensors(out, alpha=masks)
    assert verify(out, progress=False).damaged == []
    (damage,) = verify(out, deep=True, progress=False).damaged
    assert "row 1 (b) has another checksum" in damage.what
