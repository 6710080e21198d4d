"""LatentLoader: what the plain loop gives, to the last bit and in its order, made ahead of time by threads that end."""

import collections
import itertools
import multiprocessing
import pickle
import signal
import sys
import threading
import time

import diffusers
import numpy as np
import pytest
import torch
from support.small_store import small_vae
from support.waiting_vae import Pictures, WaitingVAE
from torch.utils.data import DataLoader

import fastvae
from fastvae.data.datasets.loader import LatentLoader
from fastvae.data.rows import noise_key
from fastvae.latents.convert import moments_of_images


def loader_of(count=10, batch_size=2, workers=0, **options):
    return DataLoader(Pictures(count, **options), batch_size=batch_size, num_workers=workers)


def threads_of_ours():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastvae-")]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert threads_of_ours() == []
    assert multiprocessing.active_children() == []


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
@pytest.mark.parametrize("workers", range(5))
def test_it_gives_what_the_plain_loop_gives(workers):
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
def test_any_model_will_do(model):
    vae = MODELS[model]()
    for batch, images in zip(LatentLoader(loader_of(4), vae, ahead=3), loader_of(4), strict=True):
        assert "image" not in batch
        wanted = fastvae.encode_latents(vae, images["image"], seeds=[noise_key(0, 0, key) for key in images["key"]])
        assert torch.equal(batch["latents"], wanted)


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


def test_latents_stand_where_the_images_stood():
    vae = small_vae()
    images = torch.stack([Pictures(2)[index]["image"] for index in range(2)])
    label = torch.tensor([3, 4])
    seeds = [noise_key(0, 0, f"0/{index}") for index in range(2)]  # numbered through, where there is no key
    wanted = fastvae.encode_latents(vae, images, seeds=seeds)
    (alone,) = LatentLoader([images], vae)
    assert torch.equal(alone, wanted)
    for batch in ((label, images), [label, images], Pair(label, images)):
        (made,) = LatentLoader([batch], vae)
        assert type(made) is type(batch)
        assert torch.equal(made[0], label)
        assert torch.equal(made[1], wanted)
    (made,) = LatentLoader([{"mask": images, "image": images, "label": label}], vae, images="image")
    assert list(made) == ["mask", "label", "latents", "noise_key"]
    assert torch.equal(made["latents"], wanted)
    (made,) = LatentLoader([images.permute(0, 2, 3, 1)], vae)
    assert torch.equal(made, wanted)


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
        made, wanted = raw, fastvae.sample_posterior(moments, seeds=keys)
        wanted = fastvae.scale_latents(vae, wanted) if scaled else wanted
        # Drawing and scaling commute but for the rounding of each: std, its product, the sum, the shift and the scale.
        assert (made - wanted).abs().max() <= 8 * torch.finfo(torch.float32).eps * (wanted.abs().max() + 1)
    else:
        assert torch.equal(made, fastvae.scale_latents(vae, raw) if scaled else raw)


@pytest.mark.parametrize("ahead", [1, 3])
def test_the_next_batches_are_made_during_the_step_and_no_more(ahead):
    vae, fetched = WaitingVAE(), []

    def batches():
        for index in range(10):
            fetched.append(index)
            yield torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    for step, _ in enumerate(LatentLoader(batches(), vae, ahead=ahead)):
        last = min(step + ahead, 9)
        assert vae.started[last].wait(5)  # while this step still runs
        assert vae.calls <= step + ahead + 1
        assert len(fetched) <= step + ahead + 1
    assert len(fetched) == 10


def test_fetching_goes_on_while_the_encoder_works():
    fetching = [threading.Event() for _ in range(8)]

    class Waits(WaitingVAE):
        def encode(self, x):
            if self.calls < 6:
                assert fetching[self.calls + 1].wait(5)  # the next batch is fetched during this call
            return super().encode(x)

    def batches():
        for index in range(6):
            fetching[index].set()
            yield torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        fetching[6].set()

    assert len(list(LatentLoader(batches(), Waits()))) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_loader_comes_where_its_batch_would(workers):
    seen = []
    with pytest.raises(OSError, match="picture 5 cannot be read"):
        seen.extend(
            batch["key"] for batch in LatentLoader(loader_of(workers=workers, fail_at=5), WaitingVAE(), ahead=3)
        )
    assert seen == [] or seen == [["000.png", "001.png"], ["002.png", "003.png"]]
    steps = iter(LatentLoader(loader_of(workers=workers, fail_at=5), WaitingVAE(), ahead=3))
    assert next(steps)["key"] == ["000.png", "001.png"]
    assert next(steps)["key"] == ["002.png", "003.png"]
    with pytest.raises(OSError, match="picture 5 cannot be read"):
        next(steps)
    with pytest.raises(StopIteration):
        next(steps)


def test_an_error_of_the_encoder_comes_where_its_batch_would():
    vae = WaitingVAE()
    vae.fail_at = 1
    steps = iter(LatentLoader(loader_of(), vae, ahead=2))
    next(steps)
    with pytest.raises(RuntimeError, match="call 1 of the encoder fails"):
        next(steps)


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


def leave_by_break(loader):
    for _ in loader:
        assert len(threads_of_ours()) == 2
        break


def leave_by_error(loader):
    def train():
        for _ in loader:
            raise ZeroDivisionError("the step fails")

    with pytest.raises(ZeroDivisionError):
        train()


def leave_by_interruption_of_the_step(loader):
    def train():
        for _ in loader:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()


