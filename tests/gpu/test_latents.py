"""A store and a loader filled by a GPU on streams of their own: keys, bits and order are those of a plain loop."""

import threading

import pytest
import torch
from gpu.gpu_models import model, pictures
from torch.utils.data import DataLoader

import fastvae
from fastvae.data.datasets.loader import LatentLoader
from fastvae.data.rows import noise_key


class Rows(torch.utils.data.Dataset):
    """``count`` images with their keys."""

    def __init__(self, count):
        self.images = pictures(count, 64, 64)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "key": f"{index}.png"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ahead", [1, 3])
def test_the_loader_has_the_latents_of_a_plain_loop(ahead, workers, card):
    vae = fastvae.accelerate(model(card, torch.bfloat16), deterministic=True)
    rows = Rows(22)
    plain = {}
    for batch in DataLoader(rows, batch_size=4):
        seeds = [noise_key(5, 0, key) for key in batch["key"]]
        latents = fastvae.encode_latents(vae, batch["image"].to(card), seeds=seeds)
        plain |= dict(zip(batch["key"], latents, strict=True))
    order = []
    load = torch.zeros(2048, 2048, device=card)
    for batch in LatentLoader(DataLoader(rows, batch_size=4, num_workers=workers), vae, seed=5, ahead=ahead):
        for _ in range(20):  # a step on the caller's own stream, beside the encoder's
            load = load @ load
        assert batch["latents"].device == card
        for key, latents in zip(batch["key"], batch["latents"], strict=True):
            order.append(key)
            assert torch.equal(latents, plain[key]), key
    assert order == [f"{i}.png" for i in range(22)]
    assert [t.name for t in threading.enumerate() if t.name.startswith("fastvae-")] == []


def test_an_epoch_takes_no_more_memory_than_the_one_before(card):
    """Freed memory belongs to its stream: an iteration with new streams would reserve all of it again."""
    loader = LatentLoader([pictures(4, 256, 256)] * 3, fastvae.accelerate(model(card, torch.bfloat16)))
    reserved = []
    for _ in range(4):
        for _ in loader:
            pass
        torch.cuda.synchronize(card)
        reserved.append(torch.cuda.memory_reserved(card))
    assert reserved[1:] == reserved[1:2] * 3


def test_an_error_of_a_batch_is_raised_in_its_place(card):
    vae = fastvae.accelerate(model(card, torch.bfloat16))

    def batches():
        yield pictures(2, 64, 64)
        raise OSError("the third disk is gone")

    running = iter(LatentLoader(batches(), vae))
    assert next(running).shape == (2, 4, 16, 16)
    with pytest.raises(OSError, match="the third disk is gone"):
        next(running)


def test_a_store_made_on_a_gpu_has_each_rows_own_latents(card, tmp_path):
    image = pytest.importorskip("PIL.Image")
    images = pictures(24, 64, 64)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(images):
        image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    vae = model(card, torch.float16)
    report = fastvae.encode(folder, tmp_path / "store", vae=vae, buckets=64, shard_mb=0.01, device=card, progress=False)
    assert (report.ok, report.failed) == (24, 0)
    rows = fastvae.LatentDataset(tmp_path / "store")
    assert sorted(rows[i]["key"] for i in range(len(rows))) == [f"{i:02d}.png" for i in range(24)]
    exact = model(card, torch.float32)
    for i in range(len(rows)):
        row = rows[i]
        alone = exact.encode_moments(images[int(row["key"][:2])][None].to(card).float() / 127.5 - 1).chunk(2, dim=1)[0]
        difference = row["mean"].to(card).float() - alone[0]
        # Latents of another image differ by their spread; its own by the roundings of fp16 and the store.
        assert difference.square().mean().sqrt() <= 0.02 * alone.std(), row["key"]
