"""Threads that decode, encode and write: order, errors, and the way a GPU takes, with a stand-in for it."""

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_store import SIDE, small_vae, write_pictures

from fastvae.data.devices import default_dtype, settled_device
from fastvae.data.moment_encoder import MomentEncoder
from fastvae.data.pipeline import BackgroundWriter, Reading, chunks_of, encoded_chunks, ordered_map
from fastvae.data.reasons import ImageError
from fastvae.data.report import EncodeReport
from fastvae.data.settings import settle_workers
from fastvae.data.sources import list_folder
from fastvae.data.store import Unit


def test_results_come_in_order_and_not_far_ahead():
    started = []

    def slow_first(number):
        started.append(number)
        time.sleep(0.05 if number == 0 else 0)
        return number

    results = ordered_map(slow_first, range(100), workers=2)
    assert next(results) == 0
    assert max(started) <= 5  # 2 * workers waiting beside the one that was handed out
    assert list(results) == list(range(1, 100))


def test_an_error_ends_the_map_and_its_threads():
    def fails_at_three(number):
        if number == 3:
            raise RuntimeError("three")
        return number

    before = threading.active_count()
    seen = []
    with pytest.raises(RuntimeError, match="three"):
        seen.extend(ordered_map(fails_at_three, range(100), workers=2))
    assert threading.active_count() == before


def fail():
    raise OSError("disk")


@pytest.mark.parametrize("later", [0, 1], ids=["at the end", "by the next write"])
def test_a_writers_error_is_raised(later):
    with pytest.raises(OSError, match="disk"), BackgroundWriter() as writer:  # noqa: PT012 (the end is what raises)
        writer.submit(fail)
        for _ in range(later):
            writer.submit(lambda: None)
            pytest.fail("the error of the write before was not raised")


def test_no_more_than_one_write_is_under_way_when_submit_returns():
    """A third unit is not begun while the first is being written: a kill loses two at most."""
    done, allowed = [], threading.Event()

    def slow():
        allowed.wait(10)
        done.append("first")

    with BackgroundWriter() as writer:
        writer.submit(slow)
        assert done == []  # it does not wait for its own
        threading.Timer(0.05, allowed.set).start()
        writer.submit(lambda: done.append("second"))
        assert done[0] == "first"
    assert done == ["first", "second"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ImageError("empty", "x holds no bytes")])
def test_what_was_submitted_is_written_whatever_ends_the_run(error):
    done, allowed = [], threading.Event()

    def slow():
        allowed.wait(10)
        done.append("first")

    threading.Timer(0.05, allowed.set).start()
    with pytest.raises((KeyboardInterrupt, ImageError)), BackgroundWriter() as writer:  # noqa: PT012
        writer.submit(slow)
        raise error
    assert done == ["first"]


def test_an_interruption_while_a_unit_waits_loses_no_finished_unit(monkeypatch):
    done, allowed = [], threading.Event()

    def slow():
        allowed.wait(10)
        done.append("first")

    def interrupted(future, timeout=None):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:  # noqa: PT012
        writer.submit(slow)
        monkeypatch.setattr(Future, "result", interrupted)
        threading.Timer(0.05, allowed.set).start()
        writer.submit(lambda: done.append("second"))
    assert done == ["first", "second"]


def test_the_way_of_a_gpu_gives_the_same_rows(tmp_path):
    """One thread feeds the model batches that a pool decoded: here the model is the CPU's, under another device."""
    write_pictures(tmp_path / "in", 7)
    (tmp_path / "in" / "003.png").write_bytes(b"spoilt")
    unit = Unit(0, tuple(list_folder(tmp_path / "in").files))
    reading = Reading(Path(tmp_path / "in"), SIDE, "white", 10**6)
    real = MomentEncoder(small_vae(), "fp32", torch.device("cpu"), "dist", "fp16")
    callers = set()

    def moments(pixels):
        callers.add(threading.get_ident())
        return real.moments(pixels)

    other = SimpleNamespace(device=torch.device("cuda"), moments=moments, split=real.split)
    rows = {}
    for encoder, batch in ((real, 1), (other, 1), (other, 3)):
        done = list(encoded_chunks(chunks_of([unit], batch), reading, encoder, workers=2, threads=1))
        assert [file.key for chunk in done for file in chunk.files] == [file.key for file in unit.files]
        assert [chunk.last for chunk in done] == [False] * (len(done) - 1) + [True]
        assert [failure.key for chunk in done for failure in chunk.failures] == ["003.png"]
        rows[encoder is real, batch] = {row.key: row for chunk in done for row in chunk.rows}
    assert callers == {threading.get_ident()}
    for key, row in rows[True, 1].items():
        assert np.array_equal(row.mean, rows[False, 1][key].mean)
        # Another batch may be summed in another order: fp32 differences, seen as at most one step of half precision.
        step = np.spacing(np.abs(row.mean).max())
        assert np.abs(row.mean - rows[False, 3][key].mean).max() <= step


@pytest.mark.parametrize(
    ("count", "workers", "expected"),
    [(100, "auto", (4, 1)), (2, "auto", (2, 2)), (100, 2, (2, 2)), (100, 8, (8, 1)), (0, "auto", (1, 4))],
)
def test_a_cpus_cores_are_shared_out(count, workers, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    encoder = SimpleNamespace(device=torch.device("cpu"), widest=8, dtype=torch.float32)
    report = EncodeReport("out", "id", "fp32", None)
    settle_workers(report, encoder, 64, count, "auto", workers)
    assert (report.workers, report.threads_per_worker) == expected
    assert report.batch == 1


def test_streams_that_do_not_fit_in_memory_become_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("fastvae.data.settings._free_memory", lambda: 2**30)
    encoder = SimpleNamespace(device=torch.device("cpu"), widest=128, dtype=torch.float32)
    report = EncodeReport("out", "id", "fp32", None)
    settle_workers(report, encoder, 256, 100, "auto", "auto")
    # 8 activations of 128 channels at 256x256 in fp32 are 256 MiB; with as much again in reserve, two streams fit.
    assert (report.workers, report.threads_per_worker) == (2, 4)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:999"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"device must be one of this machine's, .* got '{device}'"):
        settled_device(device)


def test_devices():
    assert settled_device("cpu") == settled_device(torch.device("cpu")) == torch.device("cpu")
    assert settled_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_default_dtypes():
    assert default_dtype(torch.device("cuda")) == "fp16"
    assert default_dtype(torch.device("cpu")) in ("bf16", "fp32")
