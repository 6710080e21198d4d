"""LatentLoader returns the latents of the plain loop, bit for bit and in its order."""

import collections
import pickle

import diffusers
import numpy as np
import pytest
import torch
from support.short_run import short_run
from support.small_store import small_vae
from support.waiting_vae import Pictures, WaitingVAE, loader_of
from support.waiting_vae import no_thread_is_left as no_thread_is_left  # the fixture
from torch.utils.data import DataLoader

import fastvae
from fastvae.data.datasets.loader import LatentLoader
from fastvae.data.rows import noise_key
from fastvae.latents.convert import moments_of_images


def stock_vae():
    ours = small_vae()
    names = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")
    theirs = diffusers.AutoencoderKL(**{name: ours.config[name] for name in names}).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


MODELS = {
    "fastvae's": small_vae,
    "diffusers'": stock_vae,
    "accelerated": lambda: fastvae.accelerate(small_vae(), deterministic=True),
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", short_run(range(5), [0, 1, 3]))
def test_latents_are_those_of_the_plain_loop(workers):
    vae = small_vae()
    plain = []
    for batch in loader_of(9, workers=workers):
        seeds = [noise_key(7, 0, key) for key in batch["key"]]
        plain.append((batch["key"], batch["caption"], fastvae.encode_latents(vae, batch["image"], seeds=seeds)))
    loader = LatentLoader(loader_of(9, workers=workers), vae, seed=7)
    made = [(batch["key"], batch["caption"], batch["latents"]) for batch in loader]
    assert len(loader) == len(made) == 5
    for (keys, captions, latents), (own_keys, own_captions, own) in zip(plain, made, strict=True):
        assert (keys, captions) == (own_keys, own_captions)
        assert torch.equal(latents, own)


@pytest.mark.parametrize("model", MODELS)
def test_models_of_fastvae_and_diffusers_are_accepted(model):
    vae = MODELS[model]()
    for batch, images in zip(LatentLoader(loader_of(4), vae, ahead=3), loader_of(4), strict=True):
        assert "image" not in batch
        expected = fastvae.encode_latents(vae, images["image"], seeds=[noise_key(0, 0, key) for key in images["key"]])
        assert torch.equal(batch["latents"], expected)


def test_an_image_has_its_own_noise_in_any_order_and_batch():
    vae = fastvae.accelerate(small_vae(), deterministic=True)
    by_key = {}
    for batch in LatentLoader(loader_of(8, batch_size=3), vae, seed=1):
        by_key |= dict(zip(batch["key"], batch["latents"], strict=True))
    mixed = DataLoader(Pictures(8), batch_size=5, sampler=[6, 1, 1, 0, 7, 3, 6])
    for batch in LatentLoader(mixed, vae, seed=1):
        for key, latents, number in zip(batch["key"], batch["latents"], batch["noise_key"].tolist(), strict=True):
            assert torch.equal(latents, by_key[key])
            assert number == noise_key(1, 0, key)


Pair = collections.namedtuple("Pair", "label image")


def test_latents_replace_the_images_in_the_batch():
    vae = small_vae()
    images = torch.stack([Pictures(2)[index]["image"] for index in range(2)])
    label = torch.tensor([3, 4])
    seeds = [noise_key(0, 0, f"0/{index}") for index in range(2)]  # without a key, the position in the epoch
    expected = fastvae.encode_latents(vae, images, seeds=seeds)
    (alone,) = LatentLoader([images], vae)
    assert torch.equal(alone, expected)
    for batch in ((label, images), [label, images], Pair(label, images)):
        (made,) = LatentLoader([batch], vae)
        assert type(made) is type(batch)
        assert torch.equal(made[0], label)
        assert torch.equal(made[1], expected)
    (made,) = LatentLoader([{"mask": images, "image": images, "label": label}], vae, images="image")
    assert list(made) == ["mask", "label", "latents", "noise_key"]
    assert torch.equal(made["latents"], expected)
    (made,) = LatentLoader([images.permute(0, 2, 3, 1)], vae)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("posterior", ["sample", "mean", "dist"])
def test_every_posterior_in_either_space(posterior, scaled):
    vae = small_vae(scaling_factor=0.5, shift_factor=0.25)
    images = torch.stack([Pictures(2)[index]["image"] for index in range(2)])
    keys = [noise_key(0, 0, f"0/{index}") for index in range(2)]
    moments = moments_of_images(vae, images)
    (made,) = LatentLoader([images], vae, posterior=posterior, scaled=scaled)
    raw = {
        "sample": lambda: fastvae.sample_posterior(moments, seeds=keys),
        "mean": lambda: moments.chunk(2, 1)[0],
        "dist": lambda: fastvae.sample_posterior(made["mean"], made["logvar"], made["noise_key"]),
    }[posterior]()
    if posterior == "dist":
        assert made["noise_key"].tolist() == keys
        made, expected = raw, fastvae.sample_posterior(moments, seeds=keys)
        expected = fastvae.scale_latents(vae, expected) if scaled else expected
        # Drawing and scaling commute except for rounding: std, its product, the sum, the shift and the scale.
        assert (made - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * (expected.abs().max() + 1)
    else:
        assert torch.equal(made, fastvae.scale_latents(vae, raw) if scaled else raw)


def test_latents_that_are_not_finite_are_refused_where_their_batch_comes():
    vae = WaitingVAE()
    with torch.no_grad():
        vae.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="the moments must be finite, got NaN or infinity in rows"):
        next(iter(LatentLoader(loader_of(), vae)))


@pytest.mark.parametrize("scaled", [False, True], ids=["raw", "scaled"])
@pytest.mark.parametrize("posterior", ["sample", "mean", "dist"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_log_variance_that_is_not_finite_is_refused_where_it_is_clamped_or_left_out(value, posterior, scaled):
    vae = small_vae()
    with torch.no_grad():
        vae.quant_conv.bias[-1] = value
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the moments must be finite, got NaN or infinity in rows"):
        next(iter(LatentLoader([images], vae, posterior=posterior, scaled=scaled)))


def test_keys_may_be_an_array():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    by_form = [
        next(iter(LatentLoader([{"image": images, "key": keys}], small_vae())))["latents"]
        for keys in ([3, 4], torch.tensor([3, 4]), np.array([3, 4]))
    ]
    assert torch.equal(by_form[0], by_form[1])
    assert torch.equal(by_form[0], by_form[2])


def test_a_loader_is_pickled():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    loader = LatentLoader([images], small_vae(), seed=3)
    (ours,), (theirs,) = list(loader), list(pickle.loads(pickle.dumps(loader)))
    assert torch.equal(ours, theirs)


def test_an_epoch_has_its_own_noise_and_is_set_in_the_sampler():
    epochs = []

    class Sampler(torch.utils.data.RandomSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    pictures = Pictures(4)
    loader = LatentLoader(DataLoader(pictures, batch_size=4, sampler=Sampler(pictures)), small_vae(), seed=2)
    seen = []
    for epoch in (0, 1, 1):
        loader.set_epoch(epoch)
        (batch,) = loader
        assert batch["noise_key"].tolist() == [noise_key(2, epoch, key) for key in batch["key"]]
        seen.append({key: latents.sum().item() for key, latents in zip(batch["key"], batch["latents"], strict=True)})
    assert epochs == [0, 1, 1]
    assert seen[0] != seen[1]
    # The batch has another order of rows: the same noise, but convolutions may round differently.
    assert seen[2] == pytest.approx(seen[1], rel=1e-5)


def test_numbering_continues_after_a_resume():
    images = [torch.stack([Pictures(2)[index]["image"] for index in range(2)])] * 5
    complete = list(LatentLoader(images, small_vae(), seed=3))
    assert not torch.equal(complete[0], complete[1])  # the same images have other noise at another position
    loader = LatentLoader(images, small_vae(), seed=3)
    steps = iter(loader)
    next(steps), next(steps)
    state = loader.state_dict()
    steps.close()
    assert (state["batches"], state["images"]) == (2, 4)
    again = LatentLoader(images[2:], small_vae(), seed=3)
    again.load_state_dict(state)
    for latents, expected in zip(again, complete[2:], strict=True):
        assert torch.equal(latents, expected)
    with pytest.raises(ValueError, match="the state is of seed 3, this loader has seed 0"):
        LatentLoader(images, small_vae()).load_state_dict(state)


def test_an_iteration_that_was_left_changes_no_noise_of_the_next():
    """Reading one batch, or a few for a sanity check, does not renumber the next epoch."""
    images = [batch["image"] for batch in loader_of(6)]
    complete = list(LatentLoader(images, small_vae(), seed=3))
    loader = LatentLoader(images, small_vae(), seed=3)
    for _ in loader:
        break
    assert loader.state_dict()["images"] == 2
    for latents, expected in zip(loader, complete, strict=True):
        assert torch.equal(latents, expected)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("id", ["5", "6"]), (lambda batch: [f"x{number}" for number in batch["id"].tolist()], ["x5", "x6"])],
)
def test_keys_may_be_a_name_or_a_function(key, expected):
    batch = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "id": torch.tensor([5, 6])}
    (made,) = LatentLoader([batch], WaitingVAE(), key=key)
    assert made["noise_key"].tolist() == [noise_key(0, 0, each) for each in expected]


ZEROS = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("name", ["pixel_values", "images", 0])
def test_float_images_as_in_training_scripts_are_taken(name):
    vae, pixels = small_vae(), torch.rand(2, 3, 32, 32) * 2 - 1
    others = torch.zeros(2, 4, 16, 16), torch.zeros(2, 1, 32, 32)  # latents and a mask
    batch = [pixels, *others] if name == 0 else {name: pixels, "model_input": others[0], "mask": others[1]}
    (found,) = LatentLoader([batch], vae, posterior="mean", scaled=False)
    expected = moments_of_images(vae, pixels).chunk(2, dim=1)[0]
    assert torch.equal(found[0] if name == 0 else found["latents"], expected)


def test_pixel_values_come_before_other_images():
    batch = {"pixel_values": torch.zeros(1, 3, 32, 32), "conditioning": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)}
    (found,) = LatentLoader([batch], small_vae())
    assert set(found) == {"conditioning", "latents", "noise_key"}


