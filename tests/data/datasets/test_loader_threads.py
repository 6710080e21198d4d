"""Threads of LatentLoader: how far they work ahead, where their errors are raised, and that they end."""

import itertools
import signal
import sys
import threading
import time

import pytest
import torch
from support.short_run import short_run
from support.waiting_vae import WaitingVAE, loader_of, threads_of_ours
from support.waiting_vae import no_thread_is_left as no_thread_is_left  # the fixture

import fastvae
from fastvae.data.datasets.loader import LatentLoader


@pytest.mark.parametrize("ahead", [1, 3])
def test_ahead_batches_are_encoded_during_a_step_and_no_more(ahead):
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


def test_fetching_continues_while_the_encoder_works():
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
def test_an_error_of_the_loader_is_raised_at_its_batch(workers):
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


def test_an_error_of_the_encoder_is_raised_at_its_batch():
    vae = WaitingVAE()
    vae.fail_at = 1
    steps = iter(LatentLoader(loader_of(), vae, ahead=2))
    next(steps)
    with pytest.raises(RuntimeError, match="call 1 of the encoder fails"):
        next(steps)


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


WAYS_TO_LEAVE = [
    leave_by_break,
    leave_by_error,
    leave_by_interruption_of_the_step,
    leave_by_interruption_of_the_wait,
    leave_by_forgetting,
    leave_by_close,
    leave_by_beginning_again,
]


# With processes of DataLoader too: leaving from inside the step, from its wait, and with two iterations at once.
WITH_PROCESSES = [leave_by_error, leave_by_interruption_of_the_wait, leave_by_beginning_again]


@pytest.mark.parametrize(
    ("leave", "workers"),
    short_run(
        itertools.product(WAYS_TO_LEAVE, (0, 2)),
        [*itertools.product(WAYS_TO_LEAVE, (0,)), *itertools.product(WITH_PROCESSES, (2,))],
    ),
)
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


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_a_step_and_the_encoder_take_the_time_of_the_slower(share):
    """At most 1.05 times the time of the slower, in the best of five tries: other processes may use the cores."""
    wait, count, ratios = 0.1, 30, []
    images = [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * count
    for _ in range(5):
        vae = WaitingVAE(wait)
        encoding = seconds(lambda vae=vae: [fastvae.encode_latents(vae, batch, seeds=[0]) for batch in images])
        step = share * encoding / count
        training = seconds(lambda step=step: [time.sleep(step) for _ in images])
        both = seconds(lambda step=step: [time.sleep(step) for _ in LatentLoader(images, WaitingVAE(wait))])
        # The first batch is encoded before any step, and none during the last step.
        ratios.append((both - min(encoding, training) / count) / max(encoding, training))
        if ratios[-1] <= 1.05:
            break
    sys.stdout.write(f"step {share} of the encoder: {min(ratios):.3f} of the slower\n")
    assert min(ratios) <= 1.05, ratios


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