def leave_by_interruption_of_the_wait(loader):
    class Interrupts(WaitingVAE):
        def encode(self, x):
            time.sleep(0.05)  # the step waits for this batch by now
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return super().encode(x)

    loader.vae = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        next(iter(loader))


def leave_by_forgetting(loader):
    steps = iter(loader)
    next(steps)
    del steps


def leave_by_close(loader):
    steps = iter(loader)
    next(steps)
    loader.close()
    assert threads_of_ours() == []
    with pytest.raises(StopIteration):
        next(steps)


def leave_by_beginning_again(loader):
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    assert len(threads_of_ours()) == 2
    with pytest.raises(StopIteration):
        next(first)
    second.close()


WAYS_OUT = [
    leave_by_break,
    leave_by_error,
    leave_by_interruption_of_the_step,
    leave_by_interruption_of_the_wait,
    leave_by_forgetting,
    leave_by_close,
    leave_by_beginning_again,
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("leave", WAYS_OUT)
def test_no_thread_outlives_the_iteration(leave, workers):
    loader = LatentLoader(loader_of(20, workers=workers), WaitingVAE(), ahead=2)
    leave(loader)
    assert threads_of_ours() == []
    loader.vae = WaitingVAE()
    assert [key for batch in loader for key in batch["key"]] == [f"{index:03d}.png" for index in range(20)]


def test_a_generator_is_closed_with_the_iteration():
    closed = []

    def batches():
        try:
            for _ in itertools.count():
                yield torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        finally:
            closed.append(threading.current_thread())

    for _ in LatentLoader(batches(), WaitingVAE()):
        break
    assert closed == [threading.main_thread()]


def test_epochs_have_noise_of_their_own_and_tell_the_sampler():
    told = []

    class Sampler(torch.utils.data.RandomSampler):
        def set_epoch(self, epoch):
            told.append(epoch)

    pictures = Pictures(4)
    loader = LatentLoader(DataLoader(pictures, batch_size=4, sampler=Sampler(pictures)), small_vae(), seed=2)
    seen = []
    for epoch in (0, 1, 1):
        loader.set_epoch(epoch)
        (batch,) = loader
        assert batch["noise_key"].tolist() == [noise_key(2, epoch, key) for key in batch["key"]]
        seen.append({key: latents.sum().item() for key, latents in zip(batch["key"], batch["latents"], strict=True)})
    assert told == [0, 1, 1]
    assert seen[0] != seen[1]
    # Rows of a batch of another order: the same noise, and convolutions that may round otherwise.
    assert seen[2] == pytest.approx(seen[1], rel=1e-5)


def test_numbering_goes_on_after_a_resume():
    images = [torch.stack([Pictures(2)[index]["image"] for index in range(2)])] * 5
    whole = list(LatentLoader(images, small_vae(), seed=3))
    assert not torch.equal(whole[0], whole[1])  # the same images have other noise in another place
    loader = LatentLoader(images, small_vae(), seed=3)
    steps = iter(loader)
    next(steps), next(steps)
    state = loader.state_dict()
    steps.close()
    assert (state["batches"], state["images"]) == (2, 4)
    again = LatentLoader(images[2:], small_vae(), seed=3)
    again.load_state_dict(state)
    for latents, wanted in zip(again, whole[2:], strict=True):
        assert torch.equal(latents, wanted)
    with pytest.raises(ValueError, match="the state is of seed 3, this loader has seed 0"):
        LatentLoader(images, small_vae()).load_state_dict(state)


def test_an_iteration_that_was_left_changes_no_noise_of_the_next():
    """A look at the first batch, or a sanity check of a few, must not renumber the epoch that follows."""
    images = [batch["image"] for batch in loader_of(6)]
    whole = list(LatentLoader(images, small_vae(), seed=3))
    loader = LatentLoader(images, small_vae(), seed=3)
    for _ in loader:
        break
    assert loader.state_dict()["images"] == 2
    for latents, wanted in zip(loader, whole, strict=True):
        assert torch.equal(latents, wanted)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("id", ["5", "6"]), (lambda batch: [f"x{number}" for number in batch["id"].tolist()], ["x5", "x6"])],
)
def test_keys_may_be_anywhere(key, wanted):
    batch = {"image": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "id": torch.tensor([5, 6])}
    (made,) = LatentLoader([batch], WaitingVAE(), key=key)
    assert made["noise_key"].tolist() == [noise_key(0, 0, each) for each in wanted]


ZEROS = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
REFUSED = {
    "no images": ([ZEROS.float(), 1], {}, "none is in a list of 2"),
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


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_a_step_and_the_encoder_take_the_time_of_the_slower(share):
    """At most 1.05 times, in the best of five tries: another process may take the cores in any of them."""
    wait, count, ratios = 0.1, 30, []
    images = [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * count
    for _ in range(5):
        vae = WaitingVAE(wait)
        encoding = seconds(lambda vae=vae: [fastvae.encode_latents(vae, batch, seeds=[0]) for batch in images])
        step = share * encoding / count
        training = seconds(lambda step=step: [time.sleep(step) for _ in images])
        both = seconds(lambda step=step: [time.sleep(step) for _ in LatentLoader(images, WaitingVAE(wait))])
        # The first batch is made before any step, and during the last step none is.
        ratios.append((both - min(encoding, training) / count) / max(encoding, training))
        if ratios[-1] <= 1.05:
            break
    sys.stdout.write(f"step {share} of the encoder: {min(ratios):.3f} of the slower\n")
    assert min(ratios) <= 1.05, ratios


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