REFUSED = {
    "no images": ([torch.zeros(2, 4, 16, 16), 1], {}, "none is in a list of 2"),
    "two of them": ((ZEROS, ZEROS), {}, r"images must say which .*: \[0, 1\] are in a tuple of 2"),
    "text": ("images", {}, "a batch must be a tensor of images, or a tuple or dict with one, got a str of 6"),
    "no such place": ({"x": ZEROS}, {"images": "image"}, "place of a tensor in the batch, a dict of x, got 'image'"),
    "no such key": ({"x": ZEROS}, {"key": "id"}, "key must be a part of the batch, a dict of x, got 'id'"),
    "too few keys": ({"x": ZEROS, "key": ["a"]}, {}, "a string or an integer for each of 2 images, got \\['a'\\]"),
    "keys of floats": ({"x": ZEROS, "key": [0.5, 1.0]}, {}, "a string or an integer for each of 2 images"),
    "a taken name": ({"x": ZEROS, "latents": 1}, {}, "leave the names of its latents free, got latents"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_batches_that_cannot_be_used_are_refused(case):
    batch, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        next(iter(LatentLoader([batch], WaitingVAE(), **options)))


def test_arguments_that_cannot_be_used_are_refused():
    for options, message in [
        ({"ahead": 0}, "ahead must be at least 1, got 0"),
        ({"posterior": "mode"}, "posterior must be 'sample', 'dist' or 'mean', got 'mode'"),
        ({"seed": -1}, "seed must be an integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            LatentLoader([], WaitingVAE(), **options)
